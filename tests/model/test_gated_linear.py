"""The gated layer is the sum of its components, whichever way a batch is laid out, and learns only what it should."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.gated_linear import ClassGate, GatedLinear
from kind_edge.model.spec import MatrixShape, Ranks

CLASSES = 4


def layer_of(n: int, m: int, learngene: int, tailor: int, classes: int, seed: int = 0) -> GatedLinear:
    """Random weights everywhere, in float64."""
    layer = GatedLinear(MatrixShape("w", n, m), Ranks(learngene, tailor), classes).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return layer


def summed(layer: GatedLinear, x: Tensor, open_gates: list[list[int]]) -> Tensor:
    """y = (sum of U_r s_r V_r^T over the open components) x + bias, one rank-1 component after the other."""
    outputs = []
    for image, gates in zip(x, open_gates, strict=True):
        weight = torch.zeros(layer.shape.outputs, layer.shape.inputs, dtype=torch.float64)
        parts = [(layer.learngene.U, layer.learngene.s, layer.learngene.V)]
        parts += [(layer.tailors.U[c], layer.tailors.s[c], layer.tailors.V[c]) for c, gate in enumerate(gates) if gate]
        for u, s, v in parts:
            for r in range(len(s)):
                weight = weight + s[r] * torch.outer(u[:, r], v[:, r])
        outputs.append(image @ weight.T + layer.bias)
    return torch.stack(outputs)


def one_hot(label: int, classes: int) -> list[int]:
    return [int(c == label) for c in range(classes)]


shapes = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 4), st.integers(0, 3), st.integers(1, CLASSES))


@given(shapes, st.data())
def test_any_batch_is_the_sum_of_its_components(shape: tuple[int, int, int, int, int], data: st.DataObject) -> None:
    n, m, learngene, tailor, classes = shape
    labels = data.draw(st.lists(st.integers(0, classes), min_size=1, max_size=7))
    layer = layer_of(n, m, learngene, tailor, classes)
    x = torch.randn(len(labels), 3, m, dtype=torch.float64)
    gate = ClassGate.of(torch.tensor(labels), classes)
    torch.testing.assert_close(layer(x, gate), summed(layer, x, [one_hot(label, classes) for label in labels]))


@given(shapes, st.data())
def test_any_gates_may_be_open_together(shape: tuple[int, int, int, int, int], data: st.DataObject) -> None:
    n, m, learngene, tailor, classes = shape
    row = st.lists(st.integers(0, 1), min_size=classes, max_size=classes)
    gates = data.draw(st.lists(row, min_size=1, max_size=5))
    layer = layer_of(n, m, learngene, tailor, classes)
    x = torch.randn(len(gates), 2, m, dtype=torch.float64)
    gate = ClassGate.opening(torch.tensor(gates), torch.zeros(len(gates), dtype=torch.long))
    torch.testing.assert_close(layer(x, gate), summed(layer, x, gates))


@given(shapes, st.data())
def test_a_grouped_batch_is_the_sum_of_its_components(
    shape: tuple[int, int, int, int, int], data: st.DataObject
) -> None:
    n, m, learngene, tailor, classes = shape
    chosen = sorted(data.draw(st.sets(st.integers(0, classes - 1), min_size=1)))
    size = data.draw(st.integers(1, 3))
    closed = data.draw(st.lists(st.booleans(), min_size=size * len(chosen), max_size=size * len(chosen)))
    layer = layer_of(n, m, learngene, tailor, classes)
    x = torch.randn(len(closed), 2, m, dtype=torch.float64)
    labels = [classes if shut else chosen[i // size] for i, shut in enumerate(closed)]
    gate = ClassGate.grouped(torch.tensor(chosen), torch.tensor(closed), classes)
    assert gate.class_index.tolist() == labels
    torch.testing.assert_close(layer(x, gate), summed(layer, x, [one_hot(label, classes) for label in labels]))


@pytest.mark.parametrize("frozen", [False, True])
@given(shapes, st.data())
def test_a_grouped_batch_learns_what_its_components_say(
    frozen: bool, shape: tuple[int, int, int, int, int], data: st.DataObject
) -> None:
    n, m, learngene, tailor, classes = shape
    size = data.draw(st.integers(1, 3))
    closed = data.draw(st.lists(st.booleans(), min_size=size * classes, max_size=size * classes))
    layer = layer_of(n, m, learngene, tailor, classes)
    layer.learngene.requires_grad_(not frozen)
    x = torch.randn(len(closed), 2, m, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(2, n, len(closed), dtype=torch.float64).permute(2, 0, 1)  # not as it lies in memory
    open_gates = [[0] * classes if shut else one_hot(i // size, classes) for i, shut in enumerate(closed)]
    gate = ClassGate.grouped(torch.arange(classes), torch.tensor(closed), classes)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    got, want = (
        torch.autograd.grad((y * towards).sum(), wanted, allow_unused=True, materialize_grads=True)
        for y in (layer(x, gate), summed(layer, x, open_gates))
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_bfloat16_is_for_the_products_alone() -> None:
    layer = layer_of(6, 5, 4, 2, CLASSES).float()
    x = torch.randn(CLASSES, 2, 5, requires_grad=True)
    gate = ClassGate.grouped(torch.arange(CLASSES), torch.arange(CLASSES) == 1, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, gate)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, gate), atol=0.5, rtol=0.05)
    y.float().square().sum().backward()
    assert {tensor.grad.dtype for tensor in (x, *layer.parameters())} == {torch.float32}


def test_the_explicit_product_is_what_a_single_gate_applies() -> None:
    layer = layer_of(5, 3, 2, 2, CLASSES)
    x = torch.randn(1, 4, 3, dtype=torch.float64)
    for c in range(CLASSES):
        weight = layer.learngene.product() + layer.tailors.product()[c]
        torch.testing.assert_close(layer(x, ClassGate.of(torch.tensor([c]), CLASSES)), x @ weight.T + layer.bias)


def gates_of(kind: str, label: int) -> ClassGate:
    """Three images of one class (or of none), laid out as sampling does and as training does."""
    if kind == "of":
        return ClassGate.of(torch.full((3,), label), CLASSES)
    closed = torch.full((3 * CLASSES,), True)
    if label < CLASSES:
        closed[3 * label : 3 * label + 3] = False
    return ClassGate.grouped(torch.arange(CLASSES), closed, CLASSES)


@pytest.mark.parametrize("kind", ["of", "grouped"])
@pytest.mark.parametrize("label", range(CLASSES + 1))
def test_an_image_teaches_its_own_tailor_and_the_learngene_alone(
    kind: str, label: int, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    model = make_checkpoint().model().requires_grad_(True)
    gate = gates_of(kind, label)
    count = len(gate.class_index)
    model(torch.randn(count, 1, 8, 8), torch.rand(count) * 1000, gate).square().sum().backward()
    for name, layer in model.named_modules():
        if not isinstance(layer, GatedLinear):
            continue
        for part in "UsV":
            assert getattr(layer.learngene, part).grad.abs().min() > 0, f"{name}.learngene.{part}"
            gradient = getattr(layer.tailors, part).grad
            for c in range(CLASSES):
                touched = gradient is not None and bool((gradient[c] != 0).any())
                assert touched == (c == label), f"{name}.tailors.{part} of class {c}"


@pytest.mark.parametrize(
    ("n", "m", "learngene", "tailor", "classes"),
    [(128, 128, 48, 8, 10), (512, 128, 48, 8, 10), (64, 256, 60, 40, 5), (96, 96, 0, 12, 3), (96, 96, 24, 0, 3)],
)
def test_a_fresh_layer_scales_its_input_as_an_ordinary_one(
    n: int, m: int, learngene: int, tailor: int, classes: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = GatedLinear(MatrixShape("w", n, m), Ranks(learngene, tailor), classes)
    layer.initialise(generator)
    xavier = torch.randn(n, m, generator=generator) * (2 / (n + m)) ** 0.5
    x = torch.randn(4096, m, generator=generator)
    ordinary = (x @ xavier.T).square().mean()
    for c in range(classes):
        ours = layer(x.unsqueeze(0), ClassGate.of(torch.tensor([c]), classes)).square().mean()
        assert float((ours / ordinary).detach()) == pytest.approx(1, abs=0.05)


def test_components_are_dealt_from_one_matrix_until_it_is_used_up() -> None:
    """Learngene and tailors of one draw are orthogonal; beyond min(n, m) components come from further draws."""
    layer = GatedLinear(MatrixShape("w", 32, 48), Ranks(20, 6), 4)  # 44 components of 32
    layer.initialise(torch.Generator().manual_seed(0))
    first = torch.cat([layer.learngene.U, layer.tailors.U[0], layer.tailors.U[1]], 1)  # 32
    torch.testing.assert_close(first.T @ first, torch.eye(32), atol=1e-5, rtol=0)
    second = torch.cat([layer.tailors.U[2], layer.tailors.U[3]], 1)
    torch.testing.assert_close(second.T @ second, torch.eye(12), atol=1e-5, rtol=0)
    assert (first.T @ second).abs().max() > 0.1


def test_initialisation_is_a_function_of_its_seed() -> None:
    layers = [GatedLinear(MatrixShape("w", 8, 8), Ranks(3, 2), 2) for _ in range(3)]
    for layer, seed in zip(layers, (1, 1, 2), strict=True):
        layer.initialise(torch.Generator().manual_seed(seed))
    assert torch.equal(layers[0].tailors.U, layers[1].tailors.U)
    assert not torch.equal(layers[0].tailors.U, layers[2].tailors.U)
