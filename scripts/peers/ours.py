"""Our side: bundles of the shipped model at two and ten classes, and a model of DiT-B/2's shape with random weights."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.budget.plan import MatrixPlan
from kind_edge.model.shipped import DEFAULT_MODEL
from kind_edge.training.data import CLASS_NAMES
from peers.distance import CLASS_SETS, IMAGES, SEED, judged
from peers.models import LARGE, LARGE_CLASSES, cache, randomised, whole

PROFILE = "host"
LARGE_STEPS, LARGE_RANK, LARGE_TAILOR = 4, 154, 3


@dataclass(frozen=True)
class Variant:
    """A bundle: how many classes, at which precision, for how many steps, within which size of its file."""

    classes: int
    precision: str
    steps: int
    max_size: str | None = None

    @property
    def name(self) -> str:
        within = f" within {self.max_size}" if self.max_size else ""
        return f"kind-edge {self.precision}{within}, {self.steps} steps, {self.classes} classes"

    @property
    def folder(self) -> str:
        within = f"-{self.max_size}" if self.max_size else ""
        return f"{self.classes}-classes-{self.precision}{within}-{self.steps}-steps"


SMALL = {2: "1MB", 10: "2MB"}
VARIANTS = tuple(
    Variant(classes, precision, steps, SMALL[classes] if small else None)
    for classes in CLASS_SETS
    for precision, steps, small in (
        ("fp32", 4, False), ("int8", 4, False), ("fp32", 2, False), ("int8", 2, False), ("int8", 4, True),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A bundle of a variant; `files` role -> the file of the plan's precision."""

    variant: Variant
    path: Path
    files: dict[str, str]

    def sha256(self) -> str:
        return hashlib.sha256((self.path / self.files["denoiser"]).read_bytes()).hexdigest()


def export_variant(variant: Variant, folder: Path) -> Made:
    from kind_edge.deploy.manifest import read_manifest
    from kind_edge.deploy.pipeline import export

    bundle = export(
        DEFAULT_MODEL, profile=PROFILE, classes=CLASS_SETS[variant.classes], precision=variant.precision,
        steps=variant.steps, max_size=variant.max_size, output=folder / variant.folder,
    )  # fmt: skip
    models = read_manifest(bundle.path).models.values()
    return Made(variant, bundle.path, {m.role: m.path for m in models if m.precision == variant.precision})


def judge_variant(made: Made) -> dict[str, Any]:
    """What the judge says of its images, drawn as an app draws them."""
    from kind_edge.deploy.runtime import load_bundle

    names = CLASS_SETS[made.variant.classes]
    each, positions = IMAGES // len(names), [CLASS_NAMES.index(name) for name in names]
    images = load_bundle(made.path, made.files["denoiser"]).generate(names, each, SEED)
    return judged(images, np.repeat(positions, each))


# --- DiT-B/2 ----------------------------------------------------------------------------------------------------------

LARGE_MODELS = (
    ("factored", 2, "fp32"), ("factored", 2, "int8"), ("factored", 10, "fp32"), ("factored", 10, "int8"),
    ("dense", 2, "int8"),
)  # fmt: skip
"""How the matrices are stored, classes, precision."""


def large_files(storage: str, classes: int) -> dict[str, Path]:
    """precision -> the denoiser of a random model: rank 154 or dense, and tailors of rank 3; modulation is baked."""
    import torch

    from kind_edge.registry import exporter

    name = f"{LARGE.replace('/', '-')}-{storage}-{classes}-classes-{_code_key()}-torch-{torch.__version__}"
    folder = cache() / "ours" / name
    found = {precision: folder / f"denoiser.{precision}.onnx" for precision in ("fp32", "int8")}
    if not all(path.exists() for path in found.values()):
        folder.mkdir(parents=True, exist_ok=True)
        files = exporter("onnx").export(_large_plain(storage, classes), folder, tuple(found))
        written = {file.precision: folder / file.path for file in files if file.entry["role"] == "denoiser"}
        for precision, path in found.items():
            whole(path, lambda target, source=written[precision]: source.replace(target))  # type: ignore[misc]
    return found


def _code_key() -> str:
    """Changes with whatever may change an exported file."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for name in ("model", "deploy", "exporters"):
        package = importlib.import_module(f"kind_edge.{name}")
        for path in sorted(Path(package.__path__[0]).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _large_plain(storage: str, classes: int) -> Any:
    import torch

    from kind_edge.deploy.merge import fold
    from kind_edge.deploy.pipeline import plan
    from kind_edge.deploy.sampler_table import sampler_table
    from kind_edge.model.checkpoint import Checkpoint
    from kind_edge.model.dit import DiT
    from kind_edge.model.spec import named_spec

    spec = named_spec(LARGE, classes, learned_sigma=False, label_embedding=False, objective="flow")
    learngene = LARGE_RANK - LARGE_TAILOR
    spec = dataclasses.replace(
        spec, factored=True, learngene_rank=learngene, tailor_rank=LARGE_TAILOR, step_counts=(LARGE_STEPS,),
        inside_guidance=1.75,
    )  # fmt: skip
    names = tuple(f"class {index}" for index in range(classes))
    checkpoint = Checkpoint(spec, names, randomised(DiT(spec)).state_dict(), {})
    matrix = MatrixPlan("dense" if storage == "dense" else "factored", "fp32", learngene, LARGE_TAILOR)
    base = plan(DEFAULT_MODEL, profile="snapdragon8g3", form="switch", precision="fp32", steps=LARGE_STEPS)
    # A latent model has no sampler.onnx without a decoder; only the denoiser is compared here.
    own = dataclasses.replace(base, classes=names, matrices={shape.name: matrix for shape in spec.matrices()})
    table = sampler_table(own.sampler, spec.objective, own.steps)
    return fold(checkpoint, own, torch.from_numpy(table.timestep))


def large_about() -> str:
    return f"{LARGE}, {LARGE_CLASSES} classes, rank {LARGE_RANK} with tailors of {LARGE_TAILOR}"
