"""`kind-edge plan`: what would be deployed, without making it; or what a named architecture costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from kind_edge.cli import options, plan_many, quality_view, refusal_view, tables
from kind_edge.cli.terminal import Terminal, terminal_of
from kind_edge.errors import UsageError
from kind_edge.registry import FORMATS

if TYPE_CHECKING:
    from kind_edge.budget.architecture import ArchitectureCost
    from kind_edge.budget.plan import Plan
    from kind_edge.budget.whole_model import PaperRow

ARCHITECTURE = "A named architecture instead of a checkpoint: its cost, no solving"
OF_ARCHITECTURE = {
    "arch", "num_classes", "rank", "profile", "convention", "precision", "unit", "steps", "guidance", "output",
    "as_json",
}  # fmt: skip
"""Options that its cost depends on, or that say where it goes."""
SEVERAL = "More plans than one"
ConventionChoice = Literal["exact", "paper"]


def plan(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint's folder, or the name of a shipped model.",
            show_default=options.SHIPPED,
        ),
    ] = None,
    profile: options.ProfileOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan, for export --plan.")
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
    formats: Annotated[
        str,
        typer.Option("--formats", metavar="|".join(FORMATS), help="What export is to write: the plan fits all of it."),
    ] = "onnx",
    coreml_target: options.CoreMLTarget = "iOS18",
    coreml_weights: options.CoreMLWeights = "auto",
    coreml_layout: options.CoreMLLayout = "auto",
    coreml_function: options.CoreMLFunction = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto", help="The whole front, for 1, 2, 5 and all classes; -o FILE.png draws it.",
            rich_help_panel=SEVERAL,
        ),
    ] = False,
    profiles: Annotated[
        str | None,
        typer.Option("--profiles", metavar="A,B", help="One plan for each device, side by side.",
                     rich_help_panel=SEVERAL),
    ] = None,
    burst: options.Burst = False,
    allow_resize: Annotated[
        str | None,
        typer.Option(
            "--allow-resize", metavar="10m", callback=options.duration("--allow-resize"), show_default="off",
            help="Smaller depths and widths are choices, too, with their quality after so long a healing. Measured "
            "first, once, which takes as long for each of three sizes; export --plan then wants --heal.",
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option("--arch", metavar="DiT-B/2", help="The architecture.", rich_help_panel=ARCHITECTURE),
    ] = None,
    num_classes: Annotated[
        int | None,
        typer.Option("--num-classes", min=1, metavar="C", help="Its classes.", rich_help_panel=ARCHITECTURE),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", metavar="R", help="Active rank of every block matrix; without it dense.",
            rich_help_panel=ARCHITECTURE,
        ),
    ] = None,
    convention: Annotated[
        ConventionChoice,
        typer.Option("--convention", help="exact: what really runs. paper: as the KIND authors count."),
    ] = "exact",
    as_json: options.Json = False,
) -> None:  # fmt: skip
    """Decide on the best model that a device affords.

    The plan says how every matrix is stored and what the whole costs. With --arch nothing is solved and no weights are
    needed: the cost of a named architecture is printed.
    """
    terminal = terminal_of(context)
    devices = options.split_names(profiles) or []
    for device in devices:
        options.known_profile(device)
    if (profile is None) == (not devices) or (devices and pareto):
        raise UsageError(
            "one of --profile and --profiles is needed, and --pareto goes with --profile: which device is it for? "
            "kind-edge profiles list shows all"
        )
    if output is not None:
        options.check_writable(output)
    wanted = options.known_formats(formats)
    coreml = options.coreml_choices(wanted, coreml_target, coreml_weights, coreml_layout, coreml_function)
    if arch is not None:
        _refuse_with_arch(context)
        assert profile is not None  # --profiles was refused
        costs, title = _architecture(arch, num_classes, rank, profile, convention, precision, unit, steps, guidance)
        _show_architecture(terminal, costs, title, output, as_json)
        return
    if rank is not None or num_classes is not None:
        raise UsageError(
            "--rank and --num-classes belong to --arch; a checkpoint has its own, and limits set its ranks"
        )
    choices: dict[str, Any] = {
        "classes": options.split_names(classes), "form": form, "precision": precision, "unit": unit,
        "modulation": modulation, "steps": steps, "guidance": guidance, "sampler": sampler,
        "max_latency": max_latency, "max_memory": max_memory, "max_flops": max_flops, "max_size": max_size,
        "max_quality_loss": max_quality_loss, "minimize": minimize, "burst": burst, "autoencoder": autoencoder,
    }  # fmt: skip
    if allow_resize is not None and (devices or pareto):
        raise UsageError("--allow-resize goes with one plan; leave out --pareto and --profiles")
    written: dict[str, Any] = {"formats": wanted, "format_choices": {"coreml": coreml}}
    if devices:
        plan_many.profiles(terminal, checkpoint or options.SHIPPED, devices, choices | written, output, as_json)
        return
    assert profile is not None  # one of the two is given
    if pareto:
        if wanted != ["onnx"]:
            raise UsageError("--pareto shows model files in ONNX, so it does not go with --formats")
        plan_many.pareto(terminal, checkpoint or options.SHIPPED, profile, choices, output, as_json)
        return
    with refusal_view.shown(terminal, as_json), terminal.stages() as begin, terminal.measuring() as on_measure:
        begin("planning")
        from kind_edge.deploy import pipeline

        made = pipeline.plan(
            checkpoint or options.SHIPPED, profile=profile, allow_resize=allow_resize, on_measure=on_measure,
            on_healing=lambda now: begin.count(now.seconds, now.total_s, "s", f"step {now.step}, loss {now.loss:.4f}"),
            **written, **choices,
        )  # fmt: skip
    paper = _paper_row(checkpoint or options.SHIPPED, made, profile) if convention == "paper" else None
    if (warning := quality_view.predicted_warning(made)) is not None:
        terminal.say_warning(warning)
    beside = {
        "--profile": profile if made.profile not in options.packaged_profiles() else None,
        "--autoencoder": autoencoder,
        "--formats": ",".join(wanted) if wanted != ["onnx"] else None,
    }
    told = [checkpoint, *(word for flag, value in beside.items() if value for word in (flag, value))]
    told += options.coreml_words(coreml)
    _show(terminal, made, paper, [word for word in told if word], output, as_json)


def _show(
    terminal: Terminal, made: Plan, paper: PaperRow | None, replay: list[str], output: Path | None, as_json: bool
) -> None:
    """`replay`: what export must be given beside the plan."""
    from kind_edge.cli.plan_view import print_plan

    values = made.to_dict()
    if output is not None:
        write_text(output, json.dumps(values, indent=2) + "\n")
    if as_json:
        terminal.json(values | ({"paper": _paper_values(paper)} if paper else {}))
        return
    print_plan(terminal.out, made)
    if paper is not None:
        terminal.out.print(tables.heading("As the KIND authors count", "250 guided steps at the GPU's nominal peak"))
        terminal.out.print(_paper_table([("this plan", paper)]))
    terminal.out.print()
    if output is not None:
        terminal.line(Text.assemble(("  written  ", "dim"), str(output)))
        heal = ["--heal", f"{made.resize['heal_s']:.0f}s"] if made.resize else []
        terminal.next("export", *replay, "--plan", str(output), *heal)


def write_text(path: Path, text: str) -> None:
    """Write a small file whose folder may not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _refuse_with_arch(context: typer.Context) -> None:
    asked = (name for name in context.params if name not in OF_ARCHITECTURE)
    given = [name for name in asked if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if given:
        names = ", ".join("CHECKPOINT" if name == "checkpoint" else f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"--arch has no weights to decide about, so it does not go with {names}; leave that out")


def _architecture(
    arch: str,
    num_classes: int | None,
    rank: int | None,
    profile: str,
    convention: ConventionChoice,
    precision: options.PrecisionChoice,
    unit: options.UnitChoice,
    steps: int | None,
    guidance: float | None,
) -> tuple[list[ArchitectureCost], str]:
    """Cost of an architecture from its shape alone: dense, and at the rank where one is given; and the device."""
    from kind_edge.budget.architecture import architecture_cost
    from kind_edge.budget.profile import load_profile
    from kind_edge.model.spec import named_spec

    if num_classes is None:
        raise UsageError("--num-classes is missing: an architecture's tables grow with its classes")
    spec, device = named_spec(arch, num_classes), load_profile(profile)
    evaluations = 1 if guidance == 1 else 2
    wanted = [None] if rank is None else [None, rank]
    costs = [
        architecture_cost(arch, spec, one, device, convention, precision, unit, steps, evaluations) for one in wanted
    ]
    return costs, device.title


def _show_architecture(
    terminal: Terminal, costs: list[ArchitectureCost], device: str, output: Path | None, as_json: bool
) -> None:
    from kind_edge.cli.plan_view import time_words
    from kind_edge.units import format_flops, format_seconds

    cost = costs[-1]
    if output is not None:
        write_text(output, json.dumps(cost.to_dict(), indent=2) + "\n")
    if as_json:
        terminal.json(cost.to_dict())
        return
    terminal.out.print(tables.heading(f"{cost.arch}, {cost.num_classes} classes, on {device}", cost.describe()))
    names = ["dense" if each.rank is None else f"rank {each.rank}" for each in costs]
    if cost.convention == "paper":
        terminal.out.print(_paper_table([(n, each.paper_row()) for n, each in zip(names, costs, strict=True)]))
        terminal.out.print()
        return
    headers = ("", "parameters", "FLOPs", "weights", "peak memory", "one image", "sustained")
    rows = [
        (
            name,
            tables.amount(each.params),
            format_flops(each.flops),
            tables.size(each.weight_bytes),
            tables.size(each.peak_memory_bytes),
            format_seconds(each.image_latency_s),
            format_seconds(each.sustained_image_latency_s),
        )
        for name, each in zip(names, costs, strict=True)
    ]
    terminal.out.print(tables.figures(headers, rows))
    terminal.out.print()
    terminal.out.print(tables.facts([("time", time_words(cost.time))]))
    decoder = f"{format_flops(cost.decoder.flops)}, {tables.size(4 * cost.decoder.params)} in fp32"
    terminal.note(f"FLOPs: one evaluation at batch 1. Bytes and images count the decoder of latents too: {decoder}.")


def _paper_row(checkpoint: str, made: Plan, profile: str) -> PaperRow:
    """The chosen model, at the size that the plan takes, under the authors' convention."""
    from kind_edge.budget.architecture import paper_row_of_plan
    from kind_edge.budget.profile import load_profile
    from kind_edge.deploy.resizing import size_spec
    from kind_edge.model.checkpoint import read_config
    from kind_edge.model.shipped import find_model
    from kind_edge.model.spec import ModelSpec

    spec = ModelSpec.from_dict(read_config(find_model(checkpoint))["model"])
    return paper_row_of_plan(size_spec(spec, made.resize), made, load_profile(profile))


def _paper_table(rows: list[tuple[str, PaperRow]]) -> Any:
    headers = ("", "params (M)", "FLOPs (G)", "memory (MB)", "one image (s)")
    return tables.figures(headers, [(name, *row.printed()) for name, row in rows])


def _paper_values(row: PaperRow) -> dict[str, float]:
    return {
        "params": row.params,
        "flops": row.flops,
        "weight_bytes": row.memory_bytes,
        "image_latency_s": row.latency_s,
    }
