"""Core ML: packages for Xcode, at the plan's precision: `Denoiser`, and for models of few steps the whole `Sampler`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kind_edge._version import __version__
from kind_edge.budget.coreml import MOST_UNROLLED, Packaging
from kind_edge.budget.coreml_weights import TARGETS, WEIGHTS, Target, Weights
from kind_edge.budget.precision import PRECISIONS
from kind_edge.errors import UsageError
from kind_edge.exporters.coreml_choices import (
    Batch,
    Functions,
    batches,
    check_functions,
    check_weights,
    class_sets,
)
from kind_edge.exporters.coreml_functions import add_functions
from kind_edge.exporters.coreml_package import Description, package_bytes, save_package, weight_bytes
from kind_edge.exporters.coreml_tools import require_coremltools
from kind_edge.model.provenance import data_words
from kind_edge.registry import Arrays, ExportedFile, Interpreter

if TYPE_CHECKING:
    from kind_edge.deploy.plain import PlainDiT
    from kind_edge.exporters.coreml_convert import Interface
    from kind_edge.exporters.coreml_graph import Denoiser, Sampler
    from kind_edge.model.spec import ModelSpec

FOLDER = "coreml"
DECODER_FP32 = ("reduce_mean", "reduce_sum", "square", "sub", "rsqrt", "real_div", "instance_norm", "softmax")
"""Group normalisation, which adds up the squares of large groups: fp16 would overflow there."""

_FEATURES = {
    "sample": "Noisy images, [batch, channels, height, width]",
    "step_index": "Row of the sampler's table, 0 first",
    "timestep": "Timestep of the sampler's row, in the objective's own scale",
    "class_index": "Class of every image, by the order of the classes",
    "prediction": "What the sampler's row makes the next sample from",
    "noise": "Gaussian noise, [batch, channels, height, width]",
    "latent": "Latents in the network's scale, [batch, channels, height, width]; of one tile where there are several",
    "image": "Images with values from 0 to 1, [batch, channels, height, width]",
}


_WHAT = {
    "Denoiser": "one evaluation of the diffusion transformer",
    "Sampler": "draws an image in one call",
    "Decoder": "makes a picture of latents",
}


@dataclass(frozen=True)
class _Made:
    """A converted program: `name` of the package, the `MLModel` in fp16."""

    name: str
    program: Any
    interface: Interface


@dataclass(frozen=True)
class CoreMLExporter:
    """Writes `coreml/Denoiser.mlpackage`, `coreml/Sampler.mlpackage` where a model of pixels is done in few steps
    without a guidance branch, and `coreml/Decoder.mlpackage` of a model of latents whose autoencoder was given.

    `target`: the oldest system that runs them. `layout`: "auto" is *channels* for plans of the Neural Engine, else
    *tokens*. `weights`: "auto" is what the plan's precision is in Core ML. `functions`: class packs.
    `on_progress` is told (done, total) of weights while palettes are found.
    """

    name: str = "coreml"
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    target: Target = "iOS18"
    layout: Literal["auto", "tokens", "channels"] = "auto"
    batch: Batch = "fixed"
    weights: Weights | Literal["auto"] = "auto"
    functions: Functions = ()
    on_progress: Callable[[int, int], None] | None = field(default=None, compare=False)

    def check(self, spec: ModelSpec) -> None:
        """Every model has its place in Core ML; not every choice has one at every target."""
        if self.target not in TARGETS or self.weights not in ("auto", *WEIGHTS):
            raise UsageError(f"Core ML: got target {self.target} and weights {self.weights}")
        if self.weights != "auto":
            check_weights(self.weights, self.target)
        check_functions(self.functions, self.target)
        require_coremltools()

    def export(self, model: PlainDiT, folder: Path, precisions: tuple[str, ...]) -> tuple[ExportedFile, ...]:
        """One set of packages, at the plan's own precision: what an app has in it. `precisions` says no more."""
        self.check(model.spec)
        from kind_edge.exporters.coreml_compress import forget_clusters
        from kind_edge.exporters.coreml_convert import convert, interface_of
        from kind_edge.exporters.coreml_graph import Denoiser

        plan = model.origin.plan
        packaging = Packaging(self.target, self.weights, self.layout)
        layout, weights = packaging.layout_on(plan.unit), packaging.weights_of(plan.precision)
        if self.functions and not model.switches:
            raise UsageError("--coreml-function: this plan has its classes folded in; take --form switch")
        sets = class_sets(self.functions, plan.classes, plan.null_branch)
        denoiser = Denoiser(model, layout, mapped=bool(self.functions))
        try:
            sizes = batches(self.target, self.batch, plan.evaluations_per_step)
            interface = interface_of(denoiser)
            program = convert(denoiser, interface, self.target, sizes)
            chosen = self._bits(denoiser, program, model, weights)
            made = [_Made("Denoiser", program, interface)]
            if (sampler := _sampler(model, denoiser)) is not None:
                interface = interface_of(sampler)
                sizes = batches(self.target, self.batch, 1)
                made.append(_Made("Sampler", convert(sampler, interface, self.target, sizes), interface))
            facts = {"target": self.target, "layout": layout}
            written = [self._write(model, folder, each, chosen, weights, facts, sets) for each in made]
            if (decoder := self._decoder(model)) is not None:
                kept = weights if weights == "fp16" else "int8"  # a picture shows what a prediction forgives
                written.append(self._write(model, folder, decoder, kept, kept, {"target": self.target}, {}))
            return tuple(written)
        finally:
            forget_clusters()

    def _decoder(self, model: PlainDiT) -> _Made | None:
        """What makes pictures of latents, where an autoencoder was given. It takes one image at a time; where the plan
        decodes in tiles, one tile: the app goes through them, so that no more than one is in memory."""
        autoencoder = model.origin.autoencoder
        if autoencoder is None:
            return None
        from kind_edge.deploy.decoder import tile_count
        from kind_edge.exporters.coreml_convert import Interface, convert

        size = autoencoder.tiles(tile_count(model.origin.plan)).size
        side, latent = size * model.spec.pixels_per_latent, (model.spec.channels, size, size)
        interface = Interface({"latent": ("float32", latent)}, "image", (autoencoder.image_channels, side, side))
        return _Made("Decoder", convert(autoencoder.decoder, interface, self.target, (1,), DECODER_FP32), interface)

    def _bits(self, denoiser: Denoiser, converted: Any, model: PlainDiT, weights: Weights) -> Weights | dict[str, int]:
        if weights != "mixed":
            return weights
        from kind_edge.exporters.coreml_mixed import mixed_bits

        return mixed_bits(denoiser, converted, model.origin, self.target, self.on_progress)

    def _write(
        self,
        model: PlainDiT,
        folder: Path,
        made: _Made,
        chosen: Weights | Mapping[str, int],
        weights: Weights,
        facts: Mapping[str, str],
        sets: Mapping[str, tuple[int, ...]],
    ) -> ExportedFile:
        """Compress, describe and save one package."""
        from kind_edge.exporters.coreml_compress import compress

        compressed = compress(made.program, chosen, self.target, self.on_progress)
        described = _description(made.name, model, dict(self.functions) if sets else {})
        path = f"{FOLDER}/{made.name}.mlpackage"
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        if sets:
            with tempfile.TemporaryDirectory(prefix="kind-edge-") as temporary:
                single = Path(temporary, "single.mlpackage")
                save_package(compressed, single, described)
                save_package(add_functions(single, sets, Path(temporary)), folder / path, described)
        else:
            save_package(compressed, folder / path, described)
        entry: dict[str, Any] = {"role": made.name.lower(), "precision": weights, **made.interface.to_dict(), **facts}
        entry |= {"package_bytes": package_bytes(folder / path), "weight_bytes": weight_bytes(folder / path)}
        if isinstance(chosen, Mapping):
            entry["bits"] = dict(chosen)
        if sets:
            entry["functions"] = {name: list(classes) for name, classes in self.functions}
        return ExportedFile(path, weights, entry)

    def open(self, path: Path) -> Interpreter:
        """Runs the saved package in NumPy: Core ML itself runs on Apple's systems alone.

        "Denoiser.mlpackage#shoes" is a function of it.
        """
        import numpy as np

        from kind_edge.exporters.mil_reference import open_package

        package, _, function = path.name.partition("#")
        run = open_package(path.with_name(package), function or None)

        def with_32_bits(inputs: Arrays) -> Any:
            """Core ML has no 64-bit integers."""
            return run({n: a.astype(np.int32) if a.dtype == np.int64 else a for n, a in inputs.items()})

        return with_32_bits


def _sampler(model: PlainDiT, denoiser: Denoiser) -> Sampler | None:
    """All steps in one call, where that is possible."""
    from kind_edge.deploy.sampler_table import sampler_table
    from kind_edge.exporters.coreml_graph import Sampler

    plan = model.origin.plan
    table = sampler_table(plan.sampler, model.spec.objective, plan.steps)
    few = len(table.timestep) <= MOST_UNROLLED and plan.evaluations_per_step == 1
    return Sampler(denoiser, table) if few and model.spec.pixels_per_latent == 1 else None


def _description(name: str, model: PlainDiT, functions: Mapping[str, tuple[str, ...]]) -> Description:
    """What Xcode shows, and in `facts` what an app needs to know."""
    from kind_edge.deploy.sampler_table import sampler_table

    plan, spec, told = model.origin.plan, model.spec, model.origin.lineage()
    classes = ", ".join(f"{index} {label}" for index, label in enumerate(plan.classes))
    null = len(plan.classes) if plan.null_branch else None
    numbered = classes + (f", {null} none (for guidance)" if null is not None else "")
    what = _WHAT[name]
    features = {**_FEATURES, "class_index": f"{_FEATURES['class_index']}: {numbered}"}
    facts = {
        "classes": json.dumps(list(plan.classes)),
        "steps": str(plan.steps),
        "sampler": plan.sampler,
        "guidance": str(plan.guidance if plan.evaluations_per_step > 1 else 1.0),
        "null_index": "" if null is None else str(null),
        "sampler_tables": json.dumps(sampler_table(plan.sampler, spec.objective, plan.steps).to_dict()),
        "checkpoint_sha256": plan.checkpoint_sha256,
        **({"author": told["author"]} if "author" in told else {}),
        **({"training_data": "; ".join(map(data_words, told["data"]))} if "data" in told else {}),
    }
    if functions:
        facts["functions"] = json.dumps({label: list(names) for label, names in functions.items()})
    short = f"{plan.model}: {what}. {plan.steps} {plan.sampler} steps. Classes: {classes}."
    return Description(short, f"kind-edge {__version__}", told["licence"], plan.checkpoint_sha256[:12], features, facts)


EXPORTER = CoreMLExporter()
