"""`kind-edge export`: plan, merge, export, verify, measure, bundle."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from kind_edge.cli import export_many, options, quality_view, refusal_view, tables
from kind_edge.cli.tables import Cell
from kind_edge.cli.terminal import Terminal, terminal_of
from kind_edge.errors import UsageError
from kind_edge.units import format_seconds

if TYPE_CHECKING:
    from kind_edge.deploy.bench import LatencyReport
    from kind_edge.deploy.making import Bundle
    from kind_edge.training.healing import HealingProgress

MANY = "Many bundles in one go"


def export(
    context: typer.Context,
    checkpoint: options.Checkpoint = options.SHIPPED,
    profile: options.ProfileOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The bundle, or the folder of many.",
            show_default="./<model>-<profile>",
        ),
    ] = None,
    formats: options.Formats = "onnx",
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Replay a plan instead of making one; it has its own choices."),
    ] = None,
    classes: options.Classes = None,
    form: options.Form = "auto",
    precision: options.Precision = "auto",
    unit: options.Unit = "auto",
    modulation: options.Modulation = "auto",
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    sampler: options.Sampler = None,
    autoencoder: options.Autoencoder = None,
    max_latency: options.MaxLatency = None,
    max_memory: options.MaxMemory = None,
    max_flops: options.MaxFlops = None,
    max_size: options.MaxSize = None,
    max_quality_loss: options.MaxQualityLoss = None,
    minimize: options.Minimize = None,
    burst: options.Burst = False,
    heal: Annotated[
        str | None,
        typer.Option(
            "--heal",
            metavar="5m",
            callback=options.duration("--heal"),
            help="Let the cut model learn from the full one for so long; needs no data, and goes on if interrupted.",
            show_default="off",
        ),
    ] = None,
    profiles: Annotated[
        str | None,
        typer.Option("--profiles", metavar="A,B", help="A bundle for each device, in DIR/PROFILE.",
                     rich_help_panel=MANY),
    ] = None,
    classes_file: Annotated[
        Path | None,
        typer.Option("--classes-file", metavar="SETS.yaml", help="A bundle for each set of classes too, in "
                     "DIR/PROFILE/SET; the file has a list of classes for each set.", rich_help_panel=MANY),
    ] = None,
    coreml_target: options.CoreMLTarget = "iOS18",
    coreml_weights: options.CoreMLWeights = "auto",
    coreml_layout: options.CoreMLLayout = "auto",
    coreml_batch: options.CoreMLBatch = "fixed",
    coreml_function: options.CoreMLFunction = None,
    sign: options.Sign = None,
    keep_failed: Annotated[
        bool, typer.Option("--keep-failed", help="Keep what was made of a bundle that failed a gate, as DIR.failed.")
    ] = False,
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Make the best bundle that a device affords, or one for each of many devices and sets of classes.

    Plans, merges, exports, compares every file with the gated model, measures it on this machine, and writes one folder
    with a manifest. A check that fails ends with exit code 1, and no bundle is left behind.
    Of many bundles, what they have in common is made once; interrupted, the same command goes on.
    """
    terminal = terminal_of(context)
    many = profiles is not None or classes_file is not None
    if many:
        export_many.check(profile, profiles, classes, classes_file, plan_file)
    elif profile is None and plan_file is None:
        raise UsageError("--profile is missing: which device is it for? kind-edge profiles list shows all")
    wanted = options.known_formats(formats)
    choices = {
        "classes": options.split_names(classes), "steps": steps, "guidance": guidance, "sampler": sampler,
        "max_latency": max_latency, "max_memory": max_memory, "max_flops": max_flops, "max_size": max_size,
        "max_quality_loss": max_quality_loss, "minimize": minimize, "form": form, "precision": precision, "unit": unit,
        "modulation": modulation, "burst": burst, "autoencoder": autoencoder,
    }  # fmt: skip
    coreml = options.coreml_choices(wanted, coreml_target, coreml_weights, coreml_layout, coreml_function, coreml_batch)
    options.check_writable(output or Path("bundle"))
    key = options.signing_key(sign)
    if many:
        rest: dict[str, object] = {"formats": wanted, "heal": heal, "keep_failed": keep_failed, "sign": key, **choices}
        rest |= {"format_choices": {"coreml": coreml} if "coreml" in wanted else {}}
        names = options.split_names(profiles or profile) or []
        export_many.run(terminal, checkpoint, names, classes_file, output, rest, as_json)
        return
    with (
        _healing_kept(terminal, heal),
        refusal_view.shown(terminal, as_json),
        terminal.stages() as begin,
        terminal.measuring() as on_measure,
    ):
        begin("starting")
        from kind_edge.budget.plan import read_plan
        from kind_edge.deploy import pipeline

        plan = None if plan_file is None else read_plan(plan_file)
        bundle = pipeline.export(
            checkpoint, profile=profile, plan=plan, output=output, formats=wanted, keep_failed=keep_failed, heal=heal,
            sign=key, on_stage=begin, on_measure=on_measure, format_choices={"coreml": coreml | {
                "on_progress": lambda done, total: begin.count(done, total, "weights", "palettes")
            }},
            on_healing=lambda now: begin.count(now.seconds, now.total_s, "s", _healing_details(now)),
            **choices,  # type: ignore[arg-type]  # their types were checked one by one above
        )  # fmt: skip
    if (warning := quality_view.warning({each.name: each.to_dict() for each in bundle.quality})) is not None:
        terminal.say_warning(warning)
    if bundle.healing is not None and not bundle.healing.kept:
        terminal.say_warning(bundle.healing.told())
    if as_json:
        terminal.json(bundle.to_dict())
    else:
        print_bundle(terminal, bundle)


@contextlib.contextmanager
def _healing_kept(terminal: Terminal, heal: str | None) -> Iterator[None]:
    """What to do after an interruption."""
    try:
        yield
    except KeyboardInterrupt:
        if heal is not None:
            terminal.note("what was healed so far is kept beside the bundle; the same command goes on")
        raise


def _healing_details(now: HealingProgress) -> str:
    return f"step {now.step}, loss {now.loss:.4f}"


def print_bundle(terminal: Terminal, bundle: Bundle) -> None:
    """What was decided, what was written, what was measured, and what to try next."""
    from kind_edge.cli.plan_view import print_plan

    out, plan = terminal.out, bundle.plan
    print_plan(out, plan)
    marked = "those" if plan.decoder else "the one"
    out.print(tables.heading("Model files", f"the app loads {marked} marked *"))
    headers = ("", "size", "parity", "gate", "", "p50", "p90", "p99", "predicted")
    out.print(tables.figures(headers, _model_rows(bundle)))
    out.print()
    out.print(tables.facts(_conditions(bundle)))
    quality_view.print_quality(out, bundle.quality)
    if bundle.healing is not None and bundle.healing.kept:
        out.print(tables.facts([("", f"{bundle.healing.told()} of {bundle.healing.measure}")]))
    out.print(tables.heading("Bundle"))
    out.print(tables.facts((name, tables.size(size)) for name, size in bundle.files.items()))
    out.print()
    first = ("--class", plan.classes[0]) if plan.form == "switch" or len(plan.classes) == 1 else ()
    terminal.line(Text.assemble(("  written  ", "dim"), str(bundle.path)))
    terminal.next("generate", str(bundle.path), *first, "-o", f"{plan.classes[0]}.png")


def _model_rows(bundle: Bundle) -> Iterator[tuple[Cell, ...]]:
    """Size, parity and latency of every model file."""
    from kind_edge.deploy.manifest import read_manifest
    from kind_edge.deploy.parity import gate_db

    manifest = read_manifest(bundle.path)
    decoder = manifest.decoder_for(manifest.models[manifest.default_model])
    loaded = {manifest.default_model, decoder.path if decoder else ""}
    for file, worst_db in bundle.parity.items():
        entry = manifest.entry_of(file)
        wanted_db = gate_db(entry.role, entry.precision, entry.table_precision, file)
        report = bundle.latency.get(file)
        predicted_ms = bundle.predicted_here_ms.get(file)
        times_ms = (report.p50_ms, report.p90_ms, report.p99_ms, predicted_ms) if report else (None,) * 4
        size = sum(size for name, size in bundle.files.items() if name == file or name.startswith(f"{file}/"))
        yield (
            f"{'*' if file in loaded else ' '} {file}",
            tables.size(size) if size else "",  # a function shares the weights of its file
            f"{worst_db:.1f} dB" if worst_db is not None else "none",
            f"{wanted_db:.0f} dB",
            tables.check(worst_db is not None and worst_db >= wanted_db),
            *("" if value is None else milliseconds(value) for value in times_ms),
        )


def _conditions(bundle: Bundle) -> Iterator[tuple[str, Cell]]:
    """What the latencies above are, and the whole image."""
    image, plan = bundle.image_latency, bundle.plan
    yield "measured", conditions(next(iter(bundle.latency.values())))
    if any("sampler" in file for file in bundle.latency):
        yield "", "of the sampler one image: all steps, and its distance is PSNR"
    if any("decoder" in file for file in bundle.latency):
        yield "", "of a decoder one image, and its distance is PSNR"
    yield "image", f"{milliseconds(image.p50_ms)} here (p50 of {image.runs}), {milliseconds(image.p90_ms)} p90"
    if plan.profile != "host":
        first, lasting = format_seconds(plan.image_latency_s), format_seconds(plan.sustained_image_latency_s)
        yield "", f"{first} predicted for {plan.profile}, {lasting} sustained"
    yield "merge", f"{bundle.merge_db:.1f} dB: merged at full rank against the gated model"


def conditions(report: LatencyReport) -> str:
    """ "one evaluation, batch 1, on AMD EPYC, 2 threads, onnxruntime 1.31.1 cpu, 10 warm-ups, 50 runs"."""
    here = report.conditions
    threads = "all physical cores" if here.threads is None else tables.count(here.threads, "thread")
    warm = tables.count(report.warmups, "warm-up")
    return (
        f"one {report.subject}, batch {report.batch}, on {here.cpu}, {threads}, "
        f"{here.runtime} {here.provider}, {warm}, {tables.count(report.runs, 'run')}"
    )


def milliseconds(value_ms: float) -> str:
    return format_seconds(value_ms / 1e3)
