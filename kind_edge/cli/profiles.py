"""`kind-edge profiles`: the devices, and how far every figure of one is to be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.terminal import Terminal, terminal_of
from kind_edge.errors import UsageError
from kind_edge.units import format_flops_per_second, format_share

if TYPE_CHECKING:
    from kind_edge.budget.profile import DeviceProfile

app = typer.Typer(help="List the device profiles, show one, or measure a device.", no_args_is_help=True)

MARKS = "marks: P published by the vendor, 3P third-party page, M measured, E derived or estimated, G general knowledge"


@app.command("list")
def list_profiles(context: typer.Context, as_json: options.Json = False) -> None:
    """All packaged profiles with their compute units."""
    terminal = terminal_of(context)
    from kind_edge.budget.profile import HOST, load_profile, profile_names

    # The figures of this machine exist only once they are measured; a list does not start that.
    devices = [load_profile(name) for name in profile_names() if name != HOST]
    if as_json:
        listed = [_summary(device) for device in devices]
        terminal.json({"profiles": [*listed, {"name": HOST, "title": "this machine, measured on first use"}]})
        return
    rows = [
        (
            device.name,
            device.title,
            ", ".join(device.units),
            best_peak(device),
            tables.size(device.ram_bytes.value),
            tables.size(device.app_memory_limit_bytes.value),
        )
        for device in devices
    ]
    rows.append((HOST, "this machine", "cpu", "measured when used", "", ""))
    headers = ("name", "device", "units", "fp32 peak", "memory", "for one app")
    terminal.out.print()
    terminal.out.print(tables.figures(headers, rows, left=(0, 1, 2)))
    terminal.out.print()


@app.command("show")
def show_profile(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME|FILE", help="A profile's name, or a TOML file.")],
    as_json: options.Json = False,
) -> None:
    """Every figure of a profile, its mark and its source, derived ones included."""
    terminal = terminal_of(context)
    with terminal.working():
        from kind_edge.budget.profile import load_profile

        device = load_profile(name)
    if as_json:
        figures = {
            key: {"value": figure.value, "mark": figure.mark, "source": figure.source}
            for key, figure in device.figures()
        }
        terminal.json({**_summary(device), "figures": figures})
        return
    terminal.out.print(tables.heading(f"{device.title}", f"{device.name}, {device.os}"))
    terminal.out.print(tables.facts([("reached through", ", ".join(device.execution_providers))]))
    terminal.out.print()
    rows = [(key, written(key, figure.value), figure.mark, figure.source) for key, figure in device.figures()]
    terminal.out.print(tables.figures(("figure", "value", "mark", "source"), rows, left=(0, 2, 3)))
    terminal.out.print()
    terminal.note(MARKS)


@app.command("calibrate")
def calibrate(
    context: typer.Context,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the profile, a TOML file.")
    ] = None,
    runner: Annotated[
        str | None,
        typer.Option("--runner", metavar='"CMD"', help="Measure through CMD FOLDER, on a device that it reaches."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure the operators of our models through ONNX Runtime, here or on another device.

    Takes two to four minutes. This machine's figures are kept for --profile host; -o FILE writes them as a profile too.
    With --runner the command is given a folder of small models and prints their latencies, as
    kind_edge/budget/runner.py tells and does; then -o FILE is needed.
    """
    terminal = terminal_of(context)
    if output is not None:
        options.check_writable(output)
        if output.suffix != ".toml":
            raise UsageError(f"-o {output}: want a name that ends in .toml, by which --profile knows a file")
    if runner is not None:
        if output is None:
            raise UsageError("--runner measures another device: say where its profile goes, with -o FILE.toml")
        device = _through(terminal, runner, output.stem)
    else:
        from kind_edge.budget.host import calibrate_host

        with terminal.counting("measuring") as on_count:
            device = calibrate_host(lambda share: on_count(round(100 * share), 100))
    if output is not None:
        from kind_edge.budget.profile_text import profile_text

        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(profile_text(device), encoding="utf-8")
    _show_calibrated(terminal, device, output, as_json)


def _through(terminal: Terminal, runner: str, name: str) -> DeviceProfile:
    with terminal.stages() as begin:
        begin("measuring through the runner")
        from kind_edge.budget.calibrate import measure_with, measured_profile

        return measured_profile(name, measure_with(runner))


def _show_calibrated(terminal: Terminal, device: DeviceProfile, output: Path | None, as_json: bool) -> None:
    cpu = device.unit("cpu")
    times = 0 if cpu.table is None else len(cpu.table)
    if as_json:
        figures = {key: figure.value for key, figure in device.figures()}
        written_to = None if output is None else str(output)
        terminal.json({**_summary(device), "file": written_to, "measured_times": times, "figures": figures})
        return
    terminal.out.print(tables.heading("Calibrated", device.title))
    rates = ", ".join(f"{name} {format_flops_per_second(each.value)}" for name, each in cpu.peak_flops_per_s.items())
    where = "kept for --profile host" if output is None else str(output)
    facts = (("products", rates), ("operators", f"{times} measured times"), ("profile", where))
    terminal.out.print(tables.facts(facts))
    terminal.out.print()


def best_peak(device: DeviceProfile) -> str:
    """The highest fp32 peak of any unit."""
    peaks = [unit.peak_flops_per_s["fp32"].value for unit in device.units.values() if "fp32" in unit.peak_flops_per_s]
    return format_flops_per_second(max(peaks)) if peaks else ""


def written(key: str, value: float) -> str:
    """A figure with its unit, which its name tells."""
    if ".peak_flops_per_s." in key:
        return format_flops_per_second(value)
    if key.endswith("_bytes_per_s"):
        return f"{value / 1e9:.3g} GB/s"
    if key.endswith("_bytes"):
        return tables.size(value)
    if key.endswith("overhead_us"):
        return f"{value:.3g} µs"
    if key.endswith("measured_times"):
        return f"{value:.0f}"
    return format_share(value)


def _summary(device: DeviceProfile) -> dict[str, Any]:
    return {
        "name": device.name,
        "title": device.title,
        "os": device.os,
        "units": list(device.units),
        "execution_providers": list(device.execution_providers),
    }
