"""`kind-edge inspect`: what lies in a checkpoint, a bundle or an ONNX file, on one screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kind_edge.cli import options, quality_view, tables
from kind_edge.cli.tables import Cell
from kind_edge.cli.terminal import Terminal, terminal_of
from kind_edge.units import format_flops

if TYPE_CHECKING:
    from kind_edge.deploy.graph_facts import GraphFacts
    from kind_edge.deploy.inspection import Inspection

SHOWN_OPERATORS = 12


def inspect(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|BUNDLE|MODEL",
            help="A checkpoint, a shipped model's name, a bundle, or any .onnx file.",
        ),
    ] = options.SHIPPED,
    as_json: options.Json = False,
) -> None:
    """Show size, work, ranks, classes and provenance."""
    terminal = terminal_of(context)
    with terminal.working():
        from kind_edge.deploy.inspection import inspect as look

        found = look(source)
    if as_json:
        terminal.json(found.to_dict())
    else:
        print_inspection(terminal, found)


def print_inspection(terminal: Terminal, found: Inspection) -> None:
    out = terminal.out
    out.print(tables.heading(f"{found.kind} {found.name}", found.path))
    out.print(tables.facts(_facts(found)))
    if found.parts:
        out.print(tables.heading({"onnx": "Constants, by the operator that reads them"}.get(found.kind, "Bytes")))
        total = sum(found.parts.values())
        rows = [(name, tables.size(count), tables.share(count, total)) for name, count in found.parts.items()]
        out.print(tables.figures(("", "", ""), rows))
    if found.graphs:
        out.print(tables.heading("Graphs" if len(found.graphs) > 1 else "Graph", "work of matrix products at batch 1"))
        headers = ("", "size", "constants", "mostly", "MACs", "opset", "nodes")
        out.print(tables.figures(headers, map(_graph_row, found.graphs)))
        out.print()
        out.print(tables.facts(_graph_facts(found.graphs)))
    out.print()


def _facts(found: Inspection) -> Iterator[tuple[str, Cell]]:
    yield "sha256", found.sha256
    yield "size", tables.size(found.size_bytes)
    seen = f", {tables.amount(found.active_parameters)} seen by one image" if found.active_parameters else ""
    yield "parameters", f"{tables.amount(found.parameters)} stored{seen}"
    if found.flops:
        flops = ", ".join(f"{format_flops(value)} ({name})" for name, value in found.flops.items())
        yield "one evaluation", flops
    if found.ranks:
        yield "ranks", ", ".join(f"{name} {tables.span(list(ends))}" for name, ends in found.ranks.items())
    if found.classes:
        yield "classes", ", ".join(found.classes)
    if found.inside_guidance is not None:
        *others, last = map(str, found.step_counts)
        counts = f"{', '.join(others)} or {last}" if others else last
        yield "works in", f"{counts} steps, with guidance {found.inside_guidance:g} inside: no guidance branch"
    if found.shape:
        yield "model" if found.kind == "checkpoint" else "made for", _flat(found.shape)
    for name, value in found.provenance.items():
        text = _provenance(name, value)
        if text:
            yield name.replace("_", " "), text


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _provenance(name: str, value: Any) -> str:
    """One line of provenance; measurements in full are for --json."""
    if name == "verification":
        return ", ".join(f"{file} {worst} dB" for file, worst in value.get("parity", {}).items())
    if name == "quality":
        return quality_view.summary(value)
    if name == "quality_by_steps" and isinstance(value, Mapping):
        return "; ".join(f"{steps}: {_flat(each)}" for steps, each in value.items() if isinstance(each, Mapping))
    if isinstance(value, Mapping):
        inner = {key: item for key, item in value.items() if not isinstance(item, Mapping | list)}
        return _flat(inner)
    return _short(value)


def _graph_row(graph: GraphFacts) -> tuple[str, ...]:
    return (
        graph.file,
        tables.size(graph.size_bytes),
        tables.amount(graph.parameters),
        graph.precision,
        tables.amount(graph.macs),
        ", ".join(str(version) if name == "ai.onnx" else f"{name} {version}" for name, version in graph.opsets.items()),
        str(sum(graph.operators.values())),
    )


def _graph_facts(graphs: tuple[GraphFacts, ...]) -> Iterator[tuple[str, Cell]]:
    first = graphs[0]
    yield "inputs", ", ".join(f"{name} {text}" for name, text in first.inputs.items())
    yield "outputs", ", ".join(f"{name} {text}" for name, text in first.outputs.items())
    for graph in graphs:
        shown = list(graph.operators.items())[:SHOWN_OPERATORS]
        more = len(graph.operators) - len(shown)
        text = ", ".join(f"{number} {name}" for name, number in shown) + (f", {more} other kinds" if more else "")
        yield "operators" if len(graphs) == 1 else graph.file, text
        if len(graphs) == 1:
            yield from ((f"{name} {graph.opsets[name]}", ", ".join(used)) for name, used in graph.used.items())
        if graph.uncounted:
            yield "", f"{tables.count(len(graph.uncounted), 'product')} without a known shape: not in the MACs"
        if graph.has_subgraphs:
            yield "", "bodies of Loop and If are counted once"
