"""`kind-edge bench`: how long a model takes on this machine, and how much memory; or which of two is quicker."""

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
    from kind_edge.deploy.compare import Comparison
    from kind_edge.deploy.manifest import Manifest

IMAGE_SHARE = 10
"""An image is measured in a tenth of the runs: each is some forty evaluations itself."""

RUNNABLE = (".onnx", ".ort")
PACKAGE = ".mlpackage"


def bench(
    context: typer.Context,
    sources: Annotated[
        list[str], typer.Argument(metavar="BUNDLE|MODEL.onnx", help="A bundle, or any ONNX model; two for --compare.")
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure two models (or bundles) in turns, and how they compare.")
    ] = False,
    provider: Annotated[
        str, typer.Option("--provider", metavar="cpu|cuda|...", help="The execution provider of ONNX Runtime.")
    ] = "cpu",
    allow_fallback: Annotated[
        bool,
        typer.Option("--allow-fallback", help="Measure even if the provider leaves work to the CPU, and say what."),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            min=1,
            metavar="N",
            help="Threads.",
            show_default="what a bundle says is quickest, else one per core",
        ),
    ] = None,
    runs: Annotated[int, typer.Option("--runs", min=1, metavar="N", help="Timed evaluations.")] = 50,
    runner: Annotated[
        str | None,
        typer.Option(
            "--runner",
            metavar='"adb shell"',
            help="Measure on an Android device, with ONNX Runtime's onnxruntime_perf_test in /data/local/tmp there.",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure latency and peak memory on this machine.

    Every model runs in a process of its own. Of a bundle: one evaluation of every ONNX model in it, and one whole image
    of the model that an app loads. `--compare A B` interleaves two model files, or one image of two bundles. With
    --runner "adb shell" the models run on a phone instead.
    """
    terminal = terminal_of(context)
    if len(sources) != (2 if compare else 1):
        raise UsageError(
            f"--compare takes two models or two bundles, got {len(sources)}"
            if compare
            else f"one model or bundle at a time, got {len(sources)}; side by side: --compare {' '.join(sources)}"
        )
    if packages := [each for each in sources if each.rstrip("/").endswith(PACKAGE)]:
        raise UsageError(
            f"{packages[0]}: Core ML runs on Apple's systems alone; kind-edge verify BUNDLE checks what it computes"
        )
    if runner is not None and (compare or allow_fallback):
        raise UsageError("--runner measures one model or bundle, and cannot tell what a provider leaves to others")
    if compare:
        _compare(terminal, sources[0], sources[1], threads, runs, provider, allow_fallback, as_json)
        return
    (source,) = sources
    with terminal.stages() as begin:
        if runner is not None:
            reports = _on_phone(source, runner, provider, threads, runs, begin)
        elif source.endswith(RUNNABLE):
            reports = {Path(source).name: _model(Path(source), provider, threads, runs, allow_fallback, begin)}
        else:
            reports = _bundle(terminal, source, provider, threads, runs, allow_fallback, begin)
    if as_json:
        measurements = [{"name": name, **report.to_dict()} for name, report in reports.items()]
        terminal.json({"source": source, "measurements": measurements})
    else:
        terminal.out.print(tables.heading("Latency"))
        _print(terminal, reports)


def _on_phone(
    source: str, runner: str, provider: str, threads: int | None, runs: int, begin: Callable[[str], None]
) -> dict[str, LatencyReport]:
    """Every ONNX model of a bundle, or the one model."""
    from kind_edge.deploy.bundle import open_bundle, verified_manifest
    from kind_edge.deploy.phone_bench import bench_on_phone

    def measured(path: Path, threads: int | None) -> LatencyReport:
        begin(f"measuring {path.name} on the device")
        return bench_on_phone(path, runner, threads, runs, provider)

    if source.endswith(RUNNABLE):
        return {Path(source).name: measured(Path(source), threads)}
    with open_bundle(source) as folder:
        manifest = verified_manifest(folder, source)
        files = [file for file in manifest.models if file.endswith(RUNNABLE)]
        return {file: measured(folder / file, threads or manifest.threads) for file in files}


def _model(
    path: Path, provider: str, threads: int | None, runs: int, allow_fallback: bool, begin: Callable[[str], None]
) -> LatencyReport:
    from kind_edge.deploy.bench import bench_model

    begin(f"measuring {path.name}")
    return bench_model(path, threads, runs=runs, provider=provider, allow_fallback=allow_fallback)


def _bundle(
    terminal: Terminal,
    source: str,
    provider: str,
    threads: int | None,
    runs: int,
    allow_fallback: bool,
    begin: Callable[[str], None],
) -> dict[str, LatencyReport]:
    from kind_edge.deploy.bench import bench_image
    from kind_edge.deploy.bundle import open_bundle, verified_manifest

    with open_bundle(source) as folder:
        manifest = verified_manifest(folder, source)
        _say_what_is_left_out(terminal, manifest)
        files = _files(terminal, manifest, provider)
        threads = threads or manifest.threads
        reports = {file: _model(folder / file, provider, threads, runs, allow_fallback, begin) for file in files}
        begin("measuring one image")
        few = max(1, runs // IMAGE_SHARE)
        image = bench_image(folder, None, threads, runs=few, provider=provider, allow_fallback=allow_fallback)
    return {**reports, "one image": image}


def _say_what_is_left_out(terminal: Terminal, manifest: Manifest) -> None:
    if packages := [file for file in manifest.models if file.endswith(PACKAGE)]:
        terminal.note(f"{', '.join(packages)} not measured: Core ML runs on Apple's systems alone")


def _files(terminal: Terminal, manifest: Manifest, provider: str) -> list[str]:
    """What ONNX Runtime opens; of a provider without control flow no file with a Loop, and that is said."""
    from kind_edge.deploy.placement import LOOPS
    from kind_edge.deploy.providers import CONTROL_FLOW, resolve_provider, short_name

    name = short_name(resolve_provider(provider))
    files = [file for file in manifest.models if file.endswith(RUNNABLE)]
    used = {file: manifest.raw["models"][file].get("operators", {}).get("ai.onnx", ()) for file in files}
    loops = [file for file in files if name not in CONTROL_FLOW and LOOPS & set(used[file])]
    if loops:
        terminal.say_warning(f"{', '.join(loops)} left out: {name} does not run a Loop as a whole")
    return [file for file in files if file not in loops]


def _compare(
    terminal: Terminal,
    first: str,
    second: str,
    threads: int | None,
    runs: int,
    provider: str,
    allow_fallback: bool,
    as_json: bool,
) -> None:
    with terminal.stages() as begin:
        begin("measuring in turns")
        from kind_edge.deploy.compare import compare

        found = compare(first, second, threads, runs, provider, allow_fallback)
    if not found.quiet:
        terminal.say_warning(
            f"other processes took {found.other_load:.0%} of this machine meanwhile: both met them, so the ratio "
            "holds, but its interval is wider and the times themselves are too long"
        )
    if as_json:
        terminal.json({"sources": [first, second], **found.to_dict()})
        return
    terminal.out.print(tables.heading("In turns", f"{found.rounds} rounds, forth and back"))
    _print(terminal, {f"A {Path(first).name}": found.first, f"B {Path(second).name}": found.second})
    terminal.out.print(tables.facts([("A / B", _verdict(found)), ("", _spread(found))]))
    terminal.out.print()


def _verdict(found: Comparison) -> str:
    if found.low <= 1 <= found.high:
        return f"{found.ratio:.3f}: no difference that these runs could show"
    return f"{found.ratio:.3f}: A is the {'quicker' if found.ratio < 1 else 'slower'} one"


def _spread(found: Comparison) -> str:
    return f"95 % interval {found.low:.3f} to {found.high:.3f}, single rounds {found.lowest:.3f} to {found.highest:.3f}"


def _print(terminal: Terminal, reports: dict[str, LatencyReport]) -> None:
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
    facts = [("measured", conditions(first))]
    if first.conditions.provider != "cpu":
        facts.append(("", "each from arrays in the host's memory to arrays there: copies in, nothing still queued"))
    if first.conditions.simulated:
        facts.append(("", "SIMULATED on the CPU: what the provider takes is true, the times say nothing of a device"))
    facts += [(name, _fallback(report)) for name, report in reports.items() if report.placement is not None]
    terminal.out.print(tables.facts(facts))
    terminal.out.print()


def _fallback(report: LatencyReport) -> str:
    """What the provider left to others."""
    from kind_edge.deploy.placement import listed, summary

    placement = report.placement
    if placement is None or not placement.outside:
        return "nothing outside of the provider"
    told = f"{placement.share_outside:.2%} of the MACs and {len(placement.outside)} of {placement.nodes} nodes outside"
    if placement.products_outside:
        return f"FALLBACK: {told}, matrix products among them: {listed(placement.products_outside)}"
    fault = "FALLBACK: " if placement.fault() else ""
    return f"{fault}{told}: {summary(placement)}"
