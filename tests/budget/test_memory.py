"""Peak memory: predicted, and measured in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kind_edge.budget.cost import deployed_fixed_cost, fixed_memory_bytes, matrix_cost, matrix_memory_bytes
from kind_edge.budget.decoder import DecoderCost
from kind_edge.budget.precision import Precision
from kind_edge.budget.probe_graph import Layer, Network, network
from kind_edge.deploy.bench import bench_model
from kind_edge.model.spec import MatrixShape, ModelSpec

WIDTH, DEPTH, HEADS = 512, 8, 8
SPEC = ModelSpec(32, 3, 4, WIDTH, DEPTH, HEADS, 2)
NONE = DecoderCost(0, 0, 0)


def predicted(precision: Precision, batch: int) -> int:
    fixed = deployed_fixed_cost(SPEC, 2, 4, True, precision)
    dense = [matrix_cost(SPEC, matrix, "dense", 0, 0, 0, precision) for matrix in SPEC.matrices()]
    return fixed_memory_bytes(fixed, batch, NONE) + sum(matrix_memory_bytes(one, batch) for one in dense)


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux")
@pytest.mark.parametrize(("precision", "batch"), [("fp32", 1), ("int8", 2)])
def test_the_peak_is_as_predicted(precision: Precision, batch: int, tmp_path: Path) -> None:
    """In int8 this fails where freed weights stay in the heap: they are as much again."""
    blocks, path = (("attn", "mlp"),) * DEPTH, tmp_path / "model.onnx"
    shape = Network(32, 3, 4, 3, WIDTH, HEADS, 4 * WIDTH, blocks, Layer(precision))  # type: ignore[arg-type]
    path.write_bytes(network(shape))
    peak = bench_model(path, threads=1, warmups=1, runs=2, batch=batch).peak_memory_bytes
    assert peak == pytest.approx(predicted(precision, batch), rel=0.15)


def test_small_weights_stay_in_the_heap() -> None:
    small, large = (matrix_cost(SPEC, MatrixShape("q", n, n), "dense", 0, 0, 0, "fp32") for n in (128, 512))
    per_byte = [matrix_memory_bytes(cost) / cost.weight_bytes for cost in (small, large)]
    assert per_byte[0] > 1.5 > 1.05 > per_byte[1] >= 1


def test_tailors_count_for_every_row() -> None:
    tailors = matrix_cost(SPEC, MatrixShape("q", 512, 512), "dropped", 0, 8, 10, "int8")
    one, two = (matrix_memory_bytes(tailors, batch) for batch in (1, 2))
    assert two - one == 4 * 8 * (512 + 512)
    nothing = matrix_cost(SPEC, MatrixShape("q", 512, 512), "dropped", 0, 0, 0, "int8")
    assert matrix_memory_bytes(nothing) == 0
