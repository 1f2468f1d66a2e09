"""Whole packages in NumPy: the function they compute, their weights bit for bit, compression, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.parity import sqnr_db
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.errors import UsageError
from kind_edge.exporters.coreml_compress import parameter_of
from kind_edge.exporters.coreml_graph import Denoiser
from kind_edge.exporters.mil_blob import unpack_bits
from kind_edge.exporters.mil_reference import load_function, open_package, package_weights
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.registry import exporter

Array = NDArray[Any]
MadeOnce = Callable[[str, Callable[[Path], object]], Path]
PACKAGE = "Model.mlpackage"
FEW = settings(max_examples=1, phases=[Phase.explicit, Phase.generate])  # a program takes a while to write


def tiny_plain(checkpoint: Checkpoint) -> PlainDiT:
    """Two classes at full rank, baked, with matrices of both storages."""
    matrices = {
        matrix.name: MatrixPlan("dense" if matrix.name.endswith("fc1") else "factored", "fp32", 6, 2)
        for matrix in checkpoint.spec.matrices()
    }
    unknown = {field.name: None for field in dataclasses.fields(Plan)}
    plan = Plan(**{
        **unknown, "checkpoint_sha256": "ab" * 32, "model": "tiny", "form": "switch", "classes": ("coat", "bag"),
        "matrices": matrices, "modulation": "baked", "precision": "fp16", "sampler": "euler", "steps": 4,
        "guidance": 2.0, "evaluations_per_step": 2,
    })  # fmt: skip
    timesteps = torch.from_numpy(sampler_table("euler", "flow", 4).timestep)
    return fold(truncate(checkpoint, plan, None), plan, timesteps).eval()


def points(count: int) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((count, 1, 8, 8)).astype(np.float32),
        "step_index": (np.arange(count) % 4).astype(np.int32), "class_index": np.arange(count) % 3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(make_checkpoint: Callable[..., Checkpoint]) -> PlainDiT:
    return tiny_plain(make_checkpoint())


@pytest.fixture(scope="module")
def package(plain: PlainDiT, made_once: MadeOnce) -> Path:
    """The model at iOS 16, in fp16, for batches of two. Only to be read."""
    coreml = exporter("coreml", {"target": "iOS16", "weights": "fp16"})
    return made_once("mil-package", lambda folder: coreml.export(plain, folder, ())) / "coreml/Denoiser.mlpackage"


@pytest.mark.parametrize("count", [1, 5])
def test_a_package_computes_what_its_model_does(plain: PlainDiT, package: Path, count: int) -> None:
    """In fp16, at batches that are not its own: every class, the null class, every step."""
    inputs = points(count)
    with torch.no_grad():
        wanted = plain(*(torch.from_numpy(array) for array in inputs.values())).numpy()
    got = open_package(package)(inputs)
    assert (got.shape, got.dtype) == (wanted.shape, np.float32)
    assert min(sqnr_db(a, b) for a, b in zip(wanted, got, strict=True)) > 50


def test_weights_are_the_models_bit_for_bit(plain: PlainDiT, package: Path) -> None:
    """Every weight of the merged model, by its name, in fp16: nearest, ties to even."""
    wanted = {name: tensor.detach().half().numpy() for name, tensor in Denoiser(plain, "tokens").named_parameters()}
    stored = {parameter_of(name, list(wanted)): array for name, array in package_weights(package).items()}
    assert len(wanted) > 40
    assert stored.keys() >= wanted.keys()
    for name, array in wanted.items():
        assert (stored[name].shape, stored[name].tobytes()) == (array.shape, array.tobytes()), name


# Compression


def indices_of(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> Array:
    return rng.integers(0, 1 << bits, shape).astype(np.uint8)


@given(
    rows=st.integers(1, 5), groups=st.integers(1, 3), bits=st.sampled_from([1, 2, 3, 4, 6, 8]), seed=st.integers(0, 9)
)
@example(rows=5, groups=1, bits=3, seed=0)
@example(rows=3, groups=3, bits=6, seed=0)
@FEW
def test_compressed_weights(save_program: Callable[..., Path], rows: int, groups: int, bits: int, seed: int) -> None:
    """Palettes of one tensor and of groups, integers with scales of blocks, channels and tensors, below a byte too."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    rng = np.random.default_rng(seed)
    shape = (rows * groups, 32)
    indices, lut = indices_of(rng, shape, bits), rng.standard_normal((groups, 1, 1 << bits, 1)).astype(np.float16)
    palette = {f"p{c}": lut[c, 0, :, 0] for c in range(groups)}
    wanted = {"grouped": np.concatenate([palette[f"p{c}"][indices[c * rows : (c + 1) * rows]] for c in range(groups)])}
    kind = getattr(types, f"np_uint{bits}_dtype", np.uint8)
    sixteen = bits if bits != 3 else 4
    packed = indices_of(rng, (math.ceil(sixteen * math.prod(shape) / 8),), 8)
    one = rng.standard_normal(1 << sixteen).astype(np.float16)
    flat = unpack_bits(packed, sixteen, math.prod(shape)) if sixteen < 8 else packed
    scale = rng.uniform(0.01, 1, (rows * groups, 4)).astype(np.float16)
    signed = rng.integers(-8, 8, shape).astype(np.int8)
    offset = rng.integers(0, 255, scale.shape).astype(np.uint8)
    unsigned = rng.integers(0, 255, shape).astype(np.uint8)
    by_block = scale.repeat(8, 1).astype(np.float32)
    wanted |= {
        "int4": signed * by_block, "shifted": (unsigned - offset.repeat(8, 1).astype(np.float32)) * by_block,
        "palette": one[flat].reshape(shape), "affine": (unsigned - np.float32(7)) * scale[:, :1].astype(np.float32),
        "cast": scale,
    }  # fmt: skip

    def new(x: Any) -> dict[str, Any]:
        four = signed.astype(types.np_int4_dtype)
        return {
            "grouped": mb.constexpr_lut_to_dense(indices=indices.astype(kind), lut=lut),
            "int4": mb.constexpr_blockwise_shift_scale(data=four, scale=scale),
            "shifted": mb.constexpr_blockwise_shift_scale(data=unsigned, scale=scale, offset=offset),
        }

    def old(x: Any) -> dict[str, Any]:
        return {
            "palette": mb.constexpr_lut_to_dense(indices=packed, lut=one, shape=np.array(shape, np.uint32)),
            "affine": mb.constexpr_affine_dequantize(
                quantized_data=unsigned, zero_point=np.uint8(7), scale=scale[:, 0], axis=np.int32(0)
            ),
            "cast": mb.constexpr_cast(source_val=scale, output_dtype="fp32"),
        }

    for ios, body in ((16, old), (18, new)):
        with TemporaryDirectory() as folder:
            path = save_program(Path(folder), body, {"x": np.zeros(1, np.float32)}, ios)
            got = load_function(path)({"x": np.zeros(1, np.float32)})
            weights = package_weights(path)
        assert len(weights) == len(got)
        for name, array in got.items():
            assert (array == wanted[name].astype(array.dtype)).all(), name


# Flexible shapes and several functions


class Attend(nn.Module):
    """x [B, N, D] -> [B, N, D]; three reshapes of one flexible batch, which the converter has to reconcile."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_flexible_batch(tmp_path: Path) -> None:
    import coremltools as ct

    module, dim, x = Attend(8).eval(), torch.export.Dim("batch", min=1, max=3), torch.randn(7, 5, 8)
    exported = torch.export.export(module, (x[:2],), dynamic_shapes=({0: dim},)).run_decompositions({})
    outputs, target = [ct.TensorType(name="prediction")], ct.target.iOS18
    model = ct.convert(exported, outputs=outputs, minimum_deployment_target=target, skip_model_load=True)
    model.save(str(tmp_path / PACKAGE))
    with torch.no_grad():
        assert sqnr_db(module(x).numpy(), open_package(tmp_path / PACKAGE)({"x": x.numpy()})) > 55


def test_functions_of_one_package(save_program: Callable[..., Path], tmp_path: Path) -> None:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    x = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    parts = ct.utils.MultiFunctionDescriptor()
    for name, slope in (("twice", 2), ("thrice", 3)):
        (tmp_path / name).mkdir()
        path = save_program(tmp_path / name, lambda x, slope=slope: {"y": mb.mul(x=x, y=np.float32(slope))}, x, 18)
        parts.add_function(str(path), src_function_name="main", target_function_name=name)
    parts.default_function_name = "thrice"
    ct.utils.save_multifunction(parts, str(tmp_path / PACKAGE))
    for name, slope in (("twice", 2), ("thrice", 3), (None, 3)):
        assert np.array_equal(open_package(tmp_path / PACKAGE, name)(x), slope * x["x"])
    assert np.array_equal(exporter("coreml").open(tmp_path / f"{PACKAGE}#twice")(x), 2 * x["x"])
    with pytest.raises(UsageError, match="unknown function 'twise'; did you mean: twice"):
        open_package(tmp_path / PACKAGE, "twise")
