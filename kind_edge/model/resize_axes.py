"""Which axes of a model's tensors are resized, and along which a neighbour means something.

What is stacked: the tensors of one type over the blocks, [L, outputs, inputs]; what stands beside the blocks is a stack
of one layer. What is never resized: patch values, timestep frequencies, classes, positions, the place inside a head.

- The residual stream: one axis for the whole model, the same channel in every block. Its order is an accident of the
  initialisation, but one that all blocks share, so that joining channel i with i + 1 everywhere is one projection.
- Heads: queries, keys, values and what o reads are [heads, head width]. The head width stays, so the heads are the
  axis, for every place inside a head by itself: different places are never mixed.
- The MLP's hidden axis is private to its block; the order in one block has nothing to do with that in the next one.
- adaLN: shift, scale and gate of a branch, one chunk of D outputs each, every chunk resized by itself.
- The position table is a vector per token over the residual stream. It is resized like all that is written there: the
  blocks read it in their own channels.

Symbols: L blocks, D width, H heads, C classes, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kind_edge.model.names import SHARED
from kind_edge.model.spec import FREQUENCY_WIDTH, ModelSpec

Stack = NDArray[np.float64]
Method = Callable[[Stack, tuple[int, int, int]], Stack]
"""A pure function from stacked weights [layers, outputs, inputs] and a target shape to stacked weights."""


class Axis(NamedTuple):
    """An axis of `before * size * inside` values, of which `size` becomes `new_size`."""

    size: int
    new_size: int
    before: int = 1
    inside: int = 1


class Kind(NamedTuple):
    """The tensors of one type: their name ("blocks.{}.attn.q.weight" for those of the blocks), and their two axes.

    `transposed`: the tensor is [inputs, outputs]. A vector has one input.
    """

    name: str
    outputs: Axis
    inputs: Axis
    transposed: bool = False

    def names(self, layers: int) -> list[str]:
        return [self.name.format(block) for block in range(layers)] if "{}" in self.name else [self.name]


def kinds(spec: ModelSpec, target: ModelSpec) -> Iterator[Kind]:
    """Every type of tensor of the dense model of that shape, and of the factors that blocks have in common."""
    width = Axis(spec.width, target.width)
    heads = Axis(spec.heads, target.heads, inside=spec.head_width)
    hidden = Axis(spec.hidden_width, target.hidden_width)
    matrices = {f"attn.{part}": (heads, width) for part in "qkv"}
    matrices |= {"attn.o": (width, heads), "mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for name, axes in matrices.items():
        yield from _layer(f"blocks.{{}}.{name}", *axes)
        if spec.shared_factors:
            yield from _in_common(name, *axes, _same(spec.learngene_rank))
    yield from _layer("blocks.{}.adaln", width._replace(before=6), width)
    yield from _layer("patch_embed", width, _same(spec.channels * spec.patch_size**2))
    yield Kind("pos_embed", width, _same(spec.tokens), transposed=True)
    for embedder in ("t_embed", "span_embed") if spec.distilled else ("t_embed",):
        yield from _layer(f"{embedder}.fc1", width, _same(FREQUENCY_WIDTH))
        yield from _layer(f"{embedder}.fc2", width, width)
    if spec.label_embedding:
        yield Kind("y_embed.weight", width, _same(spec.num_classes + 1), transposed=True)
    yield from _layer("final.adaln", width._replace(before=2), width)
    yield from _layer("final.linear", _same(spec.patch_values), width)


def _same(size: int) -> Axis:
    return Axis(size, size)


def _layer(name: str, outputs: Axis, inputs: Axis) -> Iterator[Kind]:
    yield Kind(f"{name}.weight", outputs, inputs)
    yield Kind(f"{name}.bias", outputs, Axis(1, 1))


def _in_common(name: str, outputs: Axis, inputs: Axis, components: Axis) -> Iterator[Kind]:
    """U and V stand beside the blocks, which have them in common; a component's s is a function of depth."""
    yield Kind(f"{SHARED}.{name}.U", outputs, components)
    yield Kind(f"{SHARED}.{name}.V", components, inputs, transposed=True)
    yield Kind(f"blocks.{{}}.{name}.learngene.s", components, Axis(1, 1))


def resize_kind(method: Method, kind: Kind, tensors: Sequence[Stack], layers: int) -> list[Stack]:
    """The tensors of one type, one per block of the model, for `layers` blocks (one, if it stands beside them)."""
    shape = tensors[0].shape
    stack = np.stack([(t.T if kind.transposed else t).reshape(len(t.T if kind.transposed else t), -1) for t in tensors])
    resized = _resize(method, stack, kind.outputs, kind.inputs, layers)
    resized *= _gain(stack, resized)
    if kind.transposed:
        return [layer.T.copy() for layer in resized]
    inputs = shape[1:] if kind.inputs.size == kind.inputs.new_size else (-1,)  # also those of a patch, or none
    return [layer.reshape(len(layer), *inputs) for layer in resized]


def _gain(old: Stack, new: Stack) -> float:
    """What keeps the variance of the outputs, over inputs that are not correlated, where a method loses some of it.

    A smaller stack holds the low frequencies alone, or means of neighbours; and in a trained model neighbours are as
    good as independent. Where a stack grows, the new inputs are correlated (m of m' directions are in use): the rest of
    the variance is no loss.
    """
    inputs = min(1.0, old.shape[2] / new.shape[2])
    before, after = (np.square(stack).sum() / (stack.shape[0] * stack.shape[1]) for stack in (old, new))
    return float(np.sqrt(max(1.0, before * inputs / after))) if after > 0 else 1.0


def _resize(method: Method, stack: Stack, outputs: Axis, inputs: Axis, layers: int) -> Stack:
    """[L, outputs, inputs] by places before and inside the two axes, each a stack of its own for the method."""
    split = stack.reshape(len(stack), outputs.before, outputs.size, outputs.inside, inputs.size, inputs.inside)
    shape = layers, outputs.new_size, inputs.new_size
    resized = np.empty((layers, outputs.before, outputs.new_size, outputs.inside, inputs.new_size, inputs.inside))
    for before, inside, of_input in np.ndindex(outputs.before, outputs.inside, inputs.inside):
        resized[:, before, :, inside, :, of_input] = method(split[:, before, :, inside, :, of_input], shape)
    rows, columns = outputs.before * outputs.new_size * outputs.inside, inputs.new_size * inputs.inside
    return resized.reshape(layers, rows, columns)
