"""The ONNX files: what they hold, that they compute the same, and that classes cannot reach each other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from kind_edge.budget.cost import deployed_fixed_cost, matrix_cost
from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.parity import sqnr_db
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.errors import InputError, UsageError
from kind_edge.exporters.onnx_graph import OPSET, to_onnx
from kind_edge.exporters.onnx_int8 import _per_component, quantize_int8
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.registry import FORMATS, exporter, exporters, packagers

MakeCheckpoint = Callable[..., Checkpoint]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
FP32, INT8 = "onnx/denoiser.onnx", "onnx/denoiser.int8.onnx"
WIDE = {"width": 32, "depth": 1, "learngene_rank": 12}
CLASSES = ("coat", "sneaker")
# One matrix of a block each: both storages with and without tailors, and nothing but a tailor.
MATRICES = {
    "attn.q": ("factored", 9, 2), "attn.k": ("dense", 12, 1), "attn.v": ("factored", 5, 0), "attn.o": ("dropped", 0, 2),
    "mlp.fc1": ("dense", 12, 0), "mlp.fc2": ("factored", 12, 2),
}  # fmt: skip


def plain_model(checkpoint: Checkpoint, modulation: str | None = None) -> PlainDiT:
    """A switch model of two classes with every kind of matrix, baked unless it has a label embedding."""
    spec = checkpoint.spec
    matrices = {f"blocks.0.{name}": MatrixPlan(storage, "fp32", *ranks) for name, (storage, *ranks) in MATRICES.items()}
    sampler = "euler" if spec.objective == "flow" else "ddim"
    unknown = {field.name: None for field in dataclasses.fields(Plan)}  # these alone are looked at:
    plan = Plan(**{
        **unknown, "checkpoint_sha256": "", "form": "switch", "classes": CLASSES, "matrices": matrices,
        "modulation": modulation or ("network" if spec.label_embedding else "baked"), "sampler": sampler, "steps": 4,
        "guidance": 1.0, "evaluations_per_step": 1,
    })  # fmt: skip
    timesteps = torch.from_numpy(sampler_table(sampler, spec.objective, 4).timestep)
    return fold(truncate(checkpoint, plan, None), plan, timesteps)


def write(model: PlainDiT, folder: Path) -> None:
    files = exporter("onnx").export(model, folder, ("fp32", "int8"))
    (folder / "entries.json").write_text(json.dumps({file.path: file.entry for file in files}))


@pytest.fixture(scope="module")
def plain(make_checkpoint: MakeCheckpoint) -> PlainDiT:
    return plain_model(make_checkpoint(**WIDE))


@pytest.fixture(scope="module")
def exported(plain: PlainDiT, made_once: MadeOnce) -> Path:
    return made_once("onnx-switch", lambda folder: write(plain, folder))


@pytest.fixture(scope="module")
def labelled(make_checkpoint: MakeCheckpoint) -> PlainDiT:
    shape = {"label_embedding": True, "learned_sigma": True, "objective": "epsilon", "channels": 3}
    return plain_model(make_checkpoint(**WIDE, **shape))


@pytest.fixture(scope="module")
def exported_labelled(labelled: PlainDiT, made_once: MadeOnce) -> Path:
    return made_once("onnx-labelled", lambda folder: write(labelled, folder))


def worst_db(model: PlainDiT, path: Path, batch: int) -> float:
    """The file against the plain model, over classes, the null class and steps."""
    run, step_name, worst = exporter("onnx").open(path), model.input_names[1], float("inf")
    for label in range(3):
        for row, timestep in enumerate((999.0, 750.0, 500.0, 250.0)):
            sample = torch.randn(batch, model.spec.channels, 8, 8, generator=torch.Generator().manual_seed(row))
            baked = step_name == "step_index"
            step = torch.full((batch,), row).int() if baked else torch.full((batch,), timestep)
            classes = torch.full((batch,), label)
            got = run({"sample": sample.numpy(), step_name: step.numpy(), "class_index": classes.numpy()})
            wanted = model(sample, step, classes).numpy()
            assert got.shape == wanted.shape
            worst = min(worst, sqnr_db(wanted, got))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_fp32_computes_the_same_at_any_batch(batch: int, plain: PlainDiT, exported: Path) -> None:
    assert worst_db(plain, exported / FP32, batch) >= 100


def test_int8_keeps_its_gate_and_is_smaller(plain: PlainDiT, exported: Path) -> None:
    assert worst_db(plain, exported / INT8, 1) >= 25
    assert (exported / INT8).stat().st_size < (exported / FP32).stat().st_size
    exporter("onnx").open(exported / INT8)({
        "sample": np.zeros((3, 1, 8, 8), np.float32),
        "step_index": np.zeros(3, np.int32),
        "class_index": np.arange(3, dtype=np.int64),
    })  # fmt: skip


@pytest.mark.slow
def test_a_model_with_labels_and_a_learned_variance(labelled: PlainDiT, exported_labelled: Path) -> None:
    assert worst_db(labelled, exported_labelled / FP32, 2) >= 100
    assert worst_db(labelled, exported_labelled / INT8, 1) >= 25
    entry = json.loads((exported_labelled / "entries.json").read_text())[INT8]
    assert entry["inputs"][:2] == [
        {"name": "sample", "dtype": "float32", "shape": ["batch", 3, 8, 8]},
        {"name": "timestep", "dtype": "float32", "shape": ["batch"]},
    ]
    assert entry["outputs"] == [{"name": "prediction", "dtype": "float32", "shape": ["batch", 6, 8, 8]}]


@pytest.mark.parametrize(("modulation", "gate_db"), [("baked", 100), ("baked-fp16", 45), ("network", 100)])
@pytest.mark.parametrize("label_embedding", [False, True])
def test_modulation_holds_what_is_counted_and_keeps_its_gate(
    modulation: str, gate_db: float, label_embedding: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """Of a batch of several classes at several steps, the null class among them."""
    checkpoint = make_checkpoint(**WIDE, label_embedding=label_embedding)
    exact, model = (plain_model(checkpoint, each) for each in ("network", modulation))
    onnx.save_model(to_onnx(model), tmp_path / "model.onnx")
    spec, baked, half = model.spec, modulation != "network", modulation == "baked-fp16"
    costs = [
        matrix_cost(spec, shape, MATRICES[shape.name[9:]][0], *MATRICES[shape.name[9:]][1:], 2, "fp32")
        for shape in spec.matrices()
    ]
    predicted = deployed_fixed_cost(spec, 2, 4, baked, "fp32", half_table=half).weight_bytes
    predicted += sum(cost.weight_bytes for cost in costs)
    held = sum(value.nbytes for value in initializers(tmp_path / "model.onnx").values())
    # Beside it: the normalisations' ones, sizes, and in a network the frequencies of the timestep.
    assert 0 <= held - predicted <= 4 * spec.width + 4 * 128 + 300
    sample, rows, classes = torch.randn(6, 1, 8, 8), torch.arange(6) % 4, torch.arange(6) % 3
    timesteps = model.origin.timesteps[rows].float()
    step = {"step_index": rows.int().numpy()} if baked else {"timestep": timesteps.numpy()}
    got = exporter("onnx").open(tmp_path / "model.onnx")(
        {"sample": sample.numpy(), "class_index": classes.numpy(), **step}
    )
    wanted = exact(sample, timesteps, classes).numpy()
    worst = min(sqnr_db(*pair) for pair in zip(wanted, got, strict=True))
    assert gate_db <= worst <= (100 if half else 1000)


def test_attention_may_be_spelt_out(plain: PlainDiT, tmp_path: Path) -> None:
    onnx.save_model(to_onnx(plain, fused_attention=False), tmp_path / "model.onnx")
    assert not [node for node in onnx.load_model(tmp_path / "model.onnx").graph.node if node.op_type == "Attention"]
    assert worst_db(plain, tmp_path / "model.onnx", 2) >= 100


def test_a_batch_may_mix_classes_and_steps(plain: PlainDiT, exported: Path) -> None:
    sample, step, classes = torch.randn(4, 1, 8, 8), torch.tensor([3, 0, 2, 1]).int(), torch.tensor([2, 0, 1, 0])
    got = exporter("onnx").open(exported / FP32)(
        {"sample": sample.numpy(), "step_index": step.numpy(), "class_index": classes.numpy()}
    )
    for i in range(4):
        wanted = plain(sample[i : i + 1], step[i : i + 1], classes[i : i + 1]).numpy()
        assert sqnr_db(wanted, got[i : i + 1]) >= 100


@pytest.mark.parametrize("file", [FP32, INT8])
def test_inputs_and_outputs_are_those_of_the_contract(file: str, exported: Path) -> None:
    entry = json.loads((exported / "entries.json").read_text())[file]
    assert entry == {
        "role": "denoiser",
        "precision": "int8" if "int8" in file else "fp32",
        "inputs": [
            {"name": "sample", "dtype": "float32", "shape": ["batch", 1, 8, 8]},
            {"name": "step_index", "dtype": "int32", "shape": ["batch"]},
            {"name": "class_index", "dtype": "int64", "shape": ["batch"]},
        ],
        "outputs": [{"name": "prediction", "dtype": "float32", "shape": ["batch", 1, 8, 8]}],
        **({"wide_operators": ["final"]} if "int8" in file else {}),
    }


@pytest.mark.parametrize("file", [FP32, INT8])
def test_a_file_holds_nothing_but_the_model(file: str, exported: Path) -> None:
    content = (exported / file).read_bytes()
    words = ["Traceback", "pkg.torch", ".py", "stack_trace", "namespace", "onnx.infer"]
    assert [word for word in [*words, str(Path.home()), str(Path.cwd())] if word.encode() in content] == []
    model = onnx.load_model(exported / file, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {o.domain: o.version for o in model.opset_import}[""] == OPSET
    assert (model.producer_name, model.producer_version, model.doc_string) == ("kind-edge", "", "")
    assert all(tensor.data_location == TensorProto.DEFAULT for tensor in model.graph.initializer)
    assert {entry.key for entry in model.metadata_props} == {"model_license", "training_data"}  # whose it is, as stated
    nothing = [model.graph.metadata_props, model.functions, model.graph.value_info]
    nothing += [node.metadata_props for node in model.graph.node]
    assert not any(len(entries) for entries in nothing)
    assert sorted(path.name for path in (exported / "onnx").iterdir()) == ["denoiser.int8.onnx", "denoiser.onnx"]


def initializers(path: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_model(path).graph.initializer}


def test_int8_leaves_no_large_matrix_in_floating_point(exported: Path) -> None:
    values = initializers(exported / INT8)
    tables = {name: value for name, value in values.items() if name.startswith("tailors.") and value.ndim > 1}
    kinds = {name: str(value.dtype) for name, value in tables.items()}
    # A table for each side and width, of four matrices with tailors of rank 2 + 1 + 2 + 2; the last has 128 inputs.
    assert kinds == {f"tailors.0.{table}.int8": "int8" for table in ("v.32", "v.128", "u.32")} | {
        f"tailors.0.{table}.int8.scale": "float32" for table in ("v.32", "v.128", "u.32")
    }
    shapes = {name: value.shape for name, value in tables.items() if name.endswith(".int8")}
    assert sorted(shapes.values()) == [(2, 2, 128), (2, 5, 32), (2, 7, 32)]
    assert all(value.shape[2] == 1 for name, value in tables.items() if name.endswith(".scale"))
    # Left in floating point: the tables of steps and positions (and what is small: patches, biases, the last layer).
    floats = sorted(value.shape for value in values.values() if value.dtype == np.float32 and value.size >= 32 * 5)
    assert floats == [(4, 256), (16, 32)]
    products = [node.op_type for node in onnx.load_model(exported / INT8).graph.node]
    assert products.count("MatMulInteger") == 2 * 3 + 2  # three factored, two dense


def test_quantizing_leaves_its_input_alone(exported: Path) -> None:
    model = onnx.load_model(exported / FP32)
    before = model.SerializeToString(deterministic=True)
    quantized = quantize_int8(model)
    assert model.SerializeToString(deterministic=True) == before
    written = onnx.load_model(exported / INT8)
    onnx.helper.set_model_props(quantized, {entry.key: entry.value for entry in written.metadata_props})
    assert quantized.SerializeToString(deterministic=True) == written.SerializeToString(deterministic=True)


@pytest.mark.slow
def test_a_class_is_nothing_but_its_tailor(make_checkpoint: MakeCheckpoint, exported: Path, tmp_path: Path) -> None:
    """Another tailor for one class changes no bit of the others, null included; and all else in the file is equal."""
    checkpoint = make_checkpoint(**WIDE)
    tensors = {name: tensor.clone() for name, tensor in checkpoint.tensors.items()}
    for name, tensor in tensors.items():
        if ".tailors." in name:
            tensor[0] = 3 * tensor[0].flip(0) + 0.1  # sneaker: class 1 of the bundle
    write(plain_model(dataclasses.replace(checkpoint, tensors=tensors)), tmp_path)
    for file, batch in ((FP32, 3), (INT8, 1)):
        before, after = (exporter("onnx").open(folder / file) for folder in (exported, tmp_path))
        for label, same in ((0, True), (1, False), (2, True)):
            inputs = {
                "sample": torch.randn(batch, 1, 8, 8).numpy(),
                "step_index": np.full(batch, 2, np.int32),
                "class_index": np.full(batch, label),
            }
            assert np.array_equal(before(inputs), after(inputs)) == same, (file, label)
        old, new = initializers(exported / file), initializers(tmp_path / file)
        changed = {name for name in old if not np.array_equal(old[name], new[name])}
        assert old.keys() == new.keys()
        assert all(old[name].ndim == 3 and np.array_equal(old[name][0], new[name][0]) for name in changed)
        assert len(changed) == (3 if file == FP32 else 6)


@given(st.integers(1, 4), st.integers(1, 12), st.integers(1, 16), st.integers(0, 9), st.floats(1e-6, 1e3))
def test_int8_components_are_within_half_a_step(classes: int, size: int, rank: int, seed: int, scale: float) -> None:
    table = (np.random.default_rng(seed).normal(size=(classes, rank, size)) * scale).astype(np.float32)
    table[0, 0] = 0
    values, scales = _per_component(table)
    assert values.dtype == np.int8
    assert scales.dtype == np.float32
    assert (np.abs(values * scales - table) <= 0.5001 * scales).all()
    other = table.copy()
    other[-1] *= 100  # another class's values do not matter
    again, scales_again = _per_component(other)
    assert np.array_equal(again[:-1], values[:-1])
    assert np.array_equal(scales_again[:-1], scales[:-1])


def test_formats_are_found_by_name_and_files_that_are_none_refused(tmp_path: Path) -> None:
    names = [each.name for each in exporters(FORMATS)]
    assert [name for name in FORMATS if name in names] == names
    assert len(names) + len(packagers(FORMATS)) == len(FORMATS)
    with pytest.raises(UsageError, match="unknown format 'onxn'; did you mean: onnx"):
        exporter("onxn")
    with pytest.raises(InputError, match="no such model file"):
        exporter("onnx").open(tmp_path / "none.onnx")
