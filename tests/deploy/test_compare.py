"""Two models in turns: fair to both, with a ratio that a slow machine does not move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy import compare as comparing
from kind_edge.deploy.bench import LatencyReport, bench_model
from kind_edge.deploy.compare import CALLS_PER_TURN, MIN_ROUNDS, compare, judge
from kind_edge.deploy.measuring import MeasuringProcess
from kind_edge.errors import InputError, UsageError


def save_product(path: Path, size: int) -> Path:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [size, size])],
        [numpy_helper.from_array(np.ones((size, size), np.float32), "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The second has 64 times the work of the first."""
    folder = tmp_path_factory.mktemp("compare")
    return save_product(folder / "small.onnx", 96), save_product(folder / "large.onnx", 384)


@pytest.fixture(scope="module")
def report(models: tuple[Path, Path]) -> LatencyReport:
    return bench_model(models[0], threads=1, warmups=0, runs=1)


def test_turns_go_forth_and_back(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Watched(MeasuringProcess):
        def ask(self, runs: int, untimed: int = 0) -> list[float]:
            asked.append(Path(self.request["path"]).stem)
            assert (runs, untimed) == (CALLS_PER_TURN, 1)
            return super().ask(runs, untimed)

    monkeypatch.setattr(comparing, "MeasuringProcess", Watched)
    found = compare(*models, threads=1, runs=1)
    assert asked == ["small", "large", "large", "small"] * 2 + ["small", "large"]
    assert (found.rounds, found.first.runs) == (MIN_ROUNDS, MIN_ROUNDS * CALLS_PER_TURN)
    assert found.lowest <= found.low <= found.ratio <= found.high <= found.highest < 1
    assert found.first.peak_memory_bytes is not None
    assert found.other_load is not None
    assert found.to_dict()["quiet"] is (found.other_load <= 0.05)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_a_slow_spell_of_the_machine_does_not_move_the_ratio(ratio: float, report: LatencyReport) -> None:
    generator = np.random.default_rng(0)
    spells = np.repeat([1.0, 9.0, 2.0, 5.0], 5)  # the machine, round by round
    noise = 1 + 0.02 * generator.standard_normal((2, 20, 5))
    first, second = (ratio * spells[:, None] * noise[0]), (spells[:, None] * noise[1])
    found = judge(report, report, first.tolist(), second.tolist(), 0.5)
    assert found.low <= ratio <= found.high
    assert found.high / found.low < 1.05
    assert not found.quiet
    apart = np.median(first[:10]) / np.median(second[10:])  # one after the other
    assert abs(apart / ratio - 1) > 0.3


def test_unlike_things_are_not_compared(
    models: tuple[Path, Path], make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="a bundle draws a whole image"):
        compare(models[0], make_bundle())
    with pytest.raises(InputError, match="no such model file"):
        compare(models[0], tmp_path / "gone.onnx")


def test_two_bundles_draw_an_image_each(make_bundle: Callable[..., Path]) -> None:
    folder = make_bundle()
    found = compare(folder, folder, threads=1, runs=1)
    values: dict[str, Any] = found.to_dict()
    assert values["first"]["subject"] == values["second"]["subject"] == "image"
    assert values["first"]["runs"] == MIN_ROUNDS
