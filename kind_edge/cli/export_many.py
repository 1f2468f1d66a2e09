"""`kind-edge export --profiles ... --classes-file ...`: many bundles, and a table with a row for each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kind_edge.cli import options, quality_view, tables
from kind_edge.cli.tables import Cell
from kind_edge.cli.terminal import Terminal
from kind_edge.errors import KindEdgeError, UsageError
from kind_edge.units import format_seconds

if TYPE_CHECKING:
    from kind_edge.cli.terminal import OnCount
    from kind_edge.deploy.fleet import Fleet, FleetBundle
    from kind_edge.deploy.fleet_progress import FleetProgress

    OnProgress = Callable[[FleetProgress], None]

_STATUS = {1: "gate failed", 2: "refused", 3: "no plan fits", 4: "unreadable", 70: "a bug"}


def check(
    profile: str | None, profiles: str | None, classes: str | None, classes_file: Path | None, plan_file: Path | None
) -> None:
    """`UsageError` for options of one bundle beside those of many, and for profiles that are not known."""
    if (profile is None) == (profiles is None):
        raise UsageError(
            "--classes-file: one of --profile and --profiles is needed; kind-edge profiles list shows all"
            if profile is None
            else "--profile and --profiles: give one of them"
        )
    if plan_file is not None:
        raise UsageError("--plan is one bundle's: it does not go with --profiles and --classes-file")
    if classes is not None and classes_file is not None:
        raise UsageError("--classes and --classes-file: give one of them")
    for name in options.split_names(profiles) or ([profile] if profile else []):
        options.known_profile(name)
    if profiles is not None and not options.split_names(profiles):
        raise UsageError("--profiles: none given; kind-edge profiles list shows all")


def run(
    terminal: Terminal,
    checkpoint: str,
    profiles: Sequence[str],
    classes_file: Path | None,
    output: Path | None,
    rest: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Make them, show them, and exit with the worst code of all."""
    from kind_edge.deploy.class_sets import read_class_sets
    from kind_edge.deploy.fleet import export_many

    class_sets = None if classes_file is None else read_class_sets(classes_file)
    place = output or Path(f"{Path(checkpoint).resolve().name}-fleet")
    try:
        with _shown(terminal) as (on_progress, on_measure):
            fleet = export_many(
                checkpoint, profiles=profiles, class_sets=class_sets, output=place,
                on_progress=on_progress, on_measure=on_measure, on_note=terminal.note, **rest,
            )  # fmt: skip
    except KeyboardInterrupt:
        terminal.note(f"bundles that are complete stay in {place}; the same command goes on")
        raise
    if as_json:
        terminal.json(fleet.to_dict())
    else:
        print_fleet(terminal, fleet)
    if fleet.exit_code:
        raise typer.Exit(fleet.exit_code)


@contextlib.contextmanager
def _shown(terminal: Terminal) -> Iterator[tuple[OnProgress, OnCount]]:
    """One bar for all bundles with what each process does; in a log a line whenever one more is complete."""
    with terminal.working():
        if not terminal.animated:
            yield _logged(terminal), lambda done, total: None
            return
        with terminal.progress_bar() as bar:
            task = bar.add_task("exporting", total=None, details="starting")

            def progress(now: FleetProgress) -> None:
                bar.update(task, completed=now.done, total=now.total, details="; ".join(now.now))

            def measure(done: int, total: int) -> None:
                bar.update(task, details=f"measuring what cuts cost, once for this model: {done} of {total}")

            yield progress, measure


def _logged(terminal: Terminal) -> OnProgress:
    told = 0

    def progress(now: FleetProgress) -> None:
        nonlocal told
        if now.done > told:
            told = now.done
            terminal.note(f"{now.done} of {now.total} bundles")

    return progress


def print_fleet(terminal: Terminal, fleet: Fleet) -> None:
    """A row for each bundle, and why there is none where there is none."""
    out = terminal.out
    made = [each for each in fleet.bundles if each.failure is None]
    told = f"{len(made)} of {tables.count(len(fleet.bundles), 'bundle')}"
    kept = sum(each.kept for each in fleet.bundles)
    out.print(
        tables.heading(f"Bundles in {fleet.output}", told + (f", {kept} of them complete before" if kept else ""))
    )
    headers = ("", "form", "ranks", "runs on", "size", "predicted", "here", "parity", "")
    out.print(tables.figures(headers, [_row(each) for each in fleet.bundles], left=(0, 1, 2, 3, 8)))
    out.print()
    if made:
        there = {name: None for each in made for name in _threads(each)}
        out.print(tables.facts([
            ("size", "of what an app loads; parity is that of its denoiser, the worst over classes and steps"),
            ("predicted", "one image on the device, sustained"),
            ("here", f"one image, p50, on {', '.join(there)}"),
        ]))  # fmt: skip
        out.print()
    for each in made:
        for warning in _warnings(each):
            terminal.say_warning(f"{each.job.name}: {warning}")
    for message, names in _reasons(fleet).items():
        terminal.say_error(f"{', '.join(names)}: {message}")
    if terminal.verbose:
        for details in {each.failure.details for each in fleet.bundles if each.failure}:
            terminal.err.print(details, markup=False, soft_wrap=True)


def _row(bundle: FleetBundle) -> tuple[Cell, ...]:
    if bundle.failure is not None or bundle.manifest is None:
        status = _STATUS.get(bundle.failure.exit_code if bundle.failure else 70, "failed")
        return (bundle.job.name, status, "", "", "", "", "", "", tables.check(False))
    raw, manifest = bundle.manifest.raw, bundle.manifest
    plan, file = raw["plan"], manifest.default_model
    decoder = manifest.decoder_for(manifest.models[file])
    loaded = sum(manifest.files[path].size_bytes for path in (file, *([decoder.path] if decoder else [])))
    parity_db = raw["verification"]["parity"][file]
    return (
        bundle.job.name,
        plan["form"],
        _ranks(plan),
        f"{plan['unit']}, {plan['precision']}",
        tables.size(loaded),
        format_seconds(plan["sustained_image_latency_s"]),
        format_seconds(raw["latency"]["image"]["p50_ms"] / 1e3),
        "none" if parity_db is None else f"{parity_db:.1f} dB",
        tables.check(True),
    )


def _ranks(plan: Mapping[str, Any]) -> str:
    """ "16-48 + 2-5": of the shared parts and, where there are any, of the tailors."""
    shared = [m.get("learngene_rank", m.get("rank")) for m in plan["matrices"].values()]
    tailors = [m["tailor_rank"] for m in plan["matrices"].values() if m.get("tailor_rank")]
    return " + ".join(tables.span(ranks) for ranks in (shared, tailors) if ranks)


def _threads(bundle: FleetBundle) -> Iterator[str]:
    assert bundle.manifest is not None
    here = bundle.manifest.raw["latency"]["image"]["conditions"]
    threads = "all physical cores" if here["threads"] is None else tables.count(here["threads"], "thread")
    yield f"{here['cpu']}, {threads}"


def _warnings(bundle: FleetBundle) -> Iterator[str]:
    """As after an export of this bundle alone."""
    assert bundle.manifest is not None
    raw = bundle.manifest.raw
    if (warning := quality_view.warning(raw["quality"])) is not None:
        yield warning
    if not raw.get("healing", {}).get("kept", True):
        yield raw["healing"]["told"]


def _reasons(fleet: Fleet) -> dict[str, list[str]]:
    """The bundles that have failed, by what went wrong."""
    found: dict[str, list[str]] = {}
    for each in fleet.bundles:
        if each.failure is not None:
            message = each.failure.message
            if each.failure.exit_code == KindEdgeError.exit_code:
                message = f"a bug in kind-edge: {each.failure.kind}: {message}; please report it with what -v prints"
            found.setdefault(message, []).append(each.job.name)
    return found
