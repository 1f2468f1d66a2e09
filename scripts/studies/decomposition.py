"""Does the learngene hold no class, and does a tailor draw its own class and no other?

Every run draws images through the gated model and asks the judge what it sees. Per seed of the noise:
full        all classes at the recommended guidance: the row of class A is what its tailor draws
unguided    the same without guidance, so the tailor has to do it alone (not of a model with guidance inside)
learngene   every gate closed, no guidance
crossed     label A with tailor B, for models with a label embedding: who decides?
And once: `swap`, the same noise under every tailor; `noise`, what sampling starts from; `real`, test images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import Checkpoint, load_checkpoint
from kind_edge.model.diffusion import TRAIN_STEPS
from kind_edge.model.dit import DiT
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.sampling import Denoiser, denoiser
from kind_edge.training.data import CLASS_NAMES, load_fashion_mnist
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import Sampled, Sampling, draw, draw_noise, judged_labels, sampling_of, spread
from studies.store import Record, Store, Subject

NAME = "decomposition"
CONFIDENT = 0.9
Images = NDArray[np.uint8]
Draws = Callable[[int, Sampling], dict[str, Any]]


class Decomposition:
    """One model, one judge, and the runs of the study; nothing is kept but what the store keeps."""

    def __init__(self, subject: Subject, folder: Path, images: int, seeds: Sequence[int]) -> None:
        self.checkpoint: Checkpoint = load_checkpoint(subject.folder)
        least = 2 * self.checkpoint.spec.num_classes
        if images < least:
            raise UsageError(f"--images: got {images}, want at least {least}: every class from two noises")
        self.store = Store(folder, NAME, subject)
        self.judge = Judge.load()
        self.images, self.seeds = images, seeds
        self.names = judged_labels(self.checkpoint.class_names)
        self.guided = sampling_of(self.checkpoint)
        inside = self.checkpoint.spec.inside_guidance
        self.alone = sampling_of(self.checkpoint, guidance=1.0 if inside is None else inside)
        """With nothing to be guided towards: unguided, unless guidance is inside."""

    def run(self) -> list[Record]:
        """Every run, seed by seed; finished ones are only read."""
        self._once("noise", {"seed": 0}, lambda: noise_figures(self.judge, self.checkpoint, self.images))
        self._once("real", {}, lambda: real_figures(self.judge, self.images))
        for seed in self.seeds:
            self.full(seed)
            if not self.checkpoint.spec.distilled:
                self._drawn("unguided", seed, self.alone, self._full)
            self._drawn("learngene", seed, self.alone, self._learngene)
            if self.checkpoint.spec.label_embedding:
                self._drawn("crossed", seed, self.guided, self._crossed)
        self._drawn("swap", self.seeds[0], self.guided, self._swap)
        return self.store.finished()

    def full(self, seed: int) -> Record:
        """The full model at its best: other studies compare with it."""
        return self._drawn("full", seed, self.guided, self._full)

    def _once(self, name: str, conditions: Mapping[str, Any], compute: Callable[[], dict[str, Any]]) -> None:
        common = {"images": self.images, "judge_sha256": self.judge.judge_sha256}
        self.store.run(name, {"kind": name, **common, **conditions}, compute)

    def _drawn(self, name: str, seed: int, sampling: Sampling, compute: Draws) -> Record:
        conditions = {
            "kind": name, "images": self.images, "seed": seed, "sampler": sampling.sampler, "steps": sampling.steps,
            "guidance": sampling.guidance, "judge_sha256": self.judge.judge_sha256,
        }  # fmt: skip
        return self.store.run(f"{name}-seed{seed}", conditions, partial(compute, seed, sampling))

    def _full(self, seed: int, sampling: Sampling) -> dict[str, Any]:
        spec = self.checkpoint.spec
        index = spread(self.images, spec.num_classes)
        denoise = denoiser(self.checkpoint.model(), sampling.steps, sampling.guidance)
        noise = draw_noise(spec, self.images, seed)
        images = draw(denoise, noise, torch.from_numpy(index), spec.objective, sampling)
        return labelled_figures(self.judge, Sampled(images, np.array(self.names)[index]), self.names)

    def _learngene(self, seed: int, sampling: Sampling) -> dict[str, Any]:
        return seen_figures(self.judge, draw_learngene(self.checkpoint, self.images, seed, sampling))

    def _crossed(self, seed: int, sampling: Sampling) -> dict[str, Any]:
        pairs = all_pairs(self.checkpoint.spec.num_classes, self.images)
        images = draw_crossed(self.checkpoint, pairs, seed, sampling)
        judged = self.judge.look(images)[1].argmax(axis=1)
        return crossed_figures(np.array(self.names)[pairs], judged)

    def _swap(self, seed: int, sampling: Sampling) -> dict[str, Any]:
        noises = self.images // self.checkpoint.spec.num_classes
        images = draw_swapped(self.checkpoint, noises, seed, sampling)  # [C, M, H, W, ch]
        labels = np.repeat(self.names, noises)
        flat = images.reshape(-1, *images.shape[2:])
        features = self.judge.look(flat)[0].reshape(*images.shape[:2], -1)
        figures = labelled_figures(self.judge, Sampled(flat, labels), self.names)
        return {"noises": noises, **figures, **variance_shares(features)}


# --- what is drawn ----------------------------------------------------------------------------------------------------


def draw_learngene(checkpoint: Checkpoint, images: int, seed: int, sampling: Sampling) -> Images:
    """Images with every gate closed; `sampling` is without guidance, or with what is inside."""
    spec = checkpoint.spec
    closed = torch.full((images,), spec.num_classes)
    denoise = denoiser(checkpoint.model(), sampling.steps, sampling.guidance)
    return draw(denoise, draw_noise(spec, images, seed), closed, spec.objective, sampling)


def draw_swapped(checkpoint: Checkpoint, noises: int, seed: int, sampling: Sampling) -> Images:
    """Every class from the same noises: [C, M, H, W, ch]."""
    spec = checkpoint.spec
    noise = draw_noise(spec, noises, seed).repeat(spec.num_classes, 1, 1, 1)
    classes = torch.arange(spec.num_classes).repeat_interleave(noises)
    denoise = denoiser(checkpoint.model(), sampling.steps, sampling.guidance)
    images = draw(denoise, noise, classes, spec.objective, sampling)
    return images.reshape(spec.num_classes, noises, *images.shape[1:])


def all_pairs(classes: int, images: int) -> NDArray[np.int64]:
    """(label, tailor) pairs [n, 2], all C^2 of them in turn."""
    return np.stack(np.divmod(np.arange(images) % classes**2, classes), 1)


def draw_crossed(checkpoint: Checkpoint, pairs: NDArray[np.int64], seed: int, sampling: Sampling) -> Images:
    """Images of `pairs` [n, 2]: label embedding of the first, tailor of the second."""
    spec = checkpoint.spec
    denoise = crossed(checkpoint.model(), sampling.steps, sampling.guidance)
    noise = draw_noise(spec, len(pairs), seed)
    return draw(denoise, noise, torch.from_numpy(pairs), spec.objective, sampling)


def crossed(model: DiT, steps: int, guidance: float) -> Denoiser:
    """`denoiser` whose classes are (label, tailor) pairs [B, 2]; the null branch, where there is one, has neither."""
    num_classes = model.spec.num_classes

    def predict(x: Tensor, timestep: Tensor, pairs: Tensor) -> Tensor:
        labels, tailors = pairs.unbind(1)
        gates = functional.one_hot(tailors, num_classes)
        if model.spec.distilled:
            span = torch.full_like(timestep, TRAIN_STEPS / steps)
            return model(x, timestep, ClassGate.opening(gates, labels), span)
        both = ClassGate.opening(
            torch.cat([gates, torch.zeros_like(gates)]), torch.cat([labels, torch.full_like(labels, num_classes)])
        )
        wanted, null = model(x.repeat(2, 1, 1, 1), timestep.repeat(2), both).chunk(2)
        return null + guidance * (wanted - null)

    return predict


# --- what is seen -----------------------------------------------------------------------------------------------------


def seen_figures(judge: Judge, images: Images) -> dict[str, Any]:
    """What the judge takes images for that should show nothing in particular."""
    report = judge.score(images, neighbours=False)
    probabilities = judge.look(images)[1]
    counts = np.bincount(probabilities.argmax(axis=1), minlength=len(CLASS_NAMES))
    return {
        "entropy_nats": report.entropy_nats,
        "marginal_entropy_nats": report.marginal_entropy_nats,
        "confident_share": confident_share(probabilities),
        "frechet": report.frechet,
        "judged_shares": {name: float(count / len(images)) for name, count in zip(CLASS_NAMES, counts, strict=True)},
    }


def labelled_figures(judge: Judge, sampled: Sampled, rows: Sequence[int]) -> dict[str, Any]:
    """`seen_figures`, and the confusion matrix: a row of judged shares for every class in `rows`."""
    report = judge.score(sampled.images, sampled.labels)
    probabilities = judge.look(sampled.images)[1]
    return {
        "entropy_nats": report.entropy_nats,
        "marginal_entropy_nats": report.marginal_entropy_nats,
        "confident_share": confident_share(probabilities),
        "frechet": report.frechet,
        "precision": report.precision,
        "recall": report.recall,
        "class_accuracy": report.class_accuracy,
        "worst_class_accuracy": min(report.per_class_accuracy.values()),
        "confusion_rows": [CLASS_NAMES[row] for row in rows],
        "confusion": confusion(sampled.labels, probabilities.argmax(axis=1), rows),
    }


def confident_share(probabilities: NDArray[np.float64]) -> float:
    """The share of images that the judge gives one class with more than CONFIDENT."""
    return float((probabilities.max(axis=1) > CONFIDENT).mean())


def confusion(labels: NDArray[np.int64], judged: NDArray[np.int64], rows: Sequence[int]) -> list[list[float]]:
    """[len(rows)][10]: the share of images of a row's class that are judged as each of CLASS_NAMES."""
    count = len(CLASS_NAMES)
    return [
        (np.bincount(judged[labels == row], minlength=count) / max(1, (labels == row).sum())).tolist() for row in rows
    ]


def crossed_figures(pairs: NDArray[np.int64], judged: NDArray[np.int64]) -> dict[str, Any]:
    """Over pairs [n, 2] whose label and tailor differ: whose class is seen?"""
    label, tailor = pairs.T
    differ = label != tailor
    return {
        "pairs": int(differ.sum()),
        "follows_tailor": float((judged == tailor)[differ].mean()),
        "follows_label": float((judged == label)[differ].mean()),
        "agreeing_accuracy": float((judged == tailor)[~differ].mean()),
    }


def noise_figures(judge: Judge, checkpoint: Checkpoint, images: int) -> dict[str, Any]:
    """What sampling starts from, seen as a picture: Gaussian noise, clipped to [-1, 1]."""
    noise = draw_noise(checkpoint.spec, images, 0).clamp(-1, 1)
    return seen_figures(judge, ((noise + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def real_figures(judge: Judge, images: int) -> dict[str, Any]:
    """The first test images."""
    data = load_fashion_mnist()
    sampled = Sampled(data.test_images[:images, :, :, None], data.test_labels[:images])
    return labelled_figures(judge, sampled, range(len(CLASS_NAMES)))


def variance_shares(features: NDArray[np.float64]) -> dict[str, float]:
    """Two-way analysis of variance of features [C, M, F]: what tailor and noise account for.

    `noise_share_of_rest` is the noise's part of what the tailors leave; by chance it would be about `chance_share`.
    """
    classes, noises, _ = features.shape
    centred = features - features.mean(axis=(0, 1))
    total = float(np.square(centred).sum())
    tailor = float(noises * np.square(centred.mean(axis=1)).sum())
    noise = float(classes * np.square(centred.mean(axis=0)).sum())
    return {
        "tailor_share": tailor / total,
        "noise_share": noise / total,
        "noise_share_of_rest": noise / (total - tailor),
        "chance_share": 1 / classes,
    }
