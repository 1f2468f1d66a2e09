"""The authors' mobile table, reproduced: every figure within one unit of its last printed digit.

Source: Xie et al., "KIND" (ICML 2025), DiT-B/2 with 150 classes, dense and at active rank 154 = ceil(0.2 D).
"""

from __future__ import annotations

import math

import pytest

from kind_edge.budget.cost import model_cost, model_flops, paper_table
from kind_edge.budget.profile import load_profile
from kind_edge.errors import UsageError
from kind_edge.model.spec import named_spec

DIT_B2 = named_spec("DiT-B/2", num_classes=150)
RANK = math.ceil(0.2 * DIT_B2.width)

# (rank, profile): parameters in M, FLOPs in G, memory in MB, seconds per image, as printed
GOLDEN = {
    (None, "apple-a18"): (129.7, 43.62, 518.8, 11.43),
    (None, "kirin-9020"): (129.7, 43.62, 518.8, 12.68),
    (None, "snapdragon8g3"): (129.7, 43.62, 518.8, 7.86),
    (RANK, "apple-a18"): (70.2, 13.22, 280.8, 3.47),
    (RANK, "kirin-9020"): (70.2, 13.22, 280.8, 3.84),
    (RANK, "snapdragon8g3"): (70.2, 13.22, 280.8, 2.38),
}


@pytest.mark.parametrize(("rank", "device"), GOLDEN)
def test_every_printed_figure(rank: int | None, device: str) -> None:
    row = paper_table(DIT_B2, rank, load_profile(device))
    for ours, theirs, digit in zip(row.printed(), GOLDEN[rank, device], (0.1, 0.01, 0.1, 0.01), strict=True):
        assert float(ours) == pytest.approx(theirs, abs=digit * 1.001)


def test_all_but_one_figure_to_the_last_digit() -> None:
    """The dense A18 latency is 11.4377, printed as 11.43; every other figure rounds to the printed digits."""
    different = [
        (device, ours, theirs)
        for (rank, device), golden in GOLDEN.items()
        for ours, theirs in zip(paper_table(DIT_B2, rank, load_profile(device)).printed(), golden, strict=True)
        if float(ours) != theirs
    ]
    assert different == [("apple-a18", "11.44", 11.43)]


def test_memory_is_four_bytes_per_parameter() -> None:
    """The printed 518.8 MB is four times the rounded 129.7 M; the unrounded figure is 518.7."""
    row = paper_table(DIT_B2, None, load_profile("apple-a18"))
    assert (row.params, row.memory_bytes) == (129_663_008, 518_652_032)


def test_exact_counts_the_attention_that_the_paper_leaves_out() -> None:
    exact, paper = model_cost(DIT_B2, "exact"), model_cost(DIT_B2, "paper")
    assert paper.part("products").flops == 0
    assert exact.part("products").flops == pytest.approx(2.42e9, rel=2e-3)
    elementwise = exact.flops - paper.flops - exact.part("products").flops
    assert 0 < elementwise < 0.003 * exact.flops


def test_a_rank_that_is_none() -> None:
    for rank in (0, DIT_B2.width + 1):
        with pytest.raises(UsageError, match="want 1 to 768"):
            model_flops(DIT_B2, "paper", rank)


def test_the_convention_needs_a_gpu() -> None:
    with pytest.raises(UsageError, match=r"--unit gpu: profile 'raspberry-pi-5' has no figure .*cpu"):
        paper_table(DIT_B2, None, load_profile("raspberry-pi-5"))
