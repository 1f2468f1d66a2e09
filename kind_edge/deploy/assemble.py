"""The parts of a bundle around its model files: manifest, measurements, preview, texts."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kind_edge._version import __version__
from kind_edge.budget.decoder import DecoderCost
from kind_edge.budget.plan import Plan
from kind_edge.budget.precision import PRECISIONS, decoder_path
from kind_edge.budget.profile import HOST, DeviceProfile, load_profile
from kind_edge.budget.whole_model import runs_on_one_thread
from kind_edge.deploy.bench import LatencyReport, bench_image, bench_model
from kind_edge.deploy.bundle import hash_files, write_manifest
from kind_edge.deploy.grid import save_grid
from kind_edge.deploy.manifest import SCHEMA_VERSION, Manifest
from kind_edge.deploy.notice import NOTICE, notice
from kind_edge.deploy.runtime import LoadedBundle
from kind_edge.deploy.session import open_session
from kind_edge.deploy.swift import app_words, write_swift
from kind_edge.deploy.verify import REFERENCE_FILE
from kind_edge.errors import GateError
from kind_edge.model.provenance import code_revision
from kind_edge.model.spec import ModelSpec
from kind_edge.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kind_edge.deploy.sampler_table import SamplerTable

SIZE_ATTEMPTS = 3
"""So often at most a plan is solved whose file misses --max-size."""
MAC_PROGRAM = "coreml/verify_on_mac.py"
PREVIEW_IMAGES, PICTURE_CHANNELS = 8, (1, 3)
_TOOLS = ("torch", "onnx", "onnxruntime", "coremltools", "diffusers", "numpy", "safetensors")


def describe(
    plan: Plan,
    spec: ModelSpec,
    entries: Mapping[str, Mapping[str, Any]],
    default_model: str,
    table: SamplerTable,
    told: Mapping[str, Any],
    decoder: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest's values, as far as they are known before anything is measured. `told` is the model's lineage,
    `decoder` what is said of it."""
    guided = plan.evaluations_per_step > 1
    drawn = {"channels": spec.channels, "height": spec.image_size, "width": spec.image_size}
    image: dict[str, Any] = {"image": drawn}
    if decoder is not None:
        side = spec.image_size * spec.pixels_per_latent
        pixels = {"channels": decoder["image_channels"], "height": side, "width": side}
        image = {"image": pixels, "latent": drawn, "decoder": dict(decoder)}
    return {
        "schema_version": SCHEMA_VERSION,
        "name": bundle_name(plan),
        "source": {"model": plan.model, "checkpoint_sha256": plan.checkpoint_sha256},
        "licence": told["licence"],
        "provenance": dict(told),
        "classes": list(plan.classes),
        "form": plan.form,
        **image,
        "models": {path: dict(entry) for path, entry in entries.items()},
        "default_model": default_model,
        "sampler": {
            "kind": plan.sampler,
            "steps": plan.steps,
            "guidance": plan.guidance if guided else 1.0,
            "null_index": len(plan.classes) if plan.null_branch else None,
            "inside_guidance": plan.inside_guidance,
            "tables": table.to_dict(),
            "prediction_channels": spec.output_channels,
        },
        "plan": plan.to_dict(),
        **({"threads": 1} if runs_on_one_thread(spec) else {}),
        "tools": tool_versions(),
        **({"revision": revision} if (revision := code_revision()) else {}),
    }


def bundle_name(plan: Plan) -> str:
    return f"{plan.model}-{plan.profile}"


def tool_versions() -> dict[str, str]:
    versions = {"kind_edge": __version__, "python": platform.python_version()}
    for name in _TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def manifest_of(values: Mapping[str, Any], folder: Path) -> Manifest:
    """A validated manifest of the files that lie in `folder` now."""
    return Manifest.from_dict({**values, "files": _files(folder)})


def _files(folder: Path) -> dict[str, Any]:
    return {name: {"bytes": entry.size_bytes, "sha256": entry.sha256} for name, entry in hash_files(folder).items()}


def save_reference(folder: Path, reference: Mapping[str, np.ndarray[Any, Any]]) -> None:
    path = folder / REFERENCE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **reference)  # type: ignore[arg-type]


def measure(
    folder: Path, values: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, LatencyReport], LatencyReport]:
    """One call of every model file, and one whole image of the default model, on this machine."""
    write_manifest(folder, {**values, "files": _files(folder)})  # the measuring process opens the bundle by itself
    slow = ("decoder", "sampler") if "decoder" in values else ()  # seconds a call
    threads = values.get("threads")
    reports = {
        path: bench_model(folder / path, threads, *((1, 5) if entry["role"] in slow else ()))
        for path, entry in entries.items()
    }
    return reports, bench_image(folder, values["default_model"], threads)


def percentiles(report: LatencyReport) -> dict[str, float]:
    return {"p50": report.p50_ms, "p90": report.p90_ms, "p99": report.p99_ms}


def predict_here_ms(
    plan: Plan,
    spec: ModelSpec,
    entries: Mapping[str, Mapping[str, Any]],
    rows: int,
    decoder: DecoderCost | None = None,
) -> dict[str, float]:
    """What the cost model says of this machine's CPU for every file: to be compared with what was measured.

    One call of a denoiser is one evaluation, of a sampler or a decoder one image.
    """
    # Here, because the rest of this file also serves bundles joined from packs, without SciPy and without PyTorch.
    from kind_edge.budget.problem import Candidate, Deployment, Request, Sampling

    left = spec.without_branches(plan.dropped_branches)
    sampling = Sampling(plan.sampler, plan.steps, plan.guidance, rows)
    request = Request(load_profile(HOST), plan.classes, sampling, decoder=decoder)
    predicted = {}
    for path, entry in entries.items():
        if entry["role"] == "decoder":
            decoding = Deployment(left, request, Candidate(plan.form, entry["precision"], "cpu"))
            predicted[path] = 1e3 * decoding.decoder_latency_s(sustained=False)
            continue
        precisions = plan.matrix_precisions(entry["precision"])
        matrices = {
            shape.name: dataclasses.replace(plan.matrices[shape.name], precision=precisions[shape.name])
            for shape in left.matrices()
        }
        deployment = Deployment(left, request, Candidate(plan.form, entry["precision"], "cpu", plan.modulation))
        call_s = deployment.image_latency_s if entry["role"] == "sampler" else deployment.evaluation_latency_s
        predicted[path] = 1e3 * call_s(matrices, sustained=False)
    return predicted


def latency_gate(plan: Plan, device: DeviceProfile, image: LatencyReport) -> None:
    """On `host` a measured p90 over the limit fails; for other devices the solver has gated the prediction already."""
    limit_ns = plan.limits.get("max_latency")
    if device.name == HOST and limit_ns is not None and image.p90_ms * 1e6 > limit_ns:
        raise GateError(
            f"--max-latency: one image took {format_seconds(image.p90_ms / 1e3)} here (p90 of {image.runs}), "
            f"predicted {format_seconds(plan.sustained_image_latency_s)}, limit {format_seconds(limit_ns / 1e9)}; "
            "allow more time, fewer --steps, or a smaller --max-flops"
        )


def missing_bytes(plan: Plan, model_bytes: int, package_bytes: int, last: bool) -> int:
    """By how much prediction fell short of a model file, or of Core ML packages, that miss their limit; 0 where they
    keep it.

    Raises `GateError` where they must have fitted at `last`.
    """
    package_limit = float(plan.coreml.get("limit_bytes", float("inf")))
    written = (
        ("the model file takes", model_bytes, plan.weight_bytes, plan.limits.get("max_size", float("inf"))),
        ("the Core ML packages take", package_bytes, int(plan.coreml.get("app_bytes", 0)), package_limit),
    )
    whose = "--max-size" if "max_size" in plan.limits else "the store"
    short = [0]
    for what, size, predicted, limit in written:
        if size > limit and last:
            raise GateError(
                f"{whose}: {what} {format_bytes(size)}, {format_bytes(size - limit)} over the limit and more than "
                f"was predicted; plan again with --max-size {int(limit - (size - predicted)) // 1024}KiB, "
                "or give export the limit itself in place of --plan: then it plans until the file fits"
            )
        if size > limit:
            short.append(size - predicted)
    return max(short)


def draw_preview(folder: Path, manifest: Manifest) -> None:
    """preview.png: a row per class, drawn by the default model through ONNX Runtime. Latents have no picture."""
    if manifest.image.channels not in PICTURE_CHANNELS:
        return
    entry = manifest.models[manifest.default_model]
    decoder = manifest.decoder_for(entry)
    session = open_session(folder / decoder.path) if decoder else None
    loaded = LoadedBundle(manifest, entry, open_session(folder / entry.path), session)
    switches = "class_index" in entry.input_names()
    images = loaded.generate(manifest.classes if switches else None, PREVIEW_IMAGES, seed=0)
    labels = manifest.classes if switches else [" + ".join(manifest.classes)]
    save_grid(images, folder / "preview.png", columns=PREVIEW_IMAGES, labels=labels)


def write_texts(folder: Path, plan: Plan, values: Mapping[str, Any]) -> None:
    """plan.json, which can be replayed, the bundle's own README, and whose it is."""
    (folder / "plan.json").write_text(json.dumps(plan.to_dict(), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(bundle_readme(plan, values), encoding="utf-8")
    (folder / NOTICE).write_text(notice(values), encoding="utf-8")
    write_mac_program(folder, values)
    write_swift(folder, values)


def write_mac_program(folder: Path, values: Mapping[str, Any]) -> None:
    """Beside Core ML packages, what runs them on a Mac: Core ML itself predicts nowhere else."""
    if any(path.startswith("coreml/") for path in values["models"]):
        program = files("kind_edge.deploy").joinpath("templates", MAC_PROGRAM)
        (folder / MAC_PROGRAM).write_bytes(program.read_bytes())


def bundle_readme(plan: Plan, values: Mapping[str, Any]) -> str:
    """How to load the bundle; written from the manifest, so that names and shapes are true."""
    entry = values["models"][values["default_model"]]
    inputs = "\n".join(f"| `{i['name']}` | {i['dtype']} | {i['shape']} |" for i in entry["inputs"])
    classes = ", ".join(f"{index} {name}" for index, name in enumerate(plan.classes))
    sampler = values["sampler"]
    null = f", {sampler['null_index']} none (for guidance)" if sampler["null_index"] is not None else ""
    guidance, prediction = f"guidance {sampler['guidance']}", "its prediction"
    if plan.inside_guidance is not None:
        guidance = f"guidance {plan.inside_guidance:g} inside the model"
        prediction = "its prediction (guidance is inside the model: one evaluation per step, at this number of steps)"
    elif plan.evaluations_per_step > 1:
        prediction = "the guided prediction (null + guidance * (class - null))"
    first = f'"{plan.classes[0]}", ' if plan.form == "switch" else ""
    whole = next((path for path, each in values["models"].items() if each["role"] == "sampler"), None)
    small = [path for path in values["models"] if path.endswith(".ort")]
    once = _sampler_words(whole, values) if whole else _static_words(entry)
    picture = f"![images drawn by {values['default_model']}](preview.png)"
    if values["image"]["channels"] not in PICTURE_CHANNELS:
        picture = (
            "The model draws latents: pictures come from the decoder of the autoencoder it was trained with. "
            "Exported with `--autoencoder DIR`, it would be in this bundle."
        )
    pixels = "Pixels are (x + 1) * 127.5,\nclipped to 0..255."
    if "decoder" in values:
        pixels = _decoder_words(values, plan)
    healed = f"\nCut, then {values['healing']['told']}." if values.get("healing", {}).get("kept") else ""
    return f"""# {values["name"]}

{", ".join(plan.classes)} for {plan.profile}: {sampler["steps"]} {sampler["kind"]} steps, {guidance}.{healed}
Made by kind-edge {values["tools"]["kind_edge"]}. Licence of the weights: {values["licence"]}; of the data, and what the
model was made of: `NOTICE`.

{picture}

## Python

```python
import kind_edge
images = kind_edge.load_bundle(".").generate({first}n=4, seed=0)  # uint8 [4, H, W, channels]
```

This needs numpy and onnxruntime, no PyTorch. `kind-edge verify .` checks hashes and parity.
{app_words(values)}
## Any other ONNX Runtime (Android, iOS, C++, JavaScript)
{once}
Load `{values["default_model"]}`. Output `prediction` has the shape of `sample`. Inputs:

| input | type | shape |
|---|---|---|
{inputs}

Classes: {classes}{null}.

One image: start from Gaussian noise x. For every row i of `sampler.tables` in `manifest.json`, run the model at row i
and, with {prediction}, compute

    d = p[i] * x + q[i] * prediction
    x = a[i] * x + b[i] * d + c[i] * (d of the row before; 0 at first)

`step_index` is i; `timestep`, where the model has that input instead, is `timestep[i]`. {pixels}
An int8 model takes one image at a time: its activations share one range per call.
{_small_words(small) if small else ""}"""


def _decoder_words(values: Mapping[str, Any], plan: Plan) -> str:
    """How latents become pixels."""
    facts = values["decoder"]
    loop = ""
    if facts["tiles"] > 1:
        pieces = facts["tiles"] ** 2
        loop = f"\nIt works on {pieces} overlapping pieces one after the other and needs a runtime with control flow."
    return f"""The last x is
a latent: `{decoder_path(str(plan.decoder["precision"]))}` ({facts["autoencoder"]}) takes `latent` float32
{_shape(values["latent"])} and gives `image` {_shape(values["image"])} in 0..1, scaling included.{loop}"""


def _shape(size: Mapping[str, Any]) -> str:
    return f"[n, {size['channels']}, {size['height']}, {size['width']}]"


def _static_words(entry: Mapping[str, Any]) -> str:
    """Why a model for NPUs comes without a sampler."""
    if not PRECISIONS[entry["precision"]].static:
        return ""
    return f"""
The model is static, for NPUs: its batch is {entry["inputs"][0]["shape"][0]}, and class indices have 32 bits. A whole
sampler is not in the bundle, as NPUs have no control flow: the loop below is the app's.
"""


def _small_words(paths: list[str]) -> str:
    """For apps that build ONNX Runtime themselves."""
    return f"""
## A small build of ONNX Runtime

The same models in ORT format, optimised for the CPU already: {", ".join(f"`{path}`" for path in paths)}.
Any build of ONNX Runtime loads them, a minimal one with few operators as well:

    ./build.sh --config MinSizeRel --minimal_build --disable_ml_ops --disable_exceptions --disable_rtti \\
        --include_ops_by_config onnx/required_operators_and_types.config --enable_reduced_operator_type_support
"""


def _sampler_words(path: str, values: Mapping[str, Any]) -> str:
    """How an app draws an image with a single call."""
    names = [each["name"] for each in values["models"][path]["inputs"]]
    extra = [f"`class_index` int64 [n] (0 to {len(values['classes']) - 1})"] if "class_index" in names else []
    extra += [f"`guidance` float32 [] ({values['sampler']['guidance']:g})"] if "guidance" in names else []
    shape = _shape(values.get("latent", values["image"]))
    given = " and ".join([", ".join([f"Gaussian `noise` float32 {shape}", *extra[:-1]]), *extra[-1:]])
    made = f"`image` {_shape(values['image'])} in 0..1"
    return f"""
One call: `{path}` takes {given},
and gives {made}; all {values["sampler"]["steps"]} steps are in it. It needs a runtime with
control flow (ONNX Runtime on the CPU has it). Step by step, to show progress or to cancel:
"""
