"""Does the sensitivity table foresee what a cut costs? Random plans, predicted and measured on held-out images.

Plans: learngene and tailor rank of every matrix drawn apart, then scaled together until the FLOPs are at a level.
Measured: the increase of the diffusion loss over all held-out images, at fixed noises and times, one tenth of it with
every gate closed; of a distilled model, the deviation from its own uncut prediction as a share of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from kind_edge.budget.plan import MatrixPlan
from kind_edge.budget.sensitivity import LossModel, loss_model
from kind_edge.deploy.pipeline import plan as make_plan
from kind_edge.deploy.probe import NULL_SHARE
from kind_edge.deploy.request import OpenedModel, open_model
from kind_edge.errors import UsageError
from kind_edge.model.calibration import Calibration
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.diffusion import add_noise, draw_timesteps
from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.sampling import denoiser, step_span
from kind_edge.model.spec import ModelSpec, Ranks
from kind_edge.model.truncation import FoldedMatrix, fold_matrix
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import Sampling, draw, draw_noise, judged_labels, sampling_of, spread
from studies.anysize import Matrices, deployed_flops, timesteps_of, uniform
from studies.statistics import in_percent, markdown, paragraph
from studies.steps import teacher_of
from studies.store import Record, Store, Subject

NAME = "prediction"
PROFILE = "snapdragon8g3"
"""Any does: nothing is limited, and nothing timed."""

LEVELS = (0.30, 0.40, 0.55, 0.20)
"""FLOPs, as shares of the dense model's; every plan is within TOLERANCE of its level. Each has a seed, its position."""
TOLERANCE = 0.02
PLANS = 40
PER_CLASS = 25
"""Held-out images."""
PERCENT = 55
"""Of the active rank: where whitened and plain truncation are compared."""

WAYS = {"shared_out": "shared out", "whitened": "whitened", "whitened_svd": "whitened SVD"}
"""Of cutting with an eye on activations, by their names in tables."""

FloatArray = NDArray[np.float64]

TARGETS = {"spearman": 0.95, "spearman_within": 0.8, "plain_over_whitened": 3.0, "plain_over_shared_out": 3.0}


def run(subject: Subject, output: Path) -> list[Record]:
    """Of the model and, if it is distilled, of its teacher."""
    return [record for each in family(subject) for record in Prediction(each, output).run()]


def family(subject: Subject) -> list[Subject]:
    """The model and, if it is distilled, its teacher."""
    return [subject] if subject.teacher_sha256 is None else [subject, teacher_of(subject.teacher_sha256)]


class Prediction:
    """One model, its random plans, and what they cost."""

    def __init__(self, subject: Subject, output: Path) -> None:
        self.store, self.subject = Store(output, NAME, subject), subject
        self.model: OpenedModel = open_model(subject.folder)
        self.spec = self.model.checkpoint.spec
        self.base = make_plan(subject.folder, profile=PROFILE, precision="fp32", form="switch")

    @cached_property
    def heldout(self) -> FixedHeldout:
        return FixedHeldout.of(self.model)

    @cached_property
    def predicted(self) -> LossModel:
        model = self.model
        everyone = list(range(self.spec.num_classes))
        return loss_model(model.checkpoint, everyone, "switch", model.calibration, model.sensitivity)

    @cached_property
    def folded(self) -> dict[str, FoldedMatrix]:
        return folded_matrices(self.model.checkpoint, self.model.calibration)

    def run(self) -> list[Record]:
        records = []
        for number, level in enumerate(LEVELS):
            conditions = {"kind": "plans", "level": level, "plans": PLANS, "seed": number}
            records.append(self._stored(f"{level:.0%}".replace("%", ""), conditions, self._plans(level, number)))
        conditions = {"kind": "truncation", "percent": PERCENT}
        return [*records, self._stored(f"truncation-{PERCENT}", conditions, self._truncations)]

    def _stored(self, name: str, conditions: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> Record:
        return self.store.run(f"{self.subject.name}-{name}", conditions, compute)

    def _plans(self, level: float, seed: int) -> Callable[[], dict[str, Any]]:
        def compute() -> dict[str, Any]:
            rows = []
            for matrices in random_plans(self.spec, self.flops, level * self.base.dense["flops"], PLANS, seed):
                increase = self.heldout.increase(cut_model(self.model.checkpoint, self.folded, matrices))
                rows.append([self.flops(matrices), self.predicted.increase(matrices), increase])
            return {"images": self.heldout.images, "columns": ["flops", "predicted", "measured"], "rows": rows}

        return compute

    def flops(self, matrices: Matrices) -> int:
        return deployed_flops(self.spec, matrices, self.base)

    def _truncations(self) -> dict[str, Any]:
        """Held-out increase of the uniform cut: as the model is cut, and by SVDs that know inputs alone and nothing,
        also of what is nested.

        And of equal FLOPs, shared out over the matrices by their influence.
        """
        matrices, whole = uniform(self.spec, PERCENT), self.model.checkpoint
        flat = dataclasses.replace(whole, spec=dataclasses.replace(self.spec, nested=False))
        inputs_alone = dataclasses.replace(self.model.calibration, outputs={})
        ways = {
            "shared_out": cut_model(whole, self.folded, self._shared_out(self.flops(matrices))),
            "whitened": cut_model(whole, self.folded, matrices),
            "whitened_svd": cut_model(flat, folded_matrices(flat, inputs_alone), matrices),
            "plain": cut_model(flat, folded_matrices(flat, None), matrices),
        }
        return {"images": self.heldout.images, **{way: self.heldout.increase(model) for way, model in ways.items()}}

    def _shared_out(self, flops: int) -> Matrices:
        """The least predicted increase within these FLOPs, at one price for every FLOP."""
        low, high = 0.0, 1.0
        for _ in range(60):
            price = (low * high) ** 0.5 if low else high / 4
            matrices = self._at_price(price)
            low, high = (price, high) if self.flops(matrices) > flops else (low, price)
        return self._at_price(high)

    def _at_price(self, price: float) -> Matrices:
        tokens, found = self.spec.tokens, {}
        for shape in self.spec.matrices():
            own = self.predicted.matrices[shape.name]
            for_one = price * 2 * tokens * (shape.inputs + shape.outputs)  # FLOPs of one component
            ranks = (int((part + for_one * np.arange(len(part))).argmin()) for part in (own.shared, own.tailor))
            found[shape.name] = MatrixPlan("factored", "fp32", *(max(1, rank) for rank in ranks))
        return found


def folded_matrices(checkpoint: Checkpoint, calibration: Calibration | None) -> dict[str, FoldedMatrix]:
    """Every matrix for all classes, ready to be cut; without whitening where there is no calibration."""
    everyone = list(range(checkpoint.spec.num_classes))
    names = [shape.name for shape in checkpoint.spec.matrices()]
    return {name: fold_matrix(checkpoint, name, everyone, "switch", calibration) for name in names}


def cut_model(checkpoint: Checkpoint, folded: Mapping[str, FoldedMatrix], matrices: Matrices) -> DiT:
    """What `truncate` makes of a *switch* plan of all classes, from matrices that are folded once for many plans."""
    tensors, ranks = checkpoint.float_tensors(), {}
    for name, chosen in matrices.items():
        full, wanted = checkpoint.spec.ranks(name), Ranks(chosen.shared_rank, chosen.tailor_rank or 0)
        if wanted.learngene < full.learngene:
            own = folded[name].shared.cut(wanted.learngene)
            tensors |= {f"{name}.learngene.{part}": getattr(own, part).float() for part in "UsV"}
        if wanted.tailor < full.tailor:
            cut = [tailor.cut(wanted.tailor) for tailor in folded[name].tailors]
            tensors |= {
                f"{name}.tailors.{part}": torch.stack([getattr(c, part) for c in cut]).float() for part in "UsV"
            }
        ranks[name] = wanted
    spec = dataclasses.replace(checkpoint.spec, nested=False, matrix_ranks=ranks)
    return Checkpoint(spec, checkpoint.class_names, tensors).model()


def random_plans(
    spec: ModelSpec, flops: Callable[[Matrices], int], target: float, count: int, seed: int
) -> list[Matrices]:
    """Plans of the same FLOPs, otherwise unlike; `UsageError` where the model has none."""
    generator, found = np.random.default_rng(seed), []
    shapes = list(spec.matrices())
    for _ in range(50 * count):
        shares = generator.uniform(0.05, 1.0, (len(shapes), 2))
        low, high = 0.0, 20.0
        for _ in range(24):  # FLOPs rise with the scale
            scale = (low + high) / 2
            drawn = zip(shapes, scale * shares, strict=True)
            matrices = {shape.name: _scaled(spec.ranks(shape.name), own) for shape, own in drawn}
            low, high = (low, scale) if flops(matrices) > target else (scale, high)
        if abs(flops(matrices) / target - 1) <= TOLERANCE:
            found.append(matrices)
        if len(found) == count:
            return found
    raise UsageError(f"the model has no {count} plans within {TOLERANCE:.0%} of {target:.3g} FLOPs")


def _scaled(full: Ranks, shares: FloatArray) -> MatrixPlan:
    learngene, tailor = (
        min(rank, max(1, round(float(share) * rank))) for rank, share in zip(full, shares, strict=True)
    )
    return MatrixPlan("factored", "fp32", learngene, tailor)


@dataclass(frozen=True)
class FixedHeldout:
    """Held-out images, noises and times that are the same for every plan, with what the whole model says of them.

    `parts`: noised images [B, ch, H, W], timesteps, gate, span, target, share of the loss; one for each class.
    """

    parts: tuple[tuple[Tensor, Tensor, ClassGate, Tensor | None, Tensor, float], ...]
    whole: tuple[Tensor, ...]
    distilled: bool
    images: int

    @classmethod
    def of(cls, model: OpenedModel) -> FixedHeldout:
        if model.heldout is None:
            raise UsageError(f"{model.name} has no held-out images to measure on")
        spec, heldout, parts = model.checkpoint.spec, model.heldout, []
        generator, grid = torch.Generator().manual_seed(0), timesteps_of(model.checkpoint)
        groups = [heldout.images[heldout.labels == c][:PER_CLASS] for c in range(spec.num_classes)]
        shares = [(1.0 if spec.distilled else 1 - NULL_SHARE) / spec.num_classes] * spec.num_classes
        if not spec.distilled:
            groups, shares = [*groups, torch.cat(groups)[:: spec.num_classes]], [*shares, NULL_SHARE]
        for label, (images, share) in enumerate(zip(groups, shares, strict=True)):
            timestep = draw_timesteps(spec.objective, len(images), generator)
            if spec.distilled:
                timestep = grid[torch.randint(len(grid), (len(images),), generator=generator)].float()
            noise = torch.randn(images.shape, generator=generator)
            noised, target = add_noise(spec.objective, images, noise, timestep)
            gate = ClassGate.of(torch.full((len(images),), label), spec.num_classes)
            parts.append((noised, timestep, gate, step_span(spec, len(grid), timestep), target, share))
        network = model.checkpoint.model()
        with torch.no_grad():
            whole = tuple(network(x, t, gate, span) for x, t, gate, span, *_ in parts)
        return cls(tuple(parts), whole, spec.distilled, sum(map(len, groups)))

    def increase(self, cut: DiT) -> float:
        """The relative increase of the loss; of a distilled model, the deviation's share of the prediction's energy."""
        gained = base = 0.0
        for (x, timestep, gate, span, target, share), whole in zip(self.parts, self.whole, strict=True):
            with torch.no_grad():
                got = cut(x, timestep, gate, span)
            wanted = whole if self.distilled else target
            before = 0 * whole if self.distilled else whole - wanted
            gained += share * float(((got - wanted).double().square() - before.double().square()).mean())
            base += share * float((whole if self.distilled else before).double().square().mean())
        return gained / base


# --- what is printed --------------------------------------------------------------------------------------------------


def summary(records: Sequence[Record]) -> dict[str, float]:
    """Figures of one model: rank correlations over all plans and within the worst level, and plain over whitened."""
    found: dict[str, float] = {}
    if levels := [_rows(record) for record in _of_kind(records, "plans")]:
        for name, column, sign in (("", 1, 1), ("flops_", 0, -1)):
            found[f"{name}spearman"] = _spearman(sign * np.concatenate(levels)[:, column], np.concatenate(levels)[:, 2])
            found[f"{name}spearman_within"] = min(_spearman(sign * own[:, column], own[:, 2]) for own in levels)
    for figures in (record["figures"] for record in _of_kind(records, "truncation")):
        found |= {f"plain_over_{way}": figures["plain"] / figures[way] for way in WAYS}
    return found


def text(records: Sequence[Record]) -> str:
    """How well plans are foreseen, and what whitening is worth."""
    models = sorted({record["checkpoint"]["model"] for record in records})
    own = {model: [record for record in records if record["checkpoint"]["model"] == model] for model in models}
    columns = ("model", "FLOPs", "plans", "predicted", "measured", "ratio", "Spearman", "by FLOPs alone")
    plans = markdown(columns, [row for model in models for row in _plan_rows(model, own[model])])
    ratios = [f"plain / {way}" for way in WAYS.values()]
    header = (f"model, {PERCENT} % of the active rank", *WAYS.values(), "plain SVD", *ratios)
    cuts = markdown(header, [row for model in models for row in _cut_rows(model, own[model])])
    said = "; ".join(
        f"{model}: {own[model][0]['figures']['images']} held-out images, one noise and time each, weights "
        f"{own[model][0]['checkpoint']['weights_sha256'][:12]}"
        for model in models
    )
    verdicts = "\n".join(_verdict(model, summary(own[model])) for model in models)
    return "\n\n".join([plans, cuts, paragraph(said + "."), verdicts])


def _plan_rows(model: str, records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    levels = sorted(_of_kind(records, "plans"), key=lambda record: float(record["conditions"]["level"]))
    for record in levels:
        rows = _rows(record)
        share, count = in_percent(record["conditions"]["level"]), str(len(rows))
        yield model, share, count, _range(rows[:, 1]), _range(rows[:, 2]), *_correlations(rows)
    if levels:
        rows = np.concatenate([_rows(record) for record in levels])
        yield model, "all", str(len(rows)), _range(rows[:, 1]), _range(rows[:, 2]), *_correlations(rows)


def _cut_rows(model: str, records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    for figures in (record["figures"] for record in _of_kind(records, "truncation")):
        ratios = (figures["plain"] / figures[way] for way in WAYS)
        increases = (in_percent(figures[way], 2) for way in (*WAYS, "plain"))
        yield model, *increases, *(f"{ratio:.2f} x" for ratio in ratios)


def _verdict(model: str, figures: Mapping[str, float]) -> str:
    """Every target with what was reached."""
    said = {
        "spearman": "rank correlation over all plans",
        "spearman_within": "within the worst level",
        "plain_over_whitened": "loss of the plain cut over that of the whitened one",
        "plain_over_shared_out": "over that of equal FLOPs shared out by influence",
    }
    parts = []
    for key in (key for key in said if key in figures):
        word = "reached" if figures[key] >= TARGETS[key] else "missed"
        parts.append(f"{said[key]} {figures[key]:.2f} (wanted {TARGETS[key]:g}, {word})")
    return paragraph(f"- `{model}`: {', '.join(parts)}.", "  ")


def _correlations(rows: FloatArray) -> tuple[str, ...]:
    ratio = float(np.median(rows[:, 2] / rows[:, 1]))
    own, flops = _spearman(rows[:, 1], rows[:, 2]), _spearman(-rows[:, 0], rows[:, 2])
    return f"{ratio:.2f}", f"{own:.3f}", f"{flops:.3f}"


def _range(values: FloatArray) -> str:
    return f"{in_percent(values.min(), 2)} to {in_percent(values.max(), 2)}"


def _of_kind(records: Sequence[Record], kind: str) -> list[Record]:
    return [record for record in records if record["conditions"]["kind"] == kind]


def _rows(record: Record) -> FloatArray:
    return np.array(record["figures"]["rows"], dtype=np.float64)


def _spearman(a: FloatArray, b: FloatArray) -> float:
    return float(spearmanr(a, b).statistic)


def frechet(study: Prediction, judge: Judge, network: DiT, images: int, sampling: Sampling | None = None) -> float:
    """Of images of all classes from noise that is the same for every plan; drawn as recommended unless told."""
    checkpoint = study.model.checkpoint
    sampling, index = sampling or sampling_of(checkpoint), spread(images, checkpoint.spec.num_classes)
    denoise = denoiser(network, sampling.steps, sampling.guidance)
    noise = draw_noise(checkpoint.spec, images, 0)
    labels = np.array(judged_labels(checkpoint.class_names))[index]
    drawn = draw(denoise, noise, torch.from_numpy(index), checkpoint.spec.objective, sampling)
    return float(judge.score(drawn, labels, neighbours=False).frechet or 0.0)
