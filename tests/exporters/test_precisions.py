"""Every precision of every kind of model: close enough, as small as counted, and static where NPUs want it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.budget.precision import PRECISIONS, denoiser_path
from kind_edge.deploy.manifest import ModelEntry, TensorInfo
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.parity import sqnr_db
from kind_edge.deploy.plain import PlainDiT, Tailors
from kind_edge.deploy.reference import make_reference
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.verify import Reference, verify_model
from kind_edge.exporters.activation_ranges import Histogram
from kind_edge.exporters.onnx_blocks import without_gemm
from kind_edge.exporters.onnx_precisions import Precisions
from kind_edge.exporters.rounding import round_matrix
from kind_edge.exporters.static_graph import to_static
from kind_edge.exporters.trajectories import Call, call_dbs, chosen_wide, open_model, walk
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.registry import exporter

MakeCheckpoint = Callable[..., Checkpoint]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
CLASSES = ("coat", "sneaker")
# One matrix of a block each: both storages with and without tailors, and nothing but a tailor.
MATRICES = {
    "attn.q": ("factored", 9, 2), "attn.k": ("dense", 12, 1), "attn.v": ("factored", 5, 0), "attn.o": ("dropped", 0, 2),
    "mlp.fc1": ("dense", 12, 0), "mlp.fc2": ("factored", 12, 2),
}  # fmt: skip
KINDS = {
    "guided": {},
    "labelled": {"label_embedding": True, "objective": "epsilon", "learned_sigma": True, "channels": 3},
    "distilled": {"step_counts": (1, 2, 4), "inside_guidance": 1.75},
    "single": {},
}
SHAPE = {"width": 32, "depth": 1, "learngene_rank": 12}
STATIC = [name for name, traits in PRECISIONS.items() if traits.static]
FILES = [name for name in PRECISIONS if name != "int8"]  # tested by itself
WRITTEN = {"guided": FILES, "labelled": FILES, "distilled": STATIC, "single": STATIC}
"""PyTorch's exporter takes seconds, so not everything is made of everything; static graphs are built without it."""


def plain_model(checkpoint: Checkpoint, kind: str) -> PlainDiT:
    """With every kind of matrix; guided in the sampling loop, unless it is distilled or of one class."""
    spec = checkpoint.spec
    form, guided = ("single" if kind == "single" else "switch"), kind in ("guided", "labelled")
    matrices = {}
    for name, (storage, shared, tailor) in MATRICES.items():
        ranks = (None, None, shared or 3) if form == "single" else (shared, tailor, None)
        kept = "factored" if form == "single" and storage == "dropped" else storage
        matrices[f"blocks.0.{name}"] = MatrixPlan(kept, "fp32", *ranks)
    sampler = "euler" if spec.objective == "flow" else "ddim"
    unknown = {field.name: None for field in dataclasses.fields(Plan)}  # these alone are looked at:
    plan = Plan(**{
        **unknown, "checkpoint_sha256": "", "form": form, "classes": CLASSES[: 1 if form == "single" else 2],
        "matrices": matrices, "modulation": "network" if spec.label_embedding else "baked", "sampler": sampler,
        "steps": 4, "guidance": 1.5 if guided else 1.0, "evaluations_per_step": 1 + guided, "precision": "fp32",
        "inside_guidance": spec.inside_guidance,
    })  # fmt: skip
    timesteps = torch.from_numpy(sampler_table(sampler, spec.objective, 4).timestep)
    return fold(truncate(checkpoint, plan, None), plan, timesteps)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(kind: str, make_checkpoint: MakeCheckpoint) -> PlainDiT:
    return plain_model(make_checkpoint(**{**SHAPE, **KINDS[kind]}), kind)


@pytest.fixture(scope="module")
def exported(kind: str, plain: PlainDiT, made_once: MadeOnce) -> Path:
    def write(folder: Path) -> None:
        files = exporter("onnx").export(plain, folder, tuple(WRITTEN[kind]))
        (folder / "entries.json").write_text(json.dumps({file.path: file.entry for file in files}))

    return made_once(f"precisions-{kind}", write)


@pytest.fixture(scope="module")
def reference(plain: PlainDiT) -> Reference:
    origin = plain.origin
    return make_reference(origin.truncated, origin.plan.form, origin.timesteps, None, seed=3)


def entry_of(folder: Path, precision: str) -> ModelEntry:
    """What a manifest would say of the file."""
    values = json.loads((folder / "entries.json").read_text())[denoiser_path(precision)]
    tensors = {
        part: tuple(TensorInfo(each["name"], each["dtype"], tuple(each["shape"])) for each in values[part])
        for part in ("inputs", "outputs")
    }
    wide = tuple(values.get("wide_operators", ()))
    return ModelEntry(denoiser_path(precision), "denoiser", precision, **tensors, wide_operators=wide)


def test_every_precision_keeps_its_gate_and_its_interface(
    kind: str, plain: PlainDiT, exported: Path, reference: Reference
) -> None:
    for precision in WRITTEN[kind]:
        entry = entry_of(exported, precision)
        parity = verify_model(exported, entry, reference, plain.origin.plan.classes)
        assert parity.failures == (), precision
        proto = onnx.load(exported / entry.path)
        assert {entry.key for entry in proto.metadata_props} == {"model_license", "training_data"}
        assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
        assert len({node.name for node in proto.graph.node}) == len(proto.graph.node)


@pytest.mark.parametrize("precision", [name for name in FILES if PRECISIONS[name].weight_bits <= 8])
def test_a_wrong_scale_fails_the_gate(
    precision: str, kind: str, plain: PlainDiT, exported: Path, reference: Reference, tmp_path: Path
) -> None:
    if kind != "guided":
        pytest.skip("one kind of model shows it")
    entry = entry_of(exported, precision)
    proto = onnx.load(exported / entry.path)
    last = [node.input[2] for node in proto.graph.node if node.op_type == "MatMulNBits"]
    last += [node.input[1] for node in proto.graph.node if node.input[0] == "final.weight.int8"]
    scale = next(tensor for tensor in proto.graph.initializer if tensor.name == last[-1])
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.5), scale.name))
    (tmp_path / "onnx").mkdir()
    onnx.save(proto, tmp_path / entry.path)
    parity = verify_model(tmp_path, entry, reference, plain.origin.plan.classes)
    assert parity.failures
    assert all("dB, want" in failure for failure in parity.failures)


def test_half_precision_and_blocks_are_as_small_as_they_say(kind: str, plain: PlainDiT, exported: Path) -> None:
    if "int4" not in WRITTEN[kind]:
        pytest.skip("not made of this model")
    floats = {
        precision: sum(
            int(np.prod(tensor.dims))
            for tensor in onnx.load(exported / denoiser_path(precision)).graph.initializer
            if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 and not tensor.name.endswith("scales")
        )
        for precision in ("fp32", "fp16", "int8-weights", "int4")
    }
    assert floats["fp16"] == 0
    left = plain.patch_embed.weight.numel() + plain.pos_embed.numel()  # what is no matrix of a product
    left += plain.modulation.table.numel() if hasattr(plain.modulation, "table") else 0
    left += plain.modulation.y_embed.weight.numel() if getattr(plain.modulation, "y_embed", None) is not None else 0
    assert floats["int4"] <= left < floats["fp32"]
    assert floats["int8-weights"] <= left + 2 * sum(t.v.shape[0] * t.v.shape[2] for t in tailors_of(plain))


def tailors_of(plain: PlainDiT) -> list[Tailors]:
    return [module for module in plain.modules() if isinstance(module, Tailors)]


# What ONNX Runtime's QNN provider has a builder for, of what our models consist of; ranks are limited to five.
QNN_OPERATORS = {
    "Add", "Conv", "DepthToSpace", "DequantizeLinear", "Gather", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Mul",
    "QuantizeLinear", "Reshape", "Softmax", "Transpose",
}  # fmt: skip
QNN_TYPES = {
    TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16,
}  # fmt: skip


def qnn_refusals(proto: onnx.ModelProto) -> list[str]:
    """Everything in a graph that QNN's HTP back end refuses, or that would leave it for the CPU."""
    graph = onnx.shape_inference.infer_shapes(proto, strict_mode=True).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    takers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    found = [
        f"{n.name}: {n.domain or 'onnx'} {n.op_type}" for n in graph.node if n.domain or n.op_type not in QNN_OPERATORS
    ]
    known = [*graph.input, *graph.output, *graph.value_info]
    found += [f"{name}: no shape" for name in makers if name not in {value.name for value in known}]
    types = {value.name: value.type.tensor_type for value in known}
    for name, kind in types.items():
        sizes = [dimension.dim_value for dimension in kind.shape.dim]
        if not all(sizes) or len(sizes) > 5:
            found.append(f"{name}: shape {sizes}")
        if kind.elem_type not in QNN_TYPES:
            found.append(f"{name}: type {kind.elem_type}")
    floats = {name for name, kind in types.items() if kind.elem_type == TensorProto.FLOAT}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and constants.get(node.input[1], np.zeros(())).ndim:
            bad = {taker.op_type for taker in takers[node.output[0]]} - {"Gemm", "Conv"}
            found += [f"{node.name}: a scale per channel for {bad}"] if bad else []
            found += [f"{node.name}: asymmetric channels"] if constants[node.input[2]].any() else []
        if node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            continue
        if node.op_type == "Gather" and types[node.input[1]].elem_type != TensorProto.INT32:
            found.append(f"{node.name}: picked by {node.input[1]}")
        sources = [makers[name].op_type for name in node.input if name in floats and name in makers]
        if node.output[0] in floats and set(sources) != {"DequantizeLinear"}:
            found.append(f"{node.name}: takes {sources}")
        if node.output[0] in floats and {taker.op_type for taker in takers.get(node.output[0], [])} != {
            "QuantizeLinear"
        }:
            found.append(f"{node.name}: is not quantized")
    return found


@pytest.mark.parametrize("precision", STATIC)
def test_qnn_refuses_nothing(precision: str, exported: Path) -> None:
    assert qnn_refusals(onnx.load(exported / denoiser_path(precision))) == []


def test_qnn_would_refuse_the_others(kind: str, exported: Path) -> None:
    if "fp32" not in WRITTEN[kind]:
        pytest.skip("not made of this model")
    found = qnn_refusals(onnx.load(exported / denoiser_path("fp32")))
    assert any("shape [0" in each for each in found)
    assert any("takes" in each for each in found)


def test_the_static_graph_computes_the_same(kind: str, plain: PlainDiT, exported: Path) -> None:
    if "fp32" not in WRITTEN[kind]:
        pytest.skip("not made of this model")
    calls = walk(onnx.load(exported / denoiser_path("fp32")), plain.origin)
    session = open_model(to_static(plain.origin))
    kinds = {each.name: np.float32 if each.type == "tensor(float)" else np.int32 for each in session.get_inputs()}
    for call in calls[::7]:
        values = {**call.feeds, "step_index": np.full(len(call.prediction), call.step_index)}
        output = session.run(None, {name: values[name].astype(kind) for name, kind in kinds.items()})[0]
        assert sqnr_db(call.prediction, output) > 100


def test_equal_models_give_equal_files(kind: str, plain: PlainDiT, exported: Path) -> None:
    if kind != "distilled":
        pytest.skip("one kind of model shows it")
    for precision in STATIC:
        again, written = Precisions(plain).make(precision), onnx.load(exported / denoiser_path(precision))
        onnx.helper.set_model_props(again.proto, {entry.key: entry.value for entry in written.metadata_props})
        assert again.proto == written


@settings(max_examples=20)
@given(st.integers(0, 50), st.sampled_from([(8, 0), (8, 32), (4, 32)]))
def test_rounding_for_what_is_multiplied_errs_less(seed: int, bits_block: tuple[int, int]) -> None:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((12, 40))
    x = random.standard_normal((400, 5)) @ random.standard_normal((5, 40)) + 0.1 * random.standard_normal((400, 40))
    bits, block = bits_block

    def error(covariance: np.ndarray) -> float:
        integers, scales = round_matrix(weight, covariance, bits, block)
        assert scales.shape == (12, 2 if block else 1)
        rounded = integers * np.repeat(scales, block or 40, 1)[:, :40]
        return float(((x @ (weight - rounded).T) ** 2).sum())

    assert error(x.T @ x / len(x)) < 0.7 * error(np.eye(40))


@settings(max_examples=20)
@given(st.floats(-5, 0), st.floats(0.1, 5), st.integers(0, 9))
def test_a_range_of_evenly_spread_values_cuts_nothing_off_and_holds_zero(low: float, high: float, seed: int) -> None:
    values = np.random.default_rng(seed).uniform(low, high, 20_000)
    counts = np.histogram(values, 512, (values.min(), values.max()))[0]
    found = Histogram(float(values.min()), float(values.max()), counts).range(256)
    assert found[0] <= 0 <= found[1]
    assert found == pytest.approx((min(values.min(), 0), values.max()), abs=0.03 * (high - low))


def test_a_range_cuts_off_what_is_rare_where_steps_are_few() -> None:
    counts = np.zeros(512, np.int64)
    counts[:200], counts[-1] = 10_000, 1
    histogram = Histogram(0.0, 10.0, counts)
    assert histogram.range(256)[1] < 6
    assert histogram.range(65536)[1] > 10  # room for what was not seen


def test_what_helps_most_stays_wide() -> None:
    """Four numbers, of which three are rounded; the one whose rounding errs most is found first."""
    costs = {"a": 1e-2, "b": 1e-1, "c": 1e-3}

    def rounded(wide: tuple[str, ...]) -> onnx.ModelProto:
        error = np.array([1 + sum(cost for name, cost in costs.items() if name not in wide)], np.float32)
        node = helper.make_node("Mul", ["sample", "error"], ["prediction"])
        tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("sample", "prediction")]
        graph = helper.make_graph([node], "g", tensors[:1], tensors[1:], [numpy_helper.from_array(error, "error")])
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)

    ones = np.ones((1, 4), np.float32)
    calls = [Call(0, 0, {"sample": ones[0]}, ones[0])]
    assert chosen_wide(rounded, tuple(costs), calls, wanted_db=15.0, most=3) == ()
    assert chosen_wide(rounded, tuple(costs), calls, wanted_db=35.0, most=3) == ("b",)
    assert chosen_wide(rounded, tuple(costs), calls, wanted_db=55.0, most=3) == ("b", "a")
    assert chosen_wide(rounded, tuple(costs), calls, wanted_db=399.0, most=2) == ("b", "a")


def test_gemm_becomes_matmul_and_add(plain: PlainDiT, kind: str) -> None:
    if kind != "guided":
        pytest.skip("one kind of model shows it")
    graph = to_static(plain.origin)
    other = without_gemm(graph)
    assert {node.op_type for node in graph.graph.node} - {node.op_type for node in other.graph.node} == {"Gemm"}
    calls = walk(graph, plain.origin)
    assert min(call_dbs(other, calls[:4])) > 100
