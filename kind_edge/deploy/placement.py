"""Which provider does the work: an accelerator that quietly runs on the CPU is an error, not a footnote.

ONNX Runtime puts shape arithmetic on the CPU by design, so a fallback is judged by its share of multiply-accumulates
(MACs), and by what it is: no matrix product belongs there, however small. Read from the trace of one profiled run.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind_edge.deploy.ort import require_onnxruntime, runtime_errors
from kind_edge.deploy.providers import CONTROL_FLOW, resolve_provider, short_name
from kind_edge.deploy.session import open_session
from kind_edge.errors import GateError, UsageError

MAX_SHARE_OUTSIDE = 0.01
"""Share of the model's MACs that may run outside of the provider that was asked for."""

_PRODUCTS = ("MatMul", "Gemm", "Attention", "Einsum")
"""In the name of an operator that must not run outside, with all its quantized and fused kin (MatMulInteger, QGemm,
DynamicQuantizeMatMul, MatMulNBits, FusedMatMul, MultiHeadAttention, ...)."""

LOOPS = frozenset({"Loop", "If", "Scan"})
"""Operators with a graph inside."""

_FILTER_INPUT = {"QLinearConv": 3}
"""Where a convolution's filter is not input 1."""
_NAMED = 8
"""Nodes that a message names; the rest is counted."""

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Placement:
    """Where the nodes of one run were executed; `outside` ("node_linear_3 (MatMul)") the provider left to others.

    `products_outside` are those of them that multiply matrices, `share_outside` is their part of the model's MACs
    (of its nodes, for a model without products). Nodes count once, however often a Loop runs them.
    """

    provider: str
    nodes: int
    outside: tuple[str, ...]
    products_outside: tuple[str, ...]
    share_outside: float

    def fault(self) -> str | None:
        """What is wrong with it, naming the nodes; None if the provider does the work."""
        if self.products_outside:
            kind, names = "matrix products", self.products_outside
        elif self.share_outside > MAX_SHARE_OUTSIDE:
            kind, names = "nodes", self.outside
        else:
            return None
        return (
            f"provider {self.provider!r} leaves {self.share_outside:.1%} of the MACs and {len(self.outside)} of "
            f"{self.nodes} nodes to others, among them these {kind}: {listed(names)}; "
            f"at most {MAX_SHARE_OUTSIDE:.0%} and no matrix product is allowed"
        )


def listed(names: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def check_placement(
    model: Path,
    feeds: Mapping[str, Any],
    provider: str,
    threads: int | None,
    scratch: Path,
    allow_fallback: bool = False,
) -> Placement:
    """Run once per provider with profiling; `GateError` if a product, or over 1 % of the MACs, runs outside of it.

    The total comes from a run on the CPU: an accelerator shows its part as fused nodes without shapes. `scratch` is a
    folder for the traces. With `allow_fallback` the placement is returned whatever it is; a Loop is a `UsageError` on
    providers without control flow even so.
    """
    whole = trace(model, feeds, "cpu", threads, scratch)
    require_control_flow(model.name, {record["op_name"] for record in whole}, provider)
    asked = trace(model, feeds, provider, threads, scratch)
    placement = placement_of(asked, resolve_provider(provider), sum(map(node_macs, whole)))
    if not allow_fallback and (fault := placement.fault()) is not None:
        raise GateError(
            f"{model.name}: {fault}; measure with --provider cpu, export in a format that the provider runs, "
            "or time it as it is with --allow-fallback"
        )
    return placement


def require_control_flow(model: str, operators: Collection[str], provider: str) -> None:
    """`UsageError` if there is a Loop among a graph's operators and the provider has none."""
    loops = sorted(LOOPS & set(operators))
    if loops and short_name(provider) not in CONTROL_FLOW:
        raise UsageError(
            f"{model} holds a {loops[0]}, which provider {short_name(provider)!r} does not run as a whole: every step "
            "would go back and forth through the CPU; name the denoiser, one evaluation per call, or another provider "
            f"({', '.join(sorted(CONTROL_FLOW))})"
        )


def trace(model: Path, feeds: Mapping[str, Any], provider: str, threads: int | None, scratch: Path) -> Records:
    """The node records of one profiled run; ONNX Runtime writes its trace to `scratch`."""
    session = open_session(model, threads, provider, profile_prefix=str(scratch / "trace"))
    try:
        session.run(None, dict(feeds))
    except runtime_errors(require_onnxruntime()) as error:
        raise UsageError(f"{model.name}: provider {short_name(provider)!r} cannot run it: {error}") from error
    return node_records(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))


def node_records(events: Records) -> Records:
    """What a trace says of executed nodes: their `args`, with the node's own `name`."""
    return [
        {**event["args"], "name": event["name"].removesuffix("_kernel_time")}
        for event in events
        if event.get("args", {}).get("provider")
    ]


def placement_of(records: Records, provider: str, total_macs: int) -> Placement:
    """Judge the node records of a run on `provider` (ONNX Runtime's name of it)."""
    nodes = dict.fromkeys(_node(record) for record in records)
    elsewhere = [record for record in records if record["provider"] != provider]
    outside = dict.fromkeys(_node(record) for record in elsewhere)
    products = dict.fromkeys(_node(record) for record in elsewhere if is_product(record["op_name"]))
    share = sum(map(node_macs, elsewhere)) / total_macs if total_macs else len(outside) / max(len(nodes), 1)
    return Placement(short_name(provider), len(nodes), tuple(outside), tuple(products), share)


def summary(placement: Placement) -> str:
    """ "Gather x3, Shape": the operators outside, the most frequent first."""
    kinds = Counter(name.rsplit("(", 1)[1].removesuffix(")") for name in placement.outside)
    return ", ".join(name if count == 1 else f"{name} x{count}" for name, count in kinds.most_common())


def is_product(operator: str) -> bool:
    """Whether an operator multiplies matrices, whatever it fuses with that."""
    return any(kind in operator for kind in _PRODUCTS)


def node_macs(record: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one executed node from its recorded shapes; 0 for what is not a product."""
    name = record["op_name"]
    inputs = [shape for one in record.get("input_type_shape", []) for shape in one.values()]
    outputs = [shape for one in record.get("output_type_shape", []) for shape in one.values()]
    if not inputs or not inputs[0] or not outputs:
        return 0
    first, values = inputs[0], int(math.prod(outputs[0]))
    if "Attention" in name:
        return _attention_macs(inputs, values, int(outputs[0][-1]))
    if name == "FusedMatMul" and len(first) > 1 and len(outputs[0]) > 1:  # its operands may be transposed
        return values * int(first[-1] * first[-2] // max(outputs[0][-2], 1))
    if "MatMul" in name:
        return values * int(first[-1])
    if "Gemm" in name:  # the shared dimension, whichever operand is transposed
        return values * int(math.prod(first) // max(outputs[0][0], 1))
    if "Conv" in name and len(inputs) > _FILTER_INPUT.get(name, 1):
        return values * int(math.prod(inputs[_FILTER_INPUT.get(name, 1)][1:]))
    return 0


def _attention_macs(inputs: Sequence[Sequence[int]], values: int, width: int) -> int:
    """Scores and their product with the values; where input 1 is a matrix of weights, the projections as well."""
    first = inputs[0]
    if len(inputs) > 1 and len(inputs[1]) == 2:  # com.microsoft.Attention: tokens [B, S, D] and weights [D, 3 D]
        tokens = math.prod(first[:-1])
        return int(tokens * math.prod(inputs[1]) + 2 * tokens * first[-2] * width)
    apart = len(inputs) > 1 and len(inputs[1]) > 2  # queries, keys, values; otherwise they are packed in one
    keys, queries = (inputs[1][-2], math.prod(first)) if apart else (first[1], values)
    return int(keys) * (values + int(queries))


def _node(record: Mapping[str, Any]) -> str:
    name = record["name"] or f"node {record.get('node_index', '?')}"
    return f"{name} ({record['op_name']})"
