"""Batches: equal groups of one class each, every image in its turn, and nothing but (seed, step) decides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.errors import InputError
from kind_edge.training.batches import ClassBatches, group_count


@given(st.integers(1, 12), st.integers(1, 24), st.integers(0, 3))
def test_a_batch_is_whole_and_comes_in_equal_groups(classes: int, size: int, step: int) -> None:
    labels = torch.arange(5 * classes).flip(0) % classes
    batch = ClassBatches(labels, classes, size, seed=1)(step)
    assert len(batch.images) == size
    assert torch.equal(batch.labels, labels[batch.images])
    assert torch.equal(batch.labels, batch.labels.sort().values)
    groups = batch.labels.reshape(-1, batch.group_size)
    assert len(groups) == group_count(classes, size)
    assert (groups == groups[:, :1]).all()
    again = ClassBatches(labels, classes, size, seed=1)(step)
    assert torch.equal(again.images, batch.images)


def test_with_few_classes_each_is_drawn_equally_often_and_every_image_once_per_epoch() -> None:
    labels = torch.arange(36) % 3
    batches = ClassBatches(labels, 3, 12, seed=5)
    epochs = []
    for epoch in range(2):
        seen = []
        for step in range(3 * epoch, 3 * epoch + 3):
            batch = batches(step)
            assert batch.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
            seen += batch.images.tolist()
        assert sorted(seen) == list(range(36))
        epochs.append(seen)
    assert epochs[0] != epochs[1]
    assert not torch.equal(batches(4).images, ClassBatches(labels, 3, 12, seed=6)(4).images)


def test_groups_that_do_not_go_round_are_dealt_in_turn() -> None:
    batches = ClassBatches(torch.arange(100) % 10, 10, 64, seed=0)  # 16 groups of 4 for 10 classes
    counts = torch.stack([batches(step).labels.bincount(minlength=10) for step in range(5)])
    assert (counts % 4 == 0).all()
    assert counts.sum(0).tolist() == [32] * 10


def test_with_many_classes_every_image_is_drawn_once_per_epoch() -> None:
    labels = torch.arange(50) % 25
    batches = ClassBatches(labels, 25, 20, seed=0)  # an epoch is two batches and a half
    drawn = torch.cat([batches(step).images for step in range(5)])
    assert drawn.bincount(minlength=50).tolist() == [2] * 50
    assert batches(1).group_size == 1


def test_odd_class_sizes_work_and_an_empty_class_is_named() -> None:
    batch = ClassBatches(torch.tensor([0, 1, 1, 1]), 2, 6, seed=0)(0)  # a class smaller than its group
    assert batch.images.tolist()[:3] == [0, 0, 0]
    with pytest.raises(InputError, match="no training image has class 1"):
        ClassBatches(torch.tensor([0, 2]), 3, 2, seed=0)
