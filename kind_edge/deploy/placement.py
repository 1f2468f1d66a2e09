"""Which provider does the work: an accelerator that quietly runs on the CPU is an error, not a footnote.

ONNX Runtime puts shape arithmetic on the CPU by design, so a fallback is judged by its share of multiply-accumulates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kind_edge.deploy.session import CPU, open_session, resolve_provider
from kind_edge.errors import GateError

MAX_CPU_SHARE = 0.01
"""Share of the model's multiply-accumulates that may stay on the CPU when another provider was asked for."""


@dataclass(frozen=True)
class Placement:
    """What one profiled run left to the CPU provider: nodes of all nodes, and multiply-accumulates."""

    nodes: int
    cpu_nodes: int
    cpu_macs: int


def check_placement(model: Path, feeds: Mapping[str, Any], provider: str, threads: int | None, scratch: Path) -> None:
    """Run once per provider with profiling and raise `GateError` if over 1 % of the work stays on the CPU.

    The total comes from a run on the CPU: an accelerator shows its part as fused nodes without shapes.
    """
    if resolve_provider(provider) == CPU:
        return
    asked = profile(model, feeds, provider, threads, scratch)
    total_macs = profile(model, feeds, "cpu", threads, scratch).cpu_macs
    share = asked.cpu_macs / total_macs if total_macs else asked.cpu_nodes / max(asked.nodes, 1)
    if share > MAX_CPU_SHARE:
        raise GateError(
            f"{model.name}: provider {provider!r} leaves {share:.0%} of the work to the CPU "
            f"({asked.cpu_nodes} of {asked.nodes} nodes), at most {MAX_CPU_SHARE:.0%} is allowed; "
            "measure with --provider cpu, or export in a format that the provider runs"
        )


def profile(model: Path, feeds: Mapping[str, Any], provider: str, threads: int | None, scratch: Path) -> Placement:
    """Where the nodes of one run were executed; ONNX Runtime's trace is written to `scratch`."""
    session = open_session(model, threads, provider, profile_prefix=str(scratch / "trace"))
    session.run(None, dict(feeds))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return placement_of([event["args"] for event in events if event.get("args", {}).get("provider")])


def placement_of(nodes: Sequence[Mapping[str, Any]]) -> Placement:
    """Add up the node records of a trace."""
    on_cpu = [node for node in nodes if node["provider"] == CPU]
    return Placement(len(nodes), len(on_cpu), sum(node_macs(node) for node in on_cpu))


def node_macs(node: Mapping[str, Any]) -> int:
    """Multiply-accumulates of one executed node from its recorded shapes; 0 for what is not a matrix product."""
    name = node["op_name"]
    inputs = [shape for record in node.get("input_type_shape", []) for shape in record.values()]
    outputs = [shape for record in node.get("output_type_shape", []) for shape in record.values()]
    if not inputs or not inputs[0] or not outputs:
        return 0
    values: int = math.prod(outputs[0])
    if "MatMul" in name:
        return values * int(inputs[0][-1])
    if "Gemm" in name:  # the shared dimension, whichever operand is transposed
        return values * int(math.prod(inputs[0]) // max(outputs[0][0], 1))
    if "Conv" in name and len(inputs) > 1:
        return values * int(math.prod(inputs[1][1:]))
    return 0
