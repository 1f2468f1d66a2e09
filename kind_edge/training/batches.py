"""Which images a step trains on: a function of (seed, step), always in equal groups of one class each."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kind_edge.errors import InputError


def generator(seed: int, *path: int) -> torch.Generator:
    """An independent stream for every (seed, path): a splitmix-style fold into 63 bits."""
    value = seed
    for part in path:
        value = ((value ^ part) * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & (2**63 - 1)
        value ^= value >> 29
    return torch.Generator().manual_seed(value)


def group_count(num_classes: int, batch_size: int) -> int:
    """How many groups of one class each a batch has: the fewest equal ones that leave every class one, if they can."""
    fewest = min(num_classes, batch_size)
    return next(count for count in range(fewest, batch_size + 1) if batch_size % count == 0)


def part_layout(num_classes: int, batch_size: int, parts: int) -> tuple[int, int]:
    """Images of a batch's part when it is cut in equal ones, and of the groups in it: a group that a cut goes through
    becomes several smaller ones."""
    size = batch_size // parts
    return size, math.gcd(size, batch_size // group_count(num_classes, batch_size))


@dataclass(frozen=True)
class Batch:
    """The images of one step, sorted by class; each run of `group_size` images has one class."""

    images: Tensor  # int64 [B]
    labels: Tensor  # int64 [B], ascending
    group_size: int


class ClassBatches:
    """Batches of B images in groups of M; the shapes are the same in every step, so that a compiled step is one graph.

    With as many classes as images or fewer, every class is drawn equally often: the batch's groups (M is the largest
    divisor of B that leaves a group per class) are dealt out to the classes in turn, and a class's images are gone
    through in a new random order each epoch. With more classes than images, every *image* is drawn equally often, in
    a new random order each epoch, and M is 1.
    """

    def __init__(self, labels: Tensor, num_classes: int, batch_size: int, seed: int) -> None:
        self.labels, self.num_classes, self.batch_size, self.seed = labels, num_classes, batch_size, seed
        counts = labels.bincount(minlength=num_classes)
        if not counts.all():
            empty = int((counts == 0).nonzero()[0])
            raise InputError(f"no training image has class {empty}; every class of the model needs some")
        self.by_class = labels.argsort(stable=True).split(counts.tolist())
        self.group_size = batch_size // group_count(num_classes, batch_size)
        self._order = functools.lru_cache(maxsize=4)(self._shuffled)

    def __call__(self, step: int) -> Batch:
        if self.num_classes > self.batch_size:
            images = self._next_images(step)
            labels, order = self.labels[images].sort(stable=True)
            return Batch(images[order], labels, 1)
        groups = self.batch_size // self.group_size
        turns = [divmod(group, self.num_classes) for group in range(step * groups, (step + 1) * groups)]
        dealt = sorted((int(self._order(self.num_classes, turn, 1)[place]), turn) for turn, place in turns)
        images = torch.cat([self._draw(label, turn) for label, turn in dealt])
        labels = torch.tensor([label for label, _ in dealt]).repeat_interleave(self.group_size)
        return Batch(images, labels, self.group_size)

    def _shuffled(self, count: int, epoch: int, stream: int) -> Tensor:
        return torch.randperm(count, generator=generator(self.seed, epoch, stream))

    def _next_images(self, step: int) -> Tensor:
        count = len(self.labels)
        wanted = torch.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = (wanted // count).unique().tolist()
        return torch.cat([self._order(count, epoch, 1)[wanted[wanted // count == epoch] % count] for epoch in epochs])

    def _draw(self, label: int, turn: int) -> Tensor:
        """The group that a class trains on when its turn comes for the `turn`-th time."""
        members = self.by_class[label]
        per_epoch = max(1, len(members) // self.group_size)
        epoch, position = divmod(turn, per_epoch)
        order = self._shuffled(len(members), epoch, 2 + label)
        wanted = torch.arange(position * self.group_size, (position + 1) * self.group_size) % len(members)
        return members[order[wanted]]
