"""What a resized model is worth: one size, begun from a trained model of another by several methods, and from scratch.

The source is the preset `study`, trained. For every size and method the resized model is judged as it is, and after
short trainings (heals), each a run of its own with its own warm-up and cosine, with the ordinary loss: what is compared
is where a training starts. *scratch* starts at random, for as many images and for more, *whole* is the preset itself at
that size.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from kind_edge.deploy.reference import Heldout, load_heldout
from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import CONFIG, HELDOUT, Checkpoint, load_checkpoint
from kind_edge.model.diffusion import draw_timesteps, loss_per_image
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.resize import METHOD_NAMES, resized, target_spec
from kind_edge.training.config import TrainConfig, preset
from kind_edge.training.data import DataSplit
from kind_edge.training.evaluate import Judge
from kind_edge.training.loop import run
from kind_edge.training.open import open_data
from kind_edge.training.sampled import sample_checkpoint, sampling_of
from kind_edge.training.state import STATE, averaged_tensors, start_from
from kind_edge.training.train import train
from studies.progress import tell
from studies.store import Record, Store, read_record, records_in, subject_of

NAME = "resize"
SIZES = {"half-width": (32, 4), "half-depth": (64, 2), "three-quarters": (48, 3), "four-thirds": (80, 5)}
"""Width and depth; the source has 64 and 4."""
SCRATCH, WHOLE = "scratch", "whole"
FIRST = ("front", "selection", SCRATCH)
"""The methods that the claim is about, and what they are compared with; others come after them."""
HEALS = (6_000, 12_000, 24_000, 48_000)
LONGER = (96_000,)
"""From scratch alone, so that images of equal loss can be told between the heals and the whole training."""
LONGEST = 240_000
HEAL_WARMUP_SHARE = 0.1
RATE_SHARE = 4.0
"""Of the preset's learning rate, which is for long runs: of 1, 2 and 4 the best from scratch and for front (half-width,
12,000 images: 0.80, 0.62, 0.57 and 0.59, 0.52, 0.45; at 48,000 from scratch 0.43, 0.38, 0.34)."""
JUDGED_IMAGES = 500
DRAWS = 8
"""Noises and timesteps for every held-out image, the same for all models."""


def methods() -> tuple[str, ...]:
    """In the order of the tables."""
    return (*FIRST[:1], *(name for name in METHOD_NAMES if name not in FIRST), *FIRST[1:])


class Resizing:
    """One source model, and what becomes of it at other sizes."""

    def __init__(self, folder: Path, images: int, seed: int) -> None:
        self.folder, self.images, self.seed = folder, images, seed
        source = _trained(folder / "weights" / f"study-seed{seed}", dataclasses.replace(preset("study"), seed=seed))
        self.source: Checkpoint = load_checkpoint(source)
        heldout = load_heldout(source, self.source.spec)
        if heldout is None:
            raise InputError(f"{source}: has no {HELDOUT} to measure on; remove the folder to train it anew")
        self.heldout: Heldout = heldout
        self.store = Store(folder, NAME, subject_of(source))
        self.judge = Judge.load()
        self.sampling = sampling_of(self.source)
        self._starts: dict[tuple[str, str], tuple[Checkpoint, float]] = {}

    def judge_source(self) -> None:
        """What the source itself scores: the best that its sizes can hope for without more training."""
        self._store("source", "source", int(self.source.provenance["images_seen"]), lambda: self._scores(self.source))

    def run(self, sizes: Sequence[str], chosen: Sequence[str]) -> None:
        """Shortest first, so that an early end leaves whole columns."""
        for size in sizes:
            for images in (0, *HEALS):
                for method in chosen:
                    self._point(size, method, images)
            if SCRATCH in chosen:
                for images in LONGER:
                    self._point(size, SCRATCH, images)
                if (self._whole(size) / CONFIG).exists():
                    self._point(size, WHOLE, self.config(size).images)

    def run_longest(self) -> None:
        """The whole trainings, and from scratch for as long at the rate of the heals."""
        for size in SIZES:
            self._point(size, WHOLE, self.config(size).images)
        for size in SIZES:
            self._point(size, SCRATCH, LONGEST)

    def _whole(self, size: str) -> Path:
        return self.folder / "weights" / f"scratch-{size}-seed{self.seed}"

    def config(self, size: str) -> TrainConfig:
        """Of the whole training from scratch."""
        width, depth = SIZES[size]
        base = preset("study")
        spec = target_spec(base.spec, depth=depth, width=width)
        return dataclasses.replace(base, spec=spec, seed=self.seed, nested_share=0.0)

    def _point(self, size: str, method: str, seen: int) -> None:
        self._store(size, method, seen, partial(self._figures, size, method, seen))

    def _store(self, size: str, method: str, seen: int, compute: Callable[[], dict[str, Any]]) -> None:
        judged = {"images": self.images, **dataclasses.asdict(self.sampling), "judge_sha256": self.judge.judge_sha256}
        draws = {"heldout_images": len(self.heldout.labels), "draws": DRAWS}
        rate = {"rate_share": 1.0 if method in (WHOLE, "source") else RATE_SHARE}
        conditions = {"size": size, "method": method, "seen": seen, "seed": self.seed, **judged, **draws, **rate}
        self.store.run(f"{size}-{method}-{seen}-seed{self.seed}", conditions, compute)

    def _figures(self, size: str, method: str, seen: int) -> dict[str, Any]:
        config = self.config(size)
        if method == WHOLE:
            return self._scores(load_checkpoint(_trained(self._whole(size), config)))
        if (size, method) not in self._starts:
            start = self._begun(config, method)
            self._starts[size, method] = start, mean(heldout_losses(start, self.heldout))
        begun, start_loss = self._starts[size, method]
        self._check_start(size, method, start_loss)
        done = self._healed(begun, config, seen) if seen else begun
        return {**self._scores(done), "start_loss": start_loss}

    def _check_start(self, size: str, method: str, loss: float) -> None:
        """All lengths of one start go together: refuse to go on with runs of another one, as of an earlier method."""
        for path in (self.folder / NAME).glob(f"{size}-{method}-*-seed{self.seed}.json"):
            if not math.isclose(read_record(path)["figures"]["start_loss"], loss, rel_tol=1e-3):
                raise UsageError(f"{path} began from other weights; remove the runs of {size}, {method} to go on")

    def _scores(self, checkpoint: Checkpoint) -> dict[str, Any]:
        own = self.sampling
        drawn = sample_checkpoint(checkpoint, self.images, self.seed, own.steps, own.guidance, sampler=own.sampler)
        report = self.judge.score(drawn.images, drawn.labels, neighbours=False)
        return {
            "heldout_losses": heldout_losses(checkpoint, self.heldout),
            "frechet": report.frechet,
            "class_accuracy": report.class_accuracy,
        }

    def _begun(self, config: TrainConfig, method: str) -> Checkpoint:
        """Where a training begins."""
        if method != SCRATCH:
            spec = target_spec(self.source.spec, depth=config.spec.depth, width=config.spec.width)
            return resized(self.source, spec, method)
        tensors = initialise(DiT(config.spec), self.seed).state_dict()
        return dataclasses.replace(self.source, spec=config.spec, tensors=tensors, path=None)

    def _healed(self, begun: Checkpoint, config: TrainConfig, images: int) -> Checkpoint:
        short = dataclasses.replace(heal(config, images), spec=begun.spec)
        model = begun.model().train().requires_grad_(True)
        state = run(short, start_from(short, model), self._split.training, lambda _: None, partial(tell, every=500))
        return dataclasses.replace(begun, tensors=averaged_tensors(short, state))

    @cached_property
    def _split(self) -> DataSplit:
        return open_data(preset("study"), None, device=torch.device("cpu"))


def heal(config: TrainConfig, images: int) -> TrainConfig:
    """A run of this length of any start: at a rate that suits short ones, with a warm-up that fits the length."""
    steps = images // config.batch_size
    warmup = min(config.warmup_steps, round(HEAL_WARMUP_SHARE * steps))
    return dataclasses.replace(
        config, images=images, warmup_steps=warmup, learning_rate=RATE_SHARE * config.learning_rate
    )


@torch.no_grad()
def heldout_losses(checkpoint: Checkpoint, heldout: Heldout) -> list[float]:
    """The mean diffusion loss over all held-out images, each under its own class's gate, for each of DRAWS draws."""
    model, objective = checkpoint.model(), checkpoint.spec.objective
    gate = ClassGate.of(heldout.labels, checkpoint.spec.num_classes)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(DRAWS):
        noise = torch.randn(heldout.images.shape, generator=generator)
        timestep = draw_timesteps(objective, len(noise), generator)
        loss = loss_per_image(objective, lambda x, t: model(x, t, gate), heldout.images, noise, timestep)
        losses.append(float(loss.mean()))
    return losses


def run_study(folder: Path, images: int, seeds: Sequence[int]) -> list[Record]:
    """Every run; finished ones are only read. The smaller sizes and the methods of the claim come first."""
    small, rest = tuple(SIZES)[:2], tuple(SIZES)[2:]
    others = tuple(method for method in methods() if method not in FIRST)
    for seed in seeds:
        study = Resizing(folder, images, seed)
        study.judge_source()
        for sizes, chosen in ((small, FIRST), (small, others), (rest, FIRST), (rest, others)):
            study.run(sizes, chosen)
        study.run_longest()
    return records_in(folder, NAME)


def _trained(folder: Path, config: TrainConfig) -> Path:
    if not (folder / CONFIG).exists():
        train(config, folder, device="cpu", resume=(folder / STATE).exists(), on_progress=partial(tell, every=500))
    return folder
