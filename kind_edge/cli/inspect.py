"""`kind-edge inspect`: what lies in a checkpoint, a bundle or an ONNX file, on one screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kind_edge.bounded import well_formed
from kind_edge.cli import options, quality_view, tables
from kind_edge.cli.tables import Cell
from kind_edge.cli.terminal import Terminal, terminal_of
from kind_edge.model.provenance import NOT_STATED, lineage, lineage_words
from kind_edge.units import format_flops

if TYPE_CHECKING:
    from kind_edge.deploy.graph_facts import GraphFacts
    from kind_edge.deploy.inspection import Inspection

SHOWN_OPERATORS, SHOWN_TEXTS = 8, 12
_JUDGED = ("images", "frechet", "precision", "recall", "class_accuracy")
"""Of an evaluation in full."""
_SHOWN = (
    "source", "recommended", "quality", "quality_by_steps", "adapted", "healing", "verification", "tools",
)  # fmt: skip
"""Of provenance, what has a line beside those of the lineage; the rest is for --json."""


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
    with well_formed(found.path):
        out.print(tables.facts(list(_facts(found))))
    for title, parts in _bytes(found):
        out.print(tables.heading(title))
        total = sum(parts.values())
        rows = [
            (name, tables.size(size), tables.share(size, total), _note(found, name)) for name, size in parts.items()
        ]
        out.print(tables.figures(("", "", "", ""), rows, left=(0, 3)))
    if found.graphs:
        out.print(tables.heading("Graphs" if len(found.graphs) > 1 else "Graph", "work of matrix products at batch 1"))
        headers = ("", "size", "constants", "mostly", "MACs", "opset", "nodes")
        out.print(tables.figures(headers, map(_graph_row, found.graphs)))
        out.print()
        out.print(tables.facts(_graph_facts(found)))
    out.print()


def _bytes(found: Inspection) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Titles, and bytes by name."""
    if found.kind == "bundle":
        yield "Bytes by file", _by_folder(found.parts, {graph.file for graph in found.graphs})
        default = next((graph for graph in found.graphs if graph.file == found.shape["default_model"]), None)
        if default and default.part_bytes:
            yield f"Bytes in {default.file}", default.part_bytes
    elif found.kind == "onnx" and not found.graphs[0].part_bytes:
        yield "Constants, by the operator that reads them", found.parts
    elif found.parts:
        yield "Bytes", found.parts


def _by_folder(files: Mapping[str, int], apart: Collection[str]) -> dict[str, int]:
    """Model files apart, the others by the folder at the top, largest first."""
    sizes: Counter[str] = Counter()
    for name, size in files.items():
        folder, slash, _ = name.partition("/")
        sizes[name if name in apart or not slash else f"{folder}/"] += size
    return dict(sizes.most_common())


def _note(found: Inspection, part: str) -> str:
    return f"{tables.size(found.class_bytes)} a class" if part == "tailors" and found.class_bytes else ""


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
    yield from _provenance_lines(found)


def _provenance_lines(found: Inspection) -> Iterator[tuple[str, Cell]]:
    """Whose it is and what it was made of, then what was measured."""
    told = found.provenance
    if found.kind == "onnx":
        yield from ((name.replace("_", " "), text) for name, text in list(told.items())[:SHOWN_TEXTS])
        return
    lines = told.get("provenance", {"licence": told.get("licence", NOT_STATED)})
    if found.kind == "checkpoint":
        lines = lineage(found.name, found.sha256, told)
    yield from lineage_words(lines).items()
    for name in _SHOWN:
        if name in told and (text := _provenance(name, told[name])):
            yield name.replace("_", " "), text


def _judged(values: Mapping[str, Any]) -> str:
    return _flat({key: values[key] for key in ("frechet", "class_accuracy") if key in values})


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
    if name == "quality" and isinstance(value, Mapping) and all(isinstance(each, Mapping) for each in value.values()):
        return quality_view.summary(value)
    if name == "quality" and isinstance(value, Mapping):
        return _flat({key: value[key] for key in _JUDGED if key in value})
    if name == "quality_by_steps" and isinstance(value, Mapping):
        return "; ".join(f"{steps}: {_judged(each)}" for steps, each in value.items() if isinstance(each, Mapping))
    if name == "tools" and isinstance(value, Mapping):
        value = {"kind-edge" if key == "kind_edge" else key: item for key, item in value.items()}
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


def _graph_facts(found: Inspection) -> Iterator[tuple[str, Cell]]:
    graphs = found.graphs
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
