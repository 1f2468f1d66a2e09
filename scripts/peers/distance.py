"""How good the dense twin's images are: its Fréchet distance over samplers and steps, and the fewest steps that do.

A distance is a property of the model, the sampler, its steps and the rounding of int8, so it is measured once for each,
through ONNX Runtime. An engine's own int8 is judged beside, at the steps that were found.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from studies.store import Record, Store

from kind_edge.deploy.noise import gaussian_noise
from kind_edge.deploy.runtime import to_pixels
from kind_edge.training.data import CLASS_NAMES
from kind_edge.training.evaluate import Judge
from peers.models import Dense
from peers.samplers import SAMPLERS, FloatArray, IndexArray, Predict, draw, flow_table

FEWEST, MOST = 4, 50
WITHIN = 1.05
GUIDANCE = 1.75
SEED = 0
CLASS_SETS = {2: ("sneaker", "bag"), 10: CLASS_NAMES}
IMAGES = 1_000
"""Of all classes together. Every choice starts from the same noises, so that small differences can be told."""

_BATCH = 32


@dataclass(frozen=True)
class Best:
    """A peer at its best: the sampler and the guided steps, and the Fréchet distance there and at 50 steps."""

    precision: str
    sampler: str
    steps: int
    frechet: float
    frechet_at_most: float


def noise_and_classes(classes: int, shape: tuple[int, int, int]) -> tuple[FloatArray, IndexArray]:
    """The images that are judged: image i of every class starts from noise number i, as in a bundle."""
    each = IMAGES // classes
    positions = [CLASS_NAMES.index(name) for name in CLASS_SETS[classes]]
    return np.tile(gaussian_noise(SEED, 0, each, shape), (classes, 1, 1, 1)), np.repeat(positions, each)


@functools.cache
def judge() -> Judge:
    return Judge.load()


def judged(images: npt.NDArray[np.uint8], labels: IndexArray) -> dict[str, Any]:
    """Fréchet distance and class accuracy of images uint8 [n, H, W, ch]."""
    report = dataclasses.asdict(judge().score(images, labels, neighbours=False))
    return {key: report[key] for key in ("frechet", "class_accuracy", "per_class_accuracy")}


def distance(
    store: Store, dense: Dense, precision: str, sampler: str, steps: int, classes: int = 10, guidance: float = GUIDANCE
) -> Record:
    """The record of one choice, measured where it is not there yet."""
    conditions = {
        "kind": "distance", "precision": precision, "sampler": sampler, "steps": steps, "guidance": guidance,
        "classes": list(CLASS_SETS[classes]), "images": IMAGES, "seed": SEED,
        "judge_sha256": judge().judge_sha256,
    }  # fmt: skip
    tried = "" if guidance == GUIDANCE else f"-guidance-{guidance:g}"
    name = f"{precision}-{sampler.replace('++', '')}-{steps}-steps-{classes}-classes{tried}"
    return store.run(name, conditions, lambda: _measure(dense, precision, sampler, steps, classes, guidance))


def _measure(dense: Dense, precision: str, sampler: str, steps: int, classes: int, guidance: float) -> dict[str, Any]:
    """int8 has one scale for the activations of a whole batch, so there an image is drawn by itself, as in an app."""
    predict, table = _through_onnxruntime(dense, precision), flow_table(sampler, steps)
    shape = (dense.spec.channels, dense.spec.image_size, dense.spec.image_size)
    noise, labels = noise_and_classes(classes, shape)
    size = 1 if precision == "int8" else _BATCH
    parts = [
        draw(predict, table, guidance, noise[at : at + size], labels[at : at + size], dense.spec.num_classes)
        for at in range(0, len(noise), size)
    ]
    return judged(to_pixels(np.concatenate(parts)), labels)


def _through_onnxruntime(dense: Dense, precision: str) -> Predict:
    from kind_edge.deploy.session import open_session

    session = open_session(dense.onnx_int8 if precision == "int8" else dense.onnx, threads=1)

    def predict(sample: FloatArray, timestep: FloatArray, class_index: IndexArray) -> FloatArray:
        feeds = {"sample": sample, "timestep": timestep, "class_index": class_index}
        return np.asarray(session.run(None, feeds)[0])

    return predict


def best_of(store: Store, dense: Dense, precision: str, near: Best | None = None) -> Best:
    """The fewest guided steps, over the samplers, within 5 % of this precision's own distance at 50 Euler steps.

    A sampler is tried at fewer steps than the best before it needs. With `near`, another precision's best, only its
    sampler is tried, from its steps on.
    """

    def frechet(sampler: str, steps: int) -> float:
        return float(distance(store, dense, precision, sampler, steps)["figures"]["frechet"])

    at_most = frechet("euler", MOST)
    best = Best(precision, "euler", MOST, at_most, at_most)
    if near is not None and near.steps == MOST:
        return best
    for sampler in SAMPLERS if near is None else (near.sampler,):
        good = functools.partial(_within, functools.partial(frechet, sampler), at_most)
        choices = [n for n in step_choices(sampler) if n < best.steps]
        steps = fewest(choices, good) if near is None else fewest_near(choices, near.steps, good)
        if steps is not None:
            best = Best(precision, sampler, steps, frechet(sampler, steps), at_most)
    return best


def _within(frechet: Callable[[int], float], at_most: float, steps: int) -> bool:
    return frechet(steps) <= WITHIN * at_most


def step_choices(sampler: str) -> Sequence[int]:
    """Guided evaluations that a sampler can be given, 4 to 50."""
    return [n for n in range(FEWEST, MOST + 1) if sampler != "heun" or n % 2]


def fewest(choices: Sequence[int], good: Callable[[int], bool]) -> int | None:
    """The first good one of ascending `choices`: steps doubled until good, then halved in between; None if none is.

    Where goodness comes and goes with the steps, a choice between two that were tried may be missed.
    """
    if not choices:
        return None
    low, high = -1, 0  # positions: known bad, tried next
    while not good(choices[high]):
        if high == len(choices) - 1:
            return None
        low, high = high, min(2 * high + 4, len(choices) - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(choices[middle]) else (middle, high)
    return choices[high]


def fewest_near(choices: Sequence[int], start: int, good: Callable[[int], bool]) -> int | None:
    """As `fewest`, where the answer is expected at `start`, one of the choices: on from there, or back."""
    at = choices.index(start)
    if not good(start):
        return next((each for each in choices[at + 1 :] if good(each)), None)
    while at > 0 and good(choices[at - 1]):
        at -= 1
    return choices[at]
