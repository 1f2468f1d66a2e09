"""What `scripts/bench graph` compares computes the same: else a ratio of times would say nothing."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from _bench_graph import FEATURES, Without

from kind_edge.budget.denoiser_graph import write
from kind_edge.budget.probe_graph import Layer, Network, random_denoiser
from kind_edge.deploy.parity import sqnr_db

BLOCKS = (("attn", "mlp"), ("mlp",))


@pytest.mark.parametrize("features", [*([each] for each in FEATURES), [*FEATURES]], ids="-".join)
def test_a_graph_without_features_computes_the_same(features: list[str]) -> None:
    model = random_denoiser(Network(8, 1, 2, 1, 32, 4, 64, BLOCKS, Layer("fp32", 6, 2), null_branch=True))  # type: ignore[arg-type]
    graphs = [write(model), Without(model, features).proto()]
    assert len(graphs[0].graph.node) < len(graphs[1].graph.node) or features == ["biases"]
    inputs = {
        "sample": np.random.default_rng(0).standard_normal((3, 1, 8, 8), dtype=np.float32),
        "step_index": np.array([3, 0, 2], np.int32),
        "class_index": np.array([1, 2, 0]),
    }
    wanted, got = (_run(each, inputs) for each in graphs)
    assert sqnr_db(wanted, got) >= 100


def _run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]
