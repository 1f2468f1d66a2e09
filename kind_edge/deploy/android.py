"""`android/`: one Kotlin class round the bundle's denoiser for onnxruntime-android, written from the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge.budget.precision import decoder_path, decoder_precision
from kind_edge.deploy.app_source import guidance_words, is_guided, render
from kind_edge.units import format_bytes

if TYPE_CHECKING:
    from kind_edge.model.spec import ModelSpec

FOLDER = "android"
_TEMPLATES = {"KindEdge.kt": "KindEdge.kt.j2", "README.md": "README.md.j2"}
_BUFFERS = {"float32": "FloatBuffer", "int32": "IntBuffer", "int64": "LongBuffer"}


@dataclass(frozen=True)
class AndroidPackager:
    """Writes `android/KindEdge.kt` and how to use it."""

    def check(self, spec: ModelSpec) -> None:
        """Every model has its class."""

    def write(self, folder: Path, values: Mapping[str, Any]) -> None:
        (folder / FOLDER).mkdir()
        for name, template in _TEMPLATES.items():
            (folder / FOLDER / name).write_text(render(f"android/{template}", _context(values)), encoding="utf-8")


PACKAGER = AndroidPackager()


def _context(values: Mapping[str, Any]) -> dict[str, Any]:
    plan = values["plan"]
    entry = values["models"][values["default_model"]]
    names = [each["name"] for each in entry["inputs"]]
    wanted = (decoder_path(decoder_precision(entry["precision"])), decoder_path("fp32"))
    return {
        **{key: values[key] for key in ("name", "licence", "classes", "sampler", "tools", "default_model")},
        "image": values.get("latent", values["image"]),
        "inputs": [{"name": each["name"], "kotlin": _tensor(each["name"], each["dtype"])} for each in entry["inputs"]],
        "switches": "class_index" in names,
        "takes_timestep": "timestep" in names,
        "threads": values.get("threads", 2),
        "guided": is_guided(values),
        "guidance_words": guidance_words(values),
        "decoder": next((path for path in wanted if path in values["models"]), None),
        "peak_memory": format_bytes(plan["peak_memory_bytes"]),
    }


def _tensor(name: str, dtype: str) -> str:
    """Kotlin that makes an input's tensor of the type that the graph declares."""
    if name == "sample":
        shape = "longArrayOf(batch.toLong(), CHANNELS.toLong(), HEIGHT.toLong(), WIDTH.toLong())"
        return f"OnnxTensor.createTensor(environment, FloatBuffer.wrap(samples), {shape})"
    make = {"float32": "FloatArray", "int32": "IntArray", "int64": "LongArray"}[dtype]
    convert = {"float32": ".toFloat()", "int32": "", "int64": ".toLong()"}[dtype]
    value = {"timestep": "TIMESTEP[row]", "step_index": f"row{convert}", "class_index": f"classIndices[it]{convert}"}[
        name
    ]
    wrapped = f"{_BUFFERS[dtype]}.wrap({make}(batch) {{ {value} }})"
    return f"OnnxTensor.createTensor(environment, {wrapped}, longArrayOf(batch.toLong()))"
