"""The transformer, held to a second writing of it with loops and einsum that shares no line with the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.dit import DiT, initialise, sincos_position_table
from kind_edge.model.gated_linear import GatedLinear
from kind_edge.model.spec import ModelSpec, named_spec

Weights = Mapping[str, Tensor]
MATRICES = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc1", "mlp.fc2")


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def normed(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


def affine(weights: Weights, name: str, x: Tensor) -> Tensor:
    return torch.einsum("...m,nm->...n", x, weights[f"{name}.weight"]) + weights[f"{name}.bias"]


def timestep_embedding(weights: Weights, timestep: float) -> Tensor:
    frequencies = [10000.0 ** (-i / 128) for i in range(128)]
    features = [math.cos(timestep * f) for f in frequencies] + [math.sin(timestep * f) for f in frequencies]
    return affine(weights, "t_embed.fc2", silu(affine(weights, "t_embed.fc1", torch.tensor(features).double())))


def attention(weights: Weights, name: str, x: Tensor, heads: int) -> Tensor:
    """x [N, D]; head by head, query by query."""
    q, k, v = (affine(weights, f"{name}.{part}", x) for part in "qkv")
    size = x.shape[1] // heads
    out = torch.empty_like(x)
    for h in range(heads):
        at = slice(h * size, (h + 1) * size)
        for i in range(len(x)):
            scores = (k[:, at] @ q[i, at]) / math.sqrt(size)
            shares = scores.exp() / scores.exp().sum()
            out[i, at] = sum(share * row for share, row in zip(shares, v[:, at], strict=True))
    return affine(weights, f"{name}.o", out)


def plain_forward(spec: ModelSpec, weights: Weights, image: Tensor, timestep: float, label: int) -> Tensor:
    """One image [ch, H, W] through the ordinary DiT, from tensors by the names of the checkpoint contract."""
    p, side = spec.patch_size, spec.image_size // spec.patch_size
    tokens = []
    for row in range(side):
        for column in range(side):
            patch = image[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            kernel = weights["patch_embed.weight"]
            tokens.append(torch.einsum("dchw,chw->d", kernel, patch) + weights["patch_embed.bias"])
    x = torch.stack(tokens) + weights["pos_embed"]
    c = timestep_embedding(weights, timestep)
    if spec.label_embedding:
        c = c + weights["y_embed.weight"][label]
    c = silu(c)
    for i in range(spec.depth):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = affine(weights, f"{name}.adaln", c).split(spec.width)
        x = x + gate1 * attention(weights, f"{name}.attn", normed(x) * (1 + scale1) + shift1, spec.heads)
        hidden = gelu_tanh(affine(weights, f"{name}.mlp.fc1", normed(x) * (1 + scale2) + shift2))
        x = x + gate2 * affine(weights, f"{name}.mlp.fc2", hidden)
    shift, scale = affine(weights, "final.adaln", c).split(spec.width)
    values = affine(weights, "final.linear", normed(x) * (1 + scale) + shift)
    out = torch.empty(spec.output_channels, spec.image_size, spec.image_size, dtype=torch.float64)
    for token, row_of_values in enumerate(values):
        top, left = token // side * p, token % side * p
        out[:, top : top + p, left : left + p] = row_of_values.reshape(spec.output_channels, p, p)
    return out


def doubled(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize("label_embedding", [False, True])
def test_the_dense_model_is_the_ordinary_dit(label_embedding: bool, make_checkpoint: Callable[..., Checkpoint]) -> None:
    spec = {"channels": 3, "factored": False, "learngene_rank": 0, "tailor_rank": 0}
    checkpoint = make_checkpoint(
        **spec, label_embedding=label_embedding, learned_sigma=label_embedding, objective="epsilon"
    )
    sample, timestep, labels = torch.randn(3, 3, 8, 8), torch.tensor([0.0, 421.0, 999.0]), torch.tensor([0, 4, 2])
    got = checkpoint.model()(sample, timestep, labels)
    weights = doubled(checkpoint)
    assert got.shape == (3, 6 if label_embedding else 3, 8, 8)
    for i in range(3):
        wanted = plain_forward(checkpoint.spec, weights, sample[i].double(), float(timestep[i]), int(labels[i]))
        torch.testing.assert_close(got[i].double(), wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("label", range(5))
def test_the_gated_model_is_a_dense_one_per_class(label: int, make_checkpoint: Callable[..., Checkpoint]) -> None:
    """Weights multiplied out for one class; the null class is the learngene alone."""
    checkpoint = make_checkpoint()
    weights = doubled(checkpoint)
    for block in range(checkpoint.spec.depth):
        for part in MATRICES:
            name = f"blocks.{block}.{part}"
            u, s, v = (weights[f"{name}.learngene.{key}"] for key in "UsV")
            weights[f"{name}.weight"] = u @ s.diag() @ v.T
            if label < 4:
                u, s, v = (weights[f"{name}.tailors.{key}"][label] for key in "UsV")
                weights[f"{name}.weight"] += u @ s.diag() @ v.T
    sample = torch.randn(1, 1, 8, 8)
    got = checkpoint.model()(sample, torch.tensor([333.0]), torch.tensor([label]))
    wanted = plain_forward(checkpoint.spec, weights, sample[0].double(), 333.0, label)
    torch.testing.assert_close(got[0].double(), wanted, rtol=1e-4, atol=2e-5)


def test_images_of_a_batch_do_not_see_each_other(make_checkpoint: Callable[..., Checkpoint]) -> None:
    model = make_checkpoint().model()
    sample, timestep, labels = torch.randn(5, 1, 8, 8), torch.rand(5) * 1000, torch.tensor([3, 0, 4, 3, 1])
    together = model(sample, timestep, labels)
    for i in range(5):
        alone = model(sample[i : i + 1], timestep[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "params"),
    # Millions with 1000 classes, as published with the architecture (facebookresearch/DiT); position table included.
    [("DiT-S/2", 32.96), ("DiT-B/2", 130.51), ("DiT-L/2", 458.10), ("DiT-XL/2", 675.13)],
)
def test_named_shapes_have_the_published_parameter_counts(arch: str, params: float) -> None:
    with torch.device("meta"):
        tensors = DiT(named_spec(arch, 1000)).state_dict()
    assert sum(tensor.numel() for tensor in tensors.values()) / 1e6 == pytest.approx(params, rel=2e-3)


def test_position_table_puts_columns_first_and_rows_second() -> None:
    table = sincos_position_table(3, 8)
    omega = torch.tensor([1.0, 0.01])
    row, column = 2, 1
    wanted = torch.cat([(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()])
    torch.testing.assert_close(table[row * 3 + column], wanted)


def test_a_fresh_model_predicts_zero_and_is_a_function_of_its_seed() -> None:
    spec = ModelSpec(8, 1, 2, 16, 2, 2, 3, learngene_rank=4, tailor_rank=2, label_embedding=True)
    first, again, other = (initialise(DiT(spec), seed) for seed in (0, 0, 1))
    assert not first(torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 3])).any()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    layers = [module for module in first.modules() if isinstance(module, GatedLinear)]
    assert len(layers) == 12
    assert all(layer.learngene.s.all() for layer in layers)
    assert not torch.equal(first.blocks[0].attn.q.learngene.U, other.blocks[0].attn.q.learngene.U)
