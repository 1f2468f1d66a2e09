"""The verbs by name, and the options that stand before them."""

from __future__ import annotations

from typing import Annotated

import typer

from kind_edge._version import __version__
from kind_edge.cli import (
    adapt,
    bench,
    distill,
    eval,
    export,
    generate,
    import_model,
    inspect,
    pack,
    plan,
    profiles,
    report,
    resize,
    serve,
    train,
    verify,
)
from kind_edge.cli.terminal import Terminal

app = typer.Typer(
    name="kind-edge",
    help="Cut a decomposable diffusion transformer to any device and any classes, with proof.",
    epilog="Try: kind-edge export --profile snapdragon8g3 --classes sneaker,bag -o out",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kind-edge {__version__}")
        raise typer.Exit


@app.callback()
def top(
    context: typer.Context,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks and warnings.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show results and errors alone.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    context.obj = Terminal(verbose, quiet)


app.command("train")(train.train)
app.command("adapt")(adapt.adapt)
app.command("distill")(distill.distill)
app.command("import")(import_model.import_model)
app.command("resize")(resize.resize)
app.command("plan")(plan.plan)
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("generate")(generate.generate)
app.command("eval")(eval.evaluate)
app.command("inspect")(inspect.inspect)
app.command("report")(report.report)
app.command("serve")(serve.serve)
app.add_typer(pack.app, name="pack")
app.add_typer(profiles.app, name="profiles")
