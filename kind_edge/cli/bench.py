"""`kind-edge bench`: how long a model takes on this machine, and how much memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.export import conditions, milliseconds
from kind_edge.cli.terminal import Terminal, terminal_of
from kind_edge.errors import UsageError

if TYPE_CHECKING:
    from kind_edge.deploy.bench import LatencyReport
    from kind_edge.deploy.manifest import Manifest

IMAGE_SHARE = 10
"""An image is measured in a tenth of the runs: each is some forty evaluations itself."""

RUNNABLE = (".onnx", ".ort")
PACKAGE = ".mlpackage"


def bench(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL.onnx", help="A bundle, or any ONNX model.")],
    provider: Annotated[
        str, typer.Option("--provider", metavar="cpu|cuda|...", help="The execution provider of ONNX Runtime.")
    ] = "cpu",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, metavar="N", help="Threads.", show_default="one per core")
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, metavar="N", help="Timed evaluations.")] = 50,
    as_json: options.Json = False,
) -> None:
    """Measure latency and peak memory on this machine.

    Every model runs in a process of its own. Of a bundle: one evaluation of every ONNX model in it, and one whole image
    of the model that an app loads.
    """
    terminal = terminal_of(context)
    if source.rstrip("/").endswith(PACKAGE):
        raise UsageError(
            f"{source}: Core ML runs on Apple's systems alone; kind-edge verify BUNDLE checks what it computes"
        )
    with terminal.stages() as begin:
        if source.endswith(RUNNABLE):
            reports = {Path(source).name: _model(Path(source), provider, threads, runs, begin)}
        else:
            reports = _bundle(terminal, source, provider, threads, runs, begin)
    if as_json:
        measurements = [{"name": name, **report.to_dict()} for name, report in reports.items()]
        terminal.json({"source": source, "measurements": measurements})
    else:
        _print(terminal, reports)


def _model(path: Path, provider: str, threads: int | None, runs: int, begin: Callable[[str], None]) -> LatencyReport:
    from kind_edge.deploy.bench import bench_model

    begin(f"measuring {path.name}")
    return bench_model(path, threads, runs=runs, provider=provider)


def _bundle(
    terminal: Terminal, source: str, provider: str, threads: int | None, runs: int, begin: Callable[[str], None]
) -> dict[str, LatencyReport]:
    from kind_edge.deploy.bench import bench_image
    from kind_edge.deploy.bundle import open_bundle, verified_manifest

    with open_bundle(source) as folder:
        manifest = verified_manifest(folder, source)
        _say_what_is_left_out(terminal, manifest)
        files = [file for file in manifest.models if file.endswith(RUNNABLE)]
        reports = {file: _model(folder / file, provider, threads, runs, begin) for file in files}
        begin("measuring one image")
        image = bench_image(folder, None, threads, runs=max(1, runs // IMAGE_SHARE), provider=provider)
    return {**reports, "one image": image}


def _say_what_is_left_out(terminal: Terminal, manifest: Manifest) -> None:
    if packages := [file for file in manifest.models if file.endswith(PACKAGE)]:
        terminal.note(f"{', '.join(packages)} not measured: Core ML runs on Apple's systems alone")


def _print(terminal: Terminal, reports: dict[str, LatencyReport]) -> None:
    terminal.out.print(tables.heading("Latency"))
    headers = ("", "size", "load", "p50", "p90", "p99", "peak memory", "runs")
    rows = [
        (
            name,
            tables.size(report.size_bytes),
            *map(milliseconds, (report.cold_load_ms, report.p50_ms, report.p90_ms, report.p99_ms)),
            tables.size(report.peak_memory_bytes) if report.peak_memory_bytes is not None else "unknown",
            str(report.runs),
        )
        for name, report in reports.items()
    ]
    terminal.out.print(tables.figures(headers, rows))
    terminal.out.print()
    first = next(iter(reports.values()))
    terminal.out.print(tables.facts([("measured", conditions(first))]))
    terminal.out.print()
