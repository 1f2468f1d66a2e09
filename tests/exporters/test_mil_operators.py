"""Every operator of an ML program beside PyTorch: random shapes and values, in packages that Core ML Tools wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kind_edge.exporters.mil_operator import round_to_fp16
from kind_edge.exporters.mil_reference import OPERATORS, load_function

Array = NDArray[Any]


class Builder:
    """Core ML Tools' builder, imported when a test wants it: that takes seconds."""

    def __getattr__(self, name: str) -> Any:
        from coremltools.converters.mil import Builder as of_coremltools

        return getattr(of_coremltools, name)


mb = Builder()
TESTED_ELSEWHERE = {"const", "constexpr_lut_to_dense", "constexpr_blockwise_shift_scale", "constexpr_affine_dequantize",
                    "constexpr_cast"}  # fmt: skip


class Sizes(NamedTuple):
    """B images of C channels, H x W; N tokens of width D."""

    batch: int
    channels: int
    height: int
    width: int
    tokens: int
    features: int


SIZES = st.builds(Sizes, *(st.integers(1, 3), st.sampled_from([4, 8, 12]), *[st.integers(3, 7)] * 4))


class Operands:
    """Inputs of the program (as its values, or as tensors) and constants, drawn from one generator."""

    def __init__(self, sizes: Sizes, half: bool, seed: int) -> None:
        self.sizes, self.half, self.rng = sizes, half, np.random.default_rng(seed)
        b, c, h, w, n, d = sizes
        self.inputs = {
            "image": self.floats(b, c, h, w), "tokens": self.floats(b, n, d), "other": self.floats(b, n, d),
            "index": self.rng.integers(0, n, 4).astype(np.int32),
            "along": self.rng.integers(0, n, (b, 2, d)).astype(np.int32),
        }  # fmt: skip

    def floats(self, *shape: int) -> Array:
        """Values that fp16 has, none of them close to zero."""
        values = self.rng.uniform(0.125, 3, shape) * self.rng.choice([-1, 1], shape)
        return values.astype(np.float16).astype(np.float32)

    def const(self, array: Array) -> Array:
        return array.astype(np.float16) if self.half else array


Case = tuple[Callable[..., Any], Callable[..., Tensor]]
"""An operator of the builder, and what it should be in PyTorch; both take the inputs."""


def elementwise(o: Operands) -> dict[str, Case]:
    """Of tokens x and other y; floats where nothing else is said."""
    unary: dict[str, Callable[[Tensor], Tensor]] = {
        "abs": torch.abs, "exp": torch.exp, "cos": torch.cos, "sin": torch.sin, "tanh": torch.tanh,
        "square": torch.square, "sigmoid": torch.sigmoid, "silu": F.silu, "relu": F.relu, "identity": torch.clone,
    }  # fmt: skip
    binary: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "real_div": torch.div, "floor_div": torch.floor_divide,
        "minimum": torch.minimum, "maximum": torch.maximum,
    }  # fmt: skip
    comparison = {
        "equal": torch.eq, "not_equal": torch.ne, "less": torch.lt, "less_equal": torch.le, "greater": torch.gt,
        "greater_equal": torch.ge,
    }  # fmt: skip
    cases: dict[str, Case] = {}
    for name, of in unary.items():
        cases[name] = (lambda v, name=name: getattr(mb, name)(x=v.tokens), lambda v, of=of: of(v.tokens))
    for name, of2 in binary.items():
        cases[name] = (
            lambda v, name=name: getattr(mb, name)(x=v.tokens, y=v.other),
            lambda v, of2=of2: of2(v.tokens, v.other),
        )
    for name, of3 in comparison.items():
        cases[name] = (
            lambda v, name=name: number(getattr(mb, name)(x=v.index, y=np.int32(2))),
            lambda v, of3=of3: of3(v.index, torch.tensor(2)).float(),
        )
    for name, of4 in {"logical_and": torch.logical_and, "logical_or": torch.logical_or}.items():
        cases[name] = (
            lambda v, name=name: number(getattr(mb, name)(x=mb.less(x=v.index, y=3), y=mb.greater(x=v.index, y=1))),
            lambda v, of4=of4: of4(v.index < 3, v.index > 1).float(),
        )
    positive = (lambda v: mb.abs(x=v.tokens)), (lambda v: v.tokens.abs())
    eps = o.const(np.float32(0.25))
    return cases | {
        "logical_not": (
            lambda v: number(mb.logical_not(x=mb.less(x=v.index, y=3))),
            lambda v: (v.index >= 3).float(),
        ),
        "sqrt": (lambda v: mb.sqrt(x=positive[0](v)), lambda v: positive[1](v).sqrt()),
        "rsqrt": (lambda v: mb.rsqrt(x=positive[0](v)), lambda v: positive[1](v).rsqrt()),
        "rsqrt epsilon": (
            lambda v: mb.rsqrt(x=positive[0](v), epsilon=eps),
            lambda v: (positive[1](v) + 0.25).rsqrt(),
        ),
        "pow": (lambda v: mb.pow(x=positive[0](v), y=v.other), lambda v: positive[1](v).pow(v.other)),
        "select": (
            lambda v: mb.select(cond=mb.greater(x=v.tokens, y=v.other), a=v.tokens, b=v.other),
            lambda v: torch.where(v.tokens > v.other, v.tokens, v.other),
        ),
        "clip": (
            lambda v: mb.clip(x=v.tokens, alpha=o.const(np.float32(-0.5)), beta=o.const(np.float32(2))),
            lambda v: v.tokens.clamp(-0.5, 2),
        ),
        "cast": (lambda v: number(mb.cast(x=v.tokens, dtype="int32")), lambda v: v.tokens.trunc()),
        "gelu": (lambda v: mb.gelu(x=v.tokens), lambda v: F.gelu(v.tokens)),
        "gelu tanh": (
            lambda v: mb.gelu(x=v.tokens, mode="TANH_APPROXIMATION"),
            lambda v: F.gelu(v.tokens, approximate="tanh"),
        ),
        "gelu sigmoid": (
            lambda v: mb.gelu(x=v.tokens, mode="SIGMOID_APPROXIMATION"),
            lambda v: v.tokens * torch.sigmoid(1.702 * v.tokens),
        ),
    }


def number(value: Any) -> Any:
    return mb.cast(x=value, dtype="fp32")


def layouts(o: Operands) -> dict[str, Case]:
    b, c, h, w, n, d = o.sizes
    parts = [1, d - 2, 1]
    return {
        "reshape": (
            lambda v: mb.reshape(x=v.tokens, shape=[0, -1, 1]),
            lambda v: v.tokens.reshape(b, n * d, 1),
        ),
        "transpose": (lambda v: mb.transpose(x=v.image, perm=[0, 2, 3, 1]), lambda v: v.image.permute(0, 2, 3, 1)),
        "expand_dims": (
            lambda v: mb.expand_dims(x=v.tokens, axes=[0, -1]),
            lambda v: v.tokens.unsqueeze(0).unsqueeze(-1),
        ),
        "squeeze": (
            lambda v: mb.squeeze(x=mb.expand_dims(x=v.tokens, axes=[1, 3]), axes=[1, -2]),
            lambda v: v.tokens,
        ),
        "concat": (
            lambda v: mb.concat(values=[v.tokens, v.other, v.tokens], axis=-2),
            lambda v: torch.cat([v.tokens, v.other, v.tokens], 1),
        ),
        "stack": (
            lambda v: mb.stack(values=[v.tokens, v.other], axis=1),
            lambda v: torch.stack([v.tokens, v.other], 1),
        ),
        "split": (
            lambda v: mb.concat(values=mb.split(x=v.tokens, split_sizes=parts, axis=-1)[::-1], axis=-1),
            lambda v: torch.cat(v.tokens.split(parts, -1)[::-1], -1),
        ),
        "split evenly": (
            lambda v: mb.concat(values=mb.split(x=v.image, num_splits=4, axis=1)[::-1], axis=1),
            lambda v: torch.cat(v.image.chunk(4, 1)[::-1], 1),
        ),
        "slice_by_index": (
            lambda v: mb.slice_by_index(
                x=v.image, begin=[0, -3, 1, 0], end=[0, -1, 0, w], stride=[1, 1, 2, 1],
                begin_mask=[True, False, False, False], end_mask=[True, False, True, False],
                squeeze_mask=[False, False, False, False],
            ),
            lambda v: v.image[:, -3:-1, 1::2],
        ),
        "slice_by_index squeeze": (
            lambda v: mb.slice_by_index(
                x=v.tokens, begin=[0, 1, 0], end=[b, 0, d - 1], squeeze_mask=[False, True, False]
            ),
            lambda v: v.tokens[:, 1, :-1],
        ),
        "slice_by_size": (
            lambda v: mb.slice_by_size(x=v.tokens, begin=[0, 1, 1], size=[-1, 2, -1]),
            lambda v: v.tokens[:, 1:3, 1:],
        ),
        "gather": (
            lambda v: mb.gather(x=v.tokens, indices=v.index, axis=1),
            lambda v: v.tokens.index_select(1, v.index),
        ),
        "gather_along_axis": (
            lambda v: mb.gather_along_axis(x=v.tokens, indices=v.along, axis=1),
            lambda v: v.tokens.gather(1, v.along.long()),
        ),
        "tile": (lambda v: mb.tile(x=v.tokens, reps=[1, 2, 3]), lambda v: v.tokens.repeat(1, 2, 3)),
        "shape": (lambda v: number(mb.shape(x=v.image)), lambda v: torch.tensor([b, c, h, w]).float()),
        "fill": (
            lambda v: mb.add(x=v.tokens, y=mb.fill(shape=mb.shape(x=v.tokens), value=o.const(np.float32(0.5)))),
            lambda v: v.tokens + 0.5,
        ),
        "pixel_shuffle": (
            lambda v: mb.pixel_shuffle(x=v.image, upscale_factor=2),
            lambda v: F.pixel_shuffle(v.image, 2),
        ),
        "upsample_nearest_neighbor": (
            lambda v: mb.upsample_nearest_neighbor(x=v.image, scale_factor_height=2, scale_factor_width=3),
            lambda v: F.interpolate(v.image, scale_factor=(2, 3)),
        ),
    }  # fmt: skip


def products(o: Operands) -> dict[str, Case]:
    _, c, _, _, n, d = o.sizes
    weight, bias, gamma, beta = o.floats(5, d), o.floats(5), o.floats(d), o.floats(d)
    kernel, grouped, pointwise = o.floats(6, c, 3, 2), o.floats(8, c // 4, 3, 3), o.floats(4, c // 2, 1, 1)
    rows, conv_bias, mean, variance = o.floats(3, n, 2), o.floats(6), o.floats(c), np.abs(o.floats(c))
    added, taking = o.floats(n, n), o.rng.random((n, n)) < 0.5
    taking[:, 0] = True
    t, k = torch.from_numpy, o.const
    return {
        "softmax": (lambda v: mb.softmax(x=v.tokens, axis=1), lambda v: v.tokens.softmax(1)),
        "reduce_mean": (
            lambda v: mb.reduce_mean(x=v.image, axes=[1, -1], keep_dims=True),
            lambda v: v.image.mean((1, 3), keepdim=True),
        ),
        "reduce_sum": (lambda v: mb.reduce_sum(x=v.image, axes=[2]), lambda v: v.image.sum(2)),
        "reduce_max": (lambda v: mb.reduce_max(x=v.image, axes=[3]), lambda v: v.image.amax(3)),
        "layer_norm": (
            lambda v: mb.layer_norm(x=v.tokens, axes=[-1], epsilon=k(np.float32(0.125))),
            lambda v: F.layer_norm(v.tokens, (d,), eps=0.125),
        ),
        "layer_norm affine": (
            lambda v: mb.layer_norm(x=v.tokens, axes=[2], gamma=k(gamma), beta=k(beta), epsilon=k(np.float32(0.125))),
            lambda v: F.layer_norm(v.tokens, (d,), t(gamma), t(beta), 0.125),
        ),
        "layer_norm of channels": (
            lambda v: mb.layer_norm(x=v.image, axes=[1], epsilon=k(np.float32(0.125))),
            lambda v: F.layer_norm(v.image.movedim(1, -1), (c,), eps=0.125).movedim(-1, 1),
        ),
        "batch_norm": (
            lambda v: mb.batch_norm(
                x=v.image, mean=k(mean), variance=k(variance), gamma=k(variance), beta=k(mean),
                epsilon=k(np.float32(0.125)),
            ),
            lambda v: F.batch_norm(v.image, t(mean), t(variance), t(variance), t(mean), eps=0.125),
        ),
        "linear": (
            lambda v: mb.linear(x=v.tokens, weight=k(weight), bias=k(bias)),
            lambda v: F.linear(v.tokens, t(weight), t(bias)),
        ),
        "matmul": (
            lambda v: mb.matmul(x=v.tokens, y=v.other, transpose_x=False, transpose_y=True),
            lambda v: v.tokens @ v.other.mT,
        ),
        "matmul transposed": (
            lambda v: mb.matmul(x=v.tokens, y=v.other, transpose_x=True),
            lambda v: v.tokens.mT @ v.other,
        ),
        "conv": (
            lambda v: mb.conv(
                x=v.image, weight=k(kernel), bias=k(conv_bias), strides=[2, 1], pad_type="custom", pad=[1, 2, 0, 1],
                dilations=[1, 2],
            ),
            lambda v: F.conv2d(F.pad(v.image, (0, 1, 1, 2)), t(kernel), t(conv_bias), (2, 1), 0, (1, 2)),
        ),
        "conv grouped": (
            lambda v: mb.conv(x=v.image, weight=k(grouped), pad_type="same", groups=4),
            lambda v: F.conv2d(v.image, t(grouped), padding=1, groups=4),
        ),
        "conv pointwise": (
            lambda v: mb.conv(x=v.image, weight=k(pointwise), groups=2),
            lambda v: F.conv2d(v.image, t(pointwise), groups=2),
        ),
        "conv of rows": (
            lambda v: mb.conv(x=v.tokens, weight=k(rows)),
            lambda v: F.conv1d(v.tokens, t(rows)),
        ),
        "scaled_dot_product_attention": (
            lambda v: mb.scaled_dot_product_attention(query=v.tokens, key=v.other, value=v.tokens),
            lambda v: F.scaled_dot_product_attention(v.tokens, v.other, v.tokens),
        ),
        "scaled_dot_product_attention added": (
            lambda v: mb.scaled_dot_product_attention(query=v.tokens, key=v.other, value=v.other, attn_mask=k(added)),
            lambda v: F.scaled_dot_product_attention(v.tokens, v.other, v.other, t(added)),
        ),
        "scaled_dot_product_attention masked": (
            lambda v: mb.scaled_dot_product_attention(query=v.tokens, key=v.other, value=v.other, attn_mask=taking),
            lambda v: F.scaled_dot_product_attention(v.tokens, v.other, v.other, t(taking)),
        ),
    }  # fmt: skip


def quantized(o: Operands) -> dict[str, Case]:
    """A tie of x / scale is one in both: scales are powers of two."""
    channels = o.sizes.channels
    one, many = np.float32(2**-5), (2.0 ** -o.rng.integers(3, 6, channels)).astype(np.float32)
    zeros = o.rng.integers(-9, 9, channels).astype(np.int8)

    def back(v: Any, x: str, scale: Any, zero: Any, **axis: int) -> Any:
        both = {"scale": o.const(scale), "zero_point": zero, **axis}
        return mb.dequantize(input=mb.quantize(input=getattr(v, x), output_dtype=zero.dtype.name, **both), **both)

    return {
        "quantize dequantize": (
            lambda v: back(v, "tokens", one, np.uint8(128)),
            lambda v: torch.fake_quantize_per_tensor_affine(v.tokens, float(one), 128, 0, 255),
        ),
        "quantize dequantize of channels": (
            lambda v: back(v, "image", many, zeros, axis=1),
            lambda v: torch.fake_quantize_per_channel_affine(
                v.image, torch.from_numpy(many), torch.from_numpy(zeros.astype(np.int32)), 1, -128, 127
            ),
        ),
    }


GROUPS = {16: (elementwise, layouts, products), 17: (elementwise, layouts, products, quantized),
          18: (elementwise, layouts, products, quantized)}  # fmt: skip
FIRST_TARGET = {"scaled_dot_product_attention": 18}


def cases_of(o: Operands, ios: int) -> dict[str, Case]:
    cases = {name: case for group in GROUPS[ios] for name, case in group(o).items()}
    return {name: case for name, case in cases.items() if FIRST_TARGET.get(name.split()[0], 16) <= ios}


@pytest.mark.parametrize(("half", "ios"), [(False, 16), (True, 17), (True, 18)])
@given(sizes=SIZES, seed=st.integers(0, 99))
@settings(max_examples=1, phases=[Phase.generate])  # one program of all operators takes a second to write
def test_operators_compute_what_pytorch_does(
    save_program: Callable[..., Path], half: bool, ios: int, sizes: Sizes, seed: int
) -> None:
    """In fp32 up to rounding; in fp16 to the last bit but one, and as numbers that fp16 has."""
    o = Operands(sizes, half, seed)
    cases = cases_of(o, ios)

    def body(**values: Any) -> dict[str, Any]:
        floats = {name: mb.cast(x=values[name], dtype="fp16") for name in ("image", "tokens", "other") if half}
        return {
            f"o{at}": number(ours(SimpleNamespace(**{**values, **floats})))
            for at, (ours, _) in enumerate(cases.values())
        }

    with TemporaryDirectory() as folder:
        outputs = load_function(save_program(Path(folder), body, o.inputs, ios))(o.inputs)
    tensors = SimpleNamespace(**{name: torch.from_numpy(array) for name, array in o.inputs.items()})
    for at, (name, (_, theirs)) in enumerate(cases.items()):
        got, wanted = outputs[f"o{at}"], theirs(tensors).numpy()
        assert (got.shape, got.dtype) == (wanted.shape, np.float32), name
        allowed = 2e-5 * max(1.0, np.abs(wanted).max())
        if half:
            assert (got == got.astype(np.float16)).all(), name
            allowed = allowed + np.spacing(np.abs(wanted).astype(np.float16)).astype(np.float32)
        assert (np.abs(got - wanted) <= allowed).all(), (name, np.abs(got - wanted).max())


FP16_VALUES = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=4))
@example([])
@example([65519.99, 65520.0])
def test_rounding_is_that_of_a_conversion(values: list[float]) -> None:
    """To the last bit: of any value, of all that fp16 has, and of those half-way between two of them."""
    halves = (FP16_VALUES[:0x7BFF] + FP16_VALUES[1:0x7C00]) / 2
    for array in (np.array(values, np.float32), halves, -halves, np.nextafter(halves, np.float32(0)), FP16_VALUES):
        with np.errstate(all="ignore"):
            wanted = array.astype(np.float16).astype(np.float32)
            assert np.array_equal(round_to_fp16(array).view(np.uint32), wanted.view(np.uint32))


def test_no_operator_goes_untested() -> None:
    o = Operands(Sizes(1, 4, 3, 3, 3, 3), False, 0)
    tested = {word for name in cases_of(o, 18) for word in name.split()}
    assert set(OPERATORS) - tested == TESTED_ELSEWHERE
