"""`android/`: one Kotlin class round the bundle's denoiser for onnxruntime-android, written from the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
        from jinja2 import Environment, StrictUndefined

        # Kotlin and Markdown: HTML's escapes have no place there.
        environment = Environment(
            autoescape=False,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters["float32"] = lambda value: np.format_float_scientific(np.float32(value), trim="0")
        (folder / FOLDER).mkdir()
        for name, template in _TEMPLATES.items():
            source = files("kind_edge.deploy").joinpath("templates", "android", template).read_text(encoding="utf-8")
            text = environment.from_string(source).render(**_context(values))
            (folder / FOLDER / name).write_text(text, encoding="utf-8")


PACKAGER = AndroidPackager()


def _context(values: Mapping[str, Any]) -> dict[str, Any]:
    sampler, plan = values["sampler"], values["plan"]
    entry = values["models"][values["default_model"]]
    names = [each["name"] for each in entry["inputs"]]
    decoders = [path for path, each in values["models"].items() if each["role"] == "decoder" and path.endswith(".onnx")]
    guided = sampler["null_index"] is not None and sampler["guidance"] != 1.0
    words = f"guidance {sampler['guidance']:g}" if guided else "no guidance"
    if sampler["inside_guidance"] is not None:
        words = f"guidance {sampler['inside_guidance']:g} inside the model"
    return {
        **{key: values[key] for key in ("name", "licence", "classes", "sampler", "tools", "default_model")},
        "image": values.get("latent", values["image"]),
        "inputs": [{"name": each["name"], "kotlin": _tensor(each["name"], each["dtype"])} for each in entry["inputs"]],
        "switches": "class_index" in names,
        "takes_timestep": "timestep" in names,
        "guided": guided,
        "guidance_words": words,
        "decoder": decoders[0] if decoders else None,
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
