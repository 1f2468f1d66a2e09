"""What a smaller model costs: quality against FLOPs, truncated without retraining, healed, and trained dense.

The active rank of every matrix is cut to 85, 70, 55 and 40 % (learngene and tailor alike):
whitened  by the SVD that minimises the error of each layer's output
plain     by the SVD of the folded weight
planned   whitened too, but the planner shares out the ranks, under the FLOPs of the uniform cut
healed    whitened, then trained on for 300 steps
dense     an ordinary DiT, narrowed to those FLOPs and trained from scratch on as many images as the model
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kind_edge.budget.cost import deployed_fixed_cost, matrix_cost
from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.deploy.merge import truncate
from kind_edge.deploy.pipeline import plan as make_plan
from kind_edge.deploy.quality import heldout_quality
from kind_edge.deploy.request import OpenedModel, open_model
from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import CONFIG, Checkpoint, load_checkpoint
from kind_edge.model.sampling import make_scheduler
from kind_edge.model.spec import ModelSpec
from kind_edge.training.config import TrainConfig
from kind_edge.training.evaluate import Judge
from kind_edge.training.heal import heal_config, train_from
from kind_edge.training.sampled import judged_labels, sample_checkpoint, sampling_of
from kind_edge.training.state import STATE
from kind_edge.training.train import train
from studies.decomposition import labelled_figures
from studies.progress import tell
from studies.store import Record, Store, Subject

NAME = "anysize"
PERCENTS = (85, 70, 55, 40)
PROFILE = "snapdragon8g3"
"""Any profile does: FLOPs are the same on all, and no other limit is set."""

TRAINED = ("healed", "dense")
METHODS = ("full", "planned", "whitened", "plain", *TRAINED)
"""In the order of tables."""

Matrices = Mapping[str, MatrixPlan]


class AnySize:
    """One model at several sizes."""

    def __init__(self, subject: Subject, folder: Path, images: int, seeds: Sequence[int]) -> None:
        self.model: OpenedModel = open_model(subject.folder)
        self.store = Store(folder, NAME, subject)
        self.judge = Judge.load()
        self.names = judged_labels(self.model.checkpoint.class_names)
        self.sampling = sampling_of(self.model.checkpoint)
        self.weights_folder = folder / "weights" / subject.weights_sha256[:12]
        self.subject, self.images, self.seeds = subject, images, seeds
        self._plans: dict[int, Plan] = {}
        self.base = make_plan(subject.folder, profile=PROFILE, precision="fp32", form="switch")

    def run(self, methods: Sequence[str] = ("whitened", "plain", "planned")) -> list[Record]:
        """Every run, seed by seed, so that an early end leaves whole curves."""
        if self.model.checkpoint.spec.distilled and set(methods) & set(TRAINED):
            raise UsageError(
                f"{self.subject.name} is distilled, and no training on images goes on from there; --checkpoint takes "
                "the model that it was distilled from"
            )
        for seed in self.seeds:
            self._judged("full", 100, seed)
            for percent in PERCENTS:
                for method in methods:
                    self._judged(method, percent, seed)
        for percent in PERCENTS:
            for method in methods:
                if method not in TRAINED:
                    self._heldout(method, percent)
        return self.store.finished()

    def at_size(self, method: str, percent: int) -> Checkpoint:
        """The model, whole (100) or truncated."""
        return self.model.checkpoint if percent == 100 else self._truncated(method, percent)

    def _heldout(self, method: str, percent: int) -> None:
        def compute() -> dict[str, Any]:
            heldout = self.model.heldout
            if heldout is None:
                return {}
            full, kept = self.model.checkpoint, list(range(self.model.checkpoint.spec.num_classes))
            cut = self._truncated(method, percent)
            found = heldout_quality(full, cut, "switch", kept, heldout, timesteps_of(full))
            changes = {each.name: each.change for each in found}
            null = {"null_heldout_change": changes.pop("null")} if "null" in changes else {}
            return {"heldout_change": float(np.mean([*changes.values()])), **null}

        self.store.run(f"{method}-{percent}-heldout", self._size(method, percent) | {"kind": "heldout"}, compute)

    def _judged(self, method: str, percent: int, seed: int) -> None:
        sampling = dataclasses.asdict(self.sampling)
        judge = {"judge_sha256": self.judge.judge_sha256}
        size = self._size(method, percent)
        conditions = {"kind": "judged", **size, "images": self.images, "seed": seed, **sampling, **judge}
        self.store.run(f"{method}-{percent}-seed{seed}", conditions, partial(self._judge, method, percent, seed))

    def _judge(self, method: str, percent: int, seed: int) -> dict[str, Any]:
        make: Callable[[], Checkpoint] = {
            "healed": lambda: self._healed(percent, seed),
            "dense": lambda: self._dense(percent, seed),
        }.get(method, lambda: self.at_size(method, percent))
        sampling = self.sampling
        sampled = sample_checkpoint(
            make(), self.images, seed, sampling.steps, sampling.guidance, sampler=sampling.sampler
        )
        return labelled_figures(self.judge, sampled, self.names)

    def _size(self, method: str, percent: int) -> dict[str, Any]:
        """What a model of this size is: its FLOPs for one evaluation with modulation from a table, and its ranks."""
        spec = self.model.checkpoint.spec
        if method == "dense":
            dense = self.dense_spec(percent)
            return {"method": method, "percent": percent, "flops": dense_flops(dense, self.base), "width": dense.width}
        matrices = self._matrices(method, percent)
        flops = self._planned(percent).flops if method == "planned" else deployed_flops(spec, matrices, self.base)
        return {"method": method, "percent": percent, "flops": flops, "ranks": _ranks_text(matrices)}

    def _matrices(self, method: str, percent: int) -> Matrices:
        return self._planned(percent).matrices if method == "planned" else uniform(self.model.checkpoint.spec, percent)

    def _planned(self, percent: int) -> Plan:
        """What the planner makes of the FLOPs of the uniform cut."""
        if percent not in self._plans:
            spec = self.model.checkpoint.spec
            limit = f"{deployed_flops(spec, uniform(spec, percent), self.base)}FLOPs"
            self._plans[percent] = make_plan(
                self.subject.folder, profile=PROFILE, precision="fp32", form="switch", max_flops=limit
            )
        return self._plans[percent]

    def _truncated(self, method: str, percent: int) -> Checkpoint:
        plan = dataclasses.replace(self.base, matrices=self._matrices(method, percent))
        whole = self.model.checkpoint
        if method == "plain":  # an SVD, also of what is nested
            return truncate(dataclasses.replace(whole, spec=dataclasses.replace(whole.spec, nested=False)), plan, None)
        return truncate(whole, plan, self.model.calibration)

    def _healed(self, percent: int, seed: int) -> Checkpoint:
        provenance = self.model.checkpoint.provenance
        start = dataclasses.replace(self._truncated("whitened", percent), provenance=provenance)
        folder = self.weights_folder / f"healed-{percent}-seed{seed}"
        if not (folder / CONFIG).exists():
            train_from(start, heal_config(start, seed=seed), folder, on_progress=tell)
        return load_checkpoint(folder)

    def _dense(self, percent: int, seed: int) -> Checkpoint:
        original = TrainConfig.from_dict(self.model.checkpoint.provenance["config"], "provenance: config")
        config = dataclasses.replace(original, spec=self.dense_spec(percent), seed=seed)
        folder = self.weights_folder / f"dense-{percent}-seed{seed}"
        if not (folder / CONFIG).exists():
            train(config, folder, resume=(folder / STATE).exists(), on_progress=tell)
        return load_checkpoint(folder)

    def dense_spec(self, percent: int) -> ModelSpec:
        """The ordinary DiT, with a label embedding, whose FLOPs come closest to those of the uniform cut."""
        spec = self.model.checkpoint.spec
        target = deployed_flops(spec, uniform(spec, percent), self.base)
        step = np.lcm(spec.heads, 4)
        widths = [int(width) for width in range(step, 2 * spec.width, step)]
        narrow = [dataclasses.replace(spec.dense(), width=width, label_embedding=True) for width in widths]
        return min(narrow, key=lambda dense: abs(dense_flops(dense, self.base) - target))


def timesteps_of(checkpoint: Checkpoint) -> Tensor:
    """Those of the sampling that the checkpoint recommends."""
    advice = sampling_of(checkpoint)
    timesteps: Tensor = make_scheduler(advice.sampler, checkpoint.spec.objective, advice.steps).timesteps
    return timesteps


def uniform(spec: ModelSpec, percent: int) -> Matrices:
    """Every matrix at that share of its learngene rank and of its tailor rank, at least one of each there is."""

    def cut(rank: int) -> int:
        return min(rank, max(1, round(rank * percent / 100)))

    ranks = {shape.name: spec.ranks(shape.name) for shape in spec.matrices()}
    return {name: MatrixPlan("factored", "fp32", cut(own.learngene), cut(own.tailor)) for name, own in ranks.items()}


def deployed_flops(spec: ModelSpec, matrices: Matrices, base: Plan) -> int:
    """One evaluation at batch 1, modulation from a table; each learngene dense where that is cheaper."""
    kept = len(base.classes)
    total = deployed_fixed_cost(spec, kept, base.steps, True, "fp32").flops
    for shape in spec.matrices():
        own = matrices[shape.name]
        tailor = matrix_cost(spec, shape, "dropped", 0, own.tailor_rank or 0, kept, "fp32").flops
        shared = [matrix_cost(spec, shape, way, own.shared_rank, 0, 0, "fp32").flops for way in ("dense", "factored")]
        total += min(shared) + tailor
    return total


def dense_flops(spec: ModelSpec, base: Plan) -> int:
    """The same of an ordinary DiT."""
    parts = [matrix_cost(spec, shape, "dense", 0, 0, 0, "fp32").flops for shape in spec.matrices()]
    return deployed_fixed_cost(spec, len(base.classes), base.steps, True, "fp32").flops + sum(parts)


def _ranks_text(matrices: Matrices) -> str:
    """ "34 + 6", or the smallest and largest of each: "12-48 + 3-8"."""

    def span(ranks: Sequence[int]) -> str:
        return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)}-{max(ranks)}"

    learngene = span([own.shared_rank for own in matrices.values()])
    return f"{learngene} + {span([own.tailor_rank or 0 for own in matrices.values()])}"
