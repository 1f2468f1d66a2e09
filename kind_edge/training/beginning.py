"""A run that begins with the weights of a checkpoint, and not at random."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import Checkpoint, checkpoint_hash
from kind_edge.model.dit import DiT
from kind_edge.training.config import TrainConfig


def origin_of(begin: Checkpoint | None) -> dict[str, Any]:
    """What a run that begins with a checkpoint's weights notes of it: where that came from, and its hash.

    Nothing of a run that begins at random.
    """
    if begin is None:
        return {}
    sha256 = None if begin.path is None else checkpoint_hash(begin.path)
    return {"begun_from": {**begin.provenance, "sha256": sha256}}


def begin_with(begin: Checkpoint, config: TrainConfig) -> DiT:
    """The checkpoint's weights as a model to train, whatever it says of the order of its components."""
    if dataclasses.replace(begin.spec, nested=config.spec.nested) != config.spec:
        raise UsageError(f"--from {begin.path}: the configuration is for a model of another shape; leave it out")
    return dataclasses.replace(begin, spec=config.spec).model().train().requires_grad_(True)


def check_same_classes(begin: Checkpoint, class_names: Sequence[str]) -> None:
    """Refuse data whose labels mean something else to the checkpoint's tailors."""
    pairs = itertools.zip_longest(begin.class_names, class_names)
    index, different = next(((i, pair) for i, pair in enumerate(pairs) if len(set(pair)) > 1), (0, None))
    if different:
        raise UsageError(
            f"--from {begin.path}: class {index} is {different[0]!r} there and {different[1]!r} in the data; give the "
            "classes that it was trained on, in their order (--class-map names them); for new ones: kind-edge adapt"
        )
