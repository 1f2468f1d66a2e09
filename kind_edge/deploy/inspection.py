"""What lies in a checkpoint, a bundle or an ONNX file: size, shape, work, classes, where it comes from."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kind_edge.bounded import well_formed
from kind_edge.deploy.graph_facts import GraphFacts, graph_facts
from kind_edge.errors import InputError

if TYPE_CHECKING:
    from kind_edge.deploy.manifest import Manifest
    from kind_edge.model.spec import ModelSpec

_PARTS = {
    "patch_embed": "patch embedding",
    "pos_embed": "position table",
    "t_embed": "timestep network",
    "span_embed": "span network",
    "y_embed": "label embedding",
    "final": "final layer",
    "shared": "learngenes",
}

_SHOWN_APART = ("matrix_ranks", "step_counts", "inside_guidance")
"""Of a spec, what is no part of `shape`."""


@dataclass(frozen=True)
class Inspection:
    """`parts` are bytes by part (of a bundle by file), `class_bytes` those of one class's tailors, `parameters` all
    stored values, `active_parameters` what one image of a class sees.

    `flops` are one evaluation at batch 1 by convention: "paper" and "exact" where the architecture is known; of any
    other ONNX file "paper", counted in its graph, and all "products", attention's too. `ranks` are (lowest, highest)
    over the factored matrices. `step_counts` (of a bundle the one it was made for) and `inside_guidance` are a
    distilled model's.
    """

    kind: Literal["checkpoint", "bundle", "onnx"]
    name: str
    path: str
    sha256: str
    size_bytes: int
    parameters: int
    active_parameters: int | None
    flops: Mapping[str, int]
    parts: Mapping[str, int]
    classes: tuple[str, ...]
    ranks: Mapping[str, tuple[int, int]]
    shape: Mapping[str, Any]
    graphs: tuple[GraphFacts, ...]
    provenance: Mapping[str, Any]
    step_counts: tuple[int, ...] = ()
    inside_guidance: float | None = None
    class_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; what this kind of thing does not have is left out."""
        values = dataclasses.asdict(self)
        values["graphs"] = {graph.file: {**dataclasses.asdict(graph), "flops": graph.flops} for graph in self.graphs}
        return {key: value for key, value in values.items() if value not in (None, (), {})}


def inspect(path: str | Path) -> Inspection:
    """Look into a checkpoint's folder (or a shipped model by name), a bundle (folder or `.zip`), or an `.onnx` file.

    Hashes of a bundle are checked, tensors of a checkpoint compared with its configuration. Raises `InputError` for
    anything that is none of these, or is damaged.
    """
    from kind_edge.model.shipped import find_model

    place = Path(path)
    if place.suffix == ".onnx" and not place.is_dir():
        return _inspect_onnx(place)
    if place.suffix == ".zip" or (place / "manifest.json").is_file():
        with well_formed(f"{place}: manifest.json"):
            return _inspect_bundle(place)
    if place.is_file():
        raise InputError(f"{place}: want a checkpoint's folder, a bundle (folder or .zip) or an .onnx file")
    if place.is_dir() and not (place / "config.json").is_file():
        raise InputError(
            f"{place}: neither a checkpoint nor a bundle: it has no config.json and no manifest.json; "
            "for a model file, name the .onnx itself"
        )
    return _inspect_checkpoint(find_model(path))


def _inspect_onnx(path: Path) -> Inspection:
    from kind_edge.deploy.bundle import hash_file

    facts = graph_facts(path)
    return Inspection(
        kind="onnx",
        name=path.stem,
        path=str(path),
        sha256=hash_file(path),
        size_bytes=facts.size_bytes,
        parameters=facts.parameters,
        active_parameters=None,
        flops={"paper": facts.paper_flops, "products": facts.flops},
        parts=facts.part_bytes or facts.constant_bytes,
        classes=(),
        ranks={},
        shape={},
        graphs=(facts,),
        provenance=facts.metadata,
        class_bytes=_class_bytes(facts),
    )


def _class_bytes(graph: GraphFacts) -> int | None:
    return graph.part_bytes["tailors"] // graph.tailor_classes if graph.tailor_classes else None


def _inspect_bundle(path: Path) -> Inspection:
    from kind_edge.deploy.bundle import hash_file, open_bundle, verified_manifest

    with open_bundle(path) as folder:
        manifest = verified_manifest(folder, str(path))
        files = [file for file in manifest.models if file.endswith(".onnx")]
        graphs = tuple(graph_facts(folder / file, file) for file in files)
        digest = hash_file(folder / "manifest.json")
    plan = manifest.raw.get("plan") or {}
    default = next((graph for graph in graphs if graph.file == manifest.default_model), None)
    return Inspection(
        kind="bundle",
        name=manifest.name,
        path=str(path),
        sha256=digest,
        size_bytes=sum(entry.size_bytes for entry in manifest.files.values()),
        parameters=plan.get("params", default.parameters if default else 0),
        active_parameters=None,
        flops={
            **({"paper": default.paper_flops} if default and default.file.startswith("onnx/denoiser") else {}),
            **({"exact": plan["flops"]} if "flops" in plan else {}),
        },
        parts={file: entry.size_bytes for file, entry in manifest.files.items()},
        classes=manifest.classes,
        ranks=_planned_ranks(plan.get("matrices", {})),
        shape=_bundle_shape(manifest, plan),
        graphs=graphs,
        provenance=_bundle_provenance(manifest),
        step_counts=(manifest.sampler.steps,) if manifest.sampler.inside_guidance is not None else (),
        inside_guidance=manifest.sampler.inside_guidance,
        class_bytes=_class_bytes(default) if default else None,
    )


def _planned_ranks(matrices: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    names = {"learngene": "learngene_rank", "tailor": "tailor_rank", "rank": "rank"}
    found = {name: [m[key] for m in matrices.values() if key in m] for name, key in names.items()}
    return {name: (min(ranks), max(ranks)) for name, ranks in found.items() if ranks}


def _bundle_shape(manifest: Manifest, plan: Mapping[str, Any]) -> dict[str, Any]:
    """How an image is made, and for what."""
    image, sampler = manifest.image, manifest.sampler
    planned = {key: plan[key] for key in ("profile", "form", "unit", "precision") if key in plan}
    return {
        **planned,
        **{key: plan["resize"][key] for key in ("depth", "width") if plan.get("resize")},
        "image": f"{image.channels} x {image.height} x {image.width}",
        "default_model": manifest.default_model,
        "sampler": sampler.kind,
        "steps": sampler.steps,
        **({"guidance": sampler.guidance} if sampler.inside_guidance is None else {}),
        "evaluations": len(sampler.tables) * (2 if sampler.guided else 1),
    }


def _bundle_provenance(manifest: Manifest) -> dict[str, Any]:
    raw = manifest.raw
    shown = ("source", "licence", "provenance", "tools", "verification", "quality", "healing")
    return {key: raw[key] for key in shown if key in raw}


def _inspect_checkpoint(folder: Path) -> Inspection:
    from kind_edge.budget.cost import CONVENTIONS, model_cost
    from kind_edge.deploy.sensitivity_file import SENSITIVITY
    from kind_edge.model.checkpoint import CALIBRATION, HELDOUT, checkpoint_hash, load_checkpoint, weight_files

    checkpoint = load_checkpoint(folder)
    spec = checkpoint.spec
    parts: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        parts[_part(name)] += tensor.numel() * tensor.element_size()
    for name, file in (("calibration", CALIBRATION), ("held-out images", HELDOUT), ("sensitivity", SENSITIVITY)):
        if (folder / file).is_file():
            parts[name] = (folder / file).stat().st_size
    costs = {convention: model_cost(spec, convention) for convention in CONVENTIONS}
    return Inspection(
        kind="checkpoint",
        name=folder.resolve().name,
        path=str(folder),
        sha256=checkpoint_hash(folder),
        size_bytes=sum(file.stat().st_size for file in weight_files(folder)),
        parameters=sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values()),
        active_parameters=costs["exact"].params,
        flops={convention: cost.flops for convention, cost in costs.items()},
        parts=dict(parts.most_common()),
        classes=checkpoint.class_names,
        ranks=_ranks(spec),
        shape={key: value for key, value in spec.to_dict().items() if key not in _SHOWN_APART},
        graphs=(),
        provenance=checkpoint.provenance,
        step_counts=spec.step_counts,
        inside_guidance=spec.inside_guidance,
        class_bytes=parts["tailors"] // spec.num_classes if parts["tailors"] else None,
    )


def _part(tensor: str) -> str:
    """The part of a model that a tensor belongs to, in the words of the checkpoint contract."""
    if ".learngene." in tensor:
        return "learngenes"
    if ".tailors." in tensor:
        return "tailors"
    if ".adaln." in tensor:
        return "adaLN"
    first = tensor.split(".")[0]
    if first in _PARTS:
        return _PARTS[first]
    return "biases" if tensor.endswith(".bias") else "dense matrices"


def _ranks(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    if not spec.factored or not spec.branches():
        return {}
    ranks = [spec.ranks(matrix.name) for matrix in spec.matrices()]
    learngenes, tailors = [r.learngene for r in ranks], [r.tailor for r in ranks]
    return {"learngene": (min(learngenes), max(learngenes)), "tailor": (min(tailors), max(tailors))}
