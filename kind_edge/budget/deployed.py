"""What a deployed model costs: bytes in its file, operators and work.

A deployed model is split in two: the six matrices of every block, each of which a plan may store in its own way
(`matrix_cost`), and everything else (`deployed_fixed_cost`). Both count the `exact` convention at batch 1, and together
they are the whole: dense matrices plus fixed part equal `model_cost(spec, "exact")`, but for the span network of a
distilled model: a plan has one number of steps, so that it is a constant, in the table or in a bias.

Symbols: N tokens, D width, L blocks, H hidden width, K kept classes, n x m a matrix, r rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from kind_edge.budget.formulas import Storage, matrix_macs, matrix_weights, tailor_macs
from kind_edge.budget.precision import PRECISIONS, Precision
from kind_edge.budget.whole_model import CostBreakdown, model_cost
from kind_edge.model.spec import FREQUENCY_WIDTH, Branch, MatrixShape, ModelSpec

Role = Literal["matmul", "float"]
"""`matmul`: a product with a constant matrix, which int8 quantizes; `float`: all that stays in floating point."""

SCALE_BYTES = 4
ZERO_POINT_BYTES = 1

_VALUE_BYTES: Mapping[Precision, int] = {
    "fp32": 4, "fp16": 2, "int8": 4, "int8-qdq": 1, "a16w8": 2, "int8-weights": 4, "int4": 4,
}  # fmt: skip
"""Bytes of an activation and a table entry: only static quantization narrows what is no matrix."""

_BIAS_BYTES: Mapping[Precision, int] = {**_VALUE_BYTES, "int8-qdq": 12, "a16w8": 12}
"""Static: a bias of 32 bits, with a scale and a zero point for every output."""

_PRODUCT_OPERATORS = {"int8": 2}
"""int8: one operator quantizes the activations, one multiplies; all others have a single one."""


def linear_weight_bytes(outputs: int, inputs: int, precision: Precision) -> int:
    """Bytes of one constant matrix: int8 adds a scale and a zero point per output, or a scale per whole block."""
    traits = PRECISIONS[precision]
    if traits.block:
        return outputs * -(-inputs // traits.block) * (traits.block * traits.weight_bits // 8 + SCALE_BYTES)
    if traits.weight_bits == 8:
        return outputs * (inputs + SCALE_BYTES + ZERO_POINT_BYTES)
    return outputs * inputs * traits.weight_bits // 8


def _tailor_bytes(outputs: int, inputs: int, rank: int, precision: Precision) -> int:
    """Bytes of one class's thin factors: int8 has a scale per component and side, static int8 one for both sides."""
    traits, values = PRECISIONS[precision], (outputs + inputs) * rank
    if traits.static:
        return values + rank * _VALUE_BYTES[precision]
    if precision == "int4":
        return sum(rank * (side // 2 + -(-side // traits.block) * SCALE_BYTES) for side in (outputs, inputs))
    return values + 2 * rank * SCALE_BYTES if traits.weight_bits == 8 else values * traits.weight_bits // 8


class Layer(NamedTuple):
    """What a measured table is asked for: one part of a matrix, n x m, as a plan stores it."""

    tokens: int
    outputs: int
    inputs: int
    storage: Storage
    learngene_rank: int
    tailor_rank: int
    precision: Precision


class Parts(NamedTuple):
    """What a measured table is asked for beside matrices: branches without their matrices, and the ends round them."""

    tokens: int
    width: int
    attentions: int
    mlps: int
    ends: bool


@dataclass(frozen=True)
class MatrixCost:
    """One block matrix of a plan, without its bias. `activation_bytes` are read and written in one evaluation."""

    params: int
    flops: int
    weight_bytes: int
    weight_bytes_read: int
    activation_bytes: int
    operators: int
    layer: Layer


def matrix_cost(
    spec: ModelSpec,
    matrix: MatrixShape,
    storage: Storage,
    learngene_rank: int,
    tailor_rank: int,
    num_tailors: int,
    precision: Precision,
) -> MatrixCost:
    """Cost of one matrix: a learngene stored as `storage`, and `num_tailors` tailors as gathered thin factors.

    One image sees one tailor, so all of them take room but one takes time. int8 tailors hold one scale per component
    and side and are widened after the gather. Forms without tailors pass 0 for them, and their rank as
    `learngene_rank`, which counts only where `storage` is factored.
    """
    n, m, tokens = matrix.outputs, matrix.inputs, spec.tokens
    value_bytes = _VALUE_BYTES[precision]
    params = matrix_weights(n, m, storage, learngene_rank)
    flops = 2 * matrix_macs(tokens, n, m, storage, learngene_rank)
    weight_bytes = operators = activations = 0
    if params and storage == "dense":
        weight_bytes = linear_weight_bytes(n, m, precision)
        operators, activations = _PRODUCT_OPERATORS.get(precision, 1), tokens * (n + m)
    elif params:
        weight_bytes = linear_weight_bytes(learngene_rank, m, precision) + linear_weight_bytes(
            n, learngene_rank, precision
        )
        operators, activations = 2 * _PRODUCT_OPERATORS.get(precision, 1), tokens * (n + m + 2 * learngene_rank)
    weight_bytes_read = weight_bytes
    if num_tailors and tailor_rank:
        one = (n + m) * tailor_rank
        one_bytes = _tailor_bytes(n, m, tailor_rank, precision)
        params, weight_bytes = params + num_tailors * one, weight_bytes + num_tailors * one_bytes
        # The gather reads the factors and writes them, widened; the split moves them; the products read them.
        weight_bytes_read += one_bytes + 4 * one * value_bytes
        flops += 2 * tailor_macs(tokens, n, m, tailor_rank)
        activations += tokens * (
            m + 2 * tailor_rank + 3 * n
        )  # x, the thin product twice, the tailor's output and the sum
        # A transpose, two products, one sum; gathers and splits are shared by all matrices, but for static graphs.
        operators += {"int8-qdq": 7, "a16w8": 7}.get(precision, 5)
    layer = Layer(tokens, n, m, storage, learngene_rank, tailor_rank if num_tailors else 0, precision)
    return MatrixCost(params, flops, weight_bytes, weight_bytes_read, activations * value_bytes, operators, layer)


def in_common(cost: MatrixCost, first: bool) -> MatrixCost:
    """A factored matrix whose thin weights other blocks have, too: the file holds them once, with the `first` of these.

    Between its two products it has a scale of its own per component, r values.
    """
    layer, precision = cost.layer, cost.layer.precision
    rank, value_bytes = layer.learngene_rank, _VALUE_BYTES[precision]
    return dataclasses.replace(
        cost,
        params=first * cost.params + rank,
        flops=cost.flops + layer.tokens * rank,
        weight_bytes=first * cost.weight_bytes + rank * value_bytes,
        weight_bytes_read=cost.weight_bytes_read + rank * value_bytes,
        activation_bytes=cost.activation_bytes + 2 * layer.tokens * rank * value_bytes,
        operators=cost.operators + 1,
    )


@dataclass(frozen=True)
class OperatorGroup:
    """Operators of one kind, summed over all blocks, for one evaluation at batch 1.

    `weight_bytes` is what the file holds, `weight_bytes_read` what one evaluation reads of it (of a table: one row);
    `activation_bytes` what it reads and writes besides.
    """

    name: str
    role: Role
    params: int
    flops: int
    weight_bytes: int
    weight_bytes_read: int
    activation_bytes: int
    operators: int


@dataclass(frozen=True)
class FixedCost:
    """Everything of a deployed model but its block matrices."""

    groups: tuple[OperatorGroup, ...]
    activation_bytes_peak: int
    precision: Precision
    parts: Parts

    @property
    def params(self) -> int:
        return sum(group.params for group in self.groups)

    @property
    def flops(self) -> int:
        return sum(group.flops for group in self.groups)

    @property
    def weight_bytes(self) -> int:
        return sum(group.weight_bytes for group in self.groups)

    @property
    def operators(self) -> int:
        return sum(group.operators for group in self.groups)


def baked_table_values(spec: ModelSpec, evaluations: int, labels: int = 1) -> int:
    """Values of a baked modulation table: one row of 6 L D + 2 D (less 3 D per dropped branch) per sampler evaluation.

    With a label embedding modulation depends on the label too: `labels` is then the number of kept classes, null
    included.
    """
    return evaluations * labels * (3 * len(spec.branches()) + 2) * spec.width


def deployed_fixed_cost(
    spec: ModelSpec,
    num_classes_kept: int,
    evaluations: int,
    baked: bool,
    precision: Precision,
    *,
    switches: bool = True,
    half_table: bool = False,
) -> FixedCost:
    """Everything but the block matrices, as one file holds and one evaluation runs it.

    `evaluations` is the number of different timesteps that the sampler visits; it and `num_classes_kept` size the baked
    table (or, unbaked, the label embedding); forms that do not switch have one label for all. In an int8 file only
    matrices of products are int8: the patch convolution, tables and biases stay fp32, a `half_table` alone is fp16.
    """
    labels = 0
    if spec.label_embedding and switches:
        labels = num_classes_kept + (not spec.distilled)  # distilled: no null class
    if baked:
        conditioning = _table(spec, evaluations, labels, "fp16" if half_table else precision)
    else:
        conditioning = _conditioning(spec, model_cost(spec, "exact"), labels, precision)
    groups = (*conditioning, *_token_groups(spec, model_cost(spec, "exact"), precision))
    attentions, mlps = len(spec.branches("attn")), len(spec.branches("mlp"))
    parts = Parts(spec.tokens, spec.width, attentions, mlps, ends=True)
    return FixedCost(groups, peak_activation_bytes(spec, precision), precision, parts)


def branch_fixed_cost(
    spec: ModelSpec,
    kind: Branch,
    precision: Precision,
    num_classes_kept: int = 1,
    evaluations: int = 1,
    baked: bool = True,
    **options: bool,
) -> FixedCost:
    """What of one block's branch vanishes, beside its matrices, from `deployed_fixed_cost` when it is dropped.

    Normalisation, modulation with its part of the baked table (or of the adaLN network), attention products, softmax
    or GELU, biases, gate and residual; by the same groups, and with the same arguments. All figures add up over any
    branches, but for the peak of activations, which is 0: other blocks keep it.
    """
    whole = dataclasses.replace(spec, dropped_branches=())  # a branch is like that of any other block
    with_it, without = (
        deployed_fixed_cost(each, num_classes_kept, evaluations, baked, precision, **options).groups
        for each in (whole, whole.without_branches([f"blocks.0.{kind}"]))
    )
    pairs = zip(with_it, without, strict=True)
    groups = tuple(_difference(a, b) for a, b in pairs if a != b)
    parts = Parts(spec.tokens, spec.width, int(kind == "attn"), int(kind == "mlp"), ends=False)
    return FixedCost(groups, 0, precision, parts)


def _difference(whole: OperatorGroup, rest: OperatorGroup) -> OperatorGroup:
    """What a group has more than another of the same name."""
    counts = [a - b for a, b in zip(dataclasses.astuple(whole)[2:], dataclasses.astuple(rest)[2:], strict=True)]
    return OperatorGroup(whole.name, whole.role, *counts)


def peak_activation_bytes(spec: ModelSpec, precision: Precision, batch: int = 1) -> int:
    """The most activations alive at once: in the attention (q, k, v, residual, scores before and after softmax), or in
    the MLP (residual and the hidden layer before and after GELU), plus the modulation row."""
    tokens, width = spec.tokens, spec.width
    attention = 4 * tokens * width + 2 * spec.heads * tokens**2
    mlp = 2 * tokens * width + 2 * tokens * spec.hidden_width
    row = baked_table_values(spec, 1)
    return batch * (max(attention, mlp) + row) * _VALUE_BYTES[precision]


def _table(spec: ModelSpec, evaluations: int, labels: int, precision: Precision) -> Iterator[OperatorGroup]:
    """A row per evaluation (and label), cut in vectors."""
    row, table = baked_table_values(spec, 1), baked_table_values(spec, evaluations, max(labels, 1))
    values = _VALUE_BYTES[precision]
    operators = (7 if labels else 3) + (precision == "fp16")  # a gather (of pairs of indices), a cast, two that cut
    yield OperatorGroup("table", "float", table, 0, table * values, row * values, row * values, operators)


def _conditioning(spec: ModelSpec, whole: CostBreakdown, labels: int, precision: Precision) -> Iterator[OperatorGroup]:
    """Timestep, label and adaLN networks: they run on one row, so reading their weights is what takes the time."""
    width, values = spec.width, _VALUE_BYTES[precision]
    products, blocks = _PRODUCT_OPERATORS.get(precision, 1), baked_table_values(spec, 1) - 2 * spec.width
    layers = {
        # features: 5 operators; SiLU: 2, twice
        "timestep": (((width, FREQUENCY_WIDTH), (width, width)), 2 * products + 9),
        "adaln": (((blocks, width),), products + 2),  # of all blocks in one, cut in vectors
        "final_adaln": (((2 * width, width),), 0),  # in the same product
    }
    for name, (shapes, operators) in layers.items():
        part = whole.part(name)
        weights = sum(linear_weight_bytes(n, m, precision) + n * values for n, m in shapes)
        moved = sum(n + m for n, m in shapes) * values
        yield OperatorGroup(name, "matmul", part.params, part.flops, weights, weights, moved, operators)
    if labels:
        table = labels * width
        yield OperatorGroup(
            "label", "float", table, whole.part("label").flops, table * values, width * values, 3 * width * values, 2
        )


def _token_groups(spec: ModelSpec, whole: CostBreakdown, precision: Precision) -> Iterator[OperatorGroup]:
    """What runs on every token besides the block matrices."""
    tokens = spec.tokens
    attentions, mlps = len(spec.branches("attn")), len(spec.branches("mlp"))
    branches = attentions + mlps
    elements, hidden = tokens * spec.width, tokens * spec.hidden_width
    scores = spec.heads * tokens**2
    outputs = sum(matrix.outputs for matrix in spec.matrices())
    final = tokens * spec.patch_values
    image = spec.channels * spec.image_size**2
    # name: (values read and written, operators)
    floats = {
        "patch": (image + 3 * elements, 3),  # convolution, transpose, reshape
        "position": (2 * elements, 1),
        "norms": ((branches + 1) * 2 * elements, branches + 1),
        "modulation": ((branches + 1) * 4 * elements, 2 * (branches + 1)),
        "products": (attentions * (12 * elements + 2 * scores), attentions),  # one operator, which also transposes
        "softmax": (attentions * 4 * scores, 0),  # in the same
        "activation": (mlps * 2 * hidden, mlps),
        "biases": (2 * tokens * outputs, 4 * attentions + 2 * mlps),
        "residuals": (branches * 5 * elements, 2 * branches),  # gate, add
    }
    values = _VALUE_BYTES[precision]
    for name, (moved, operators) in floats.items():
        part = whole.part(name)
        # A factored spec counts the biases of its matrices as well, so the parts of both kinds of spec are the same.
        weights = part.params * (_BIAS_BYTES if name == "biases" else _VALUE_BYTES)[precision]
        yield OperatorGroup(name, "float", part.params, part.flops, weights, weights, moved * values, operators)
    part = whole.part("final")
    weights = part.params * values  # the exporter keeps the last product in floating point
    moved = (elements + 5 * final) * values  # product, bias, reshape, transpose, reshape
    yield OperatorGroup("final", "float", part.params, part.flops, weights, weights, moved, 5)
