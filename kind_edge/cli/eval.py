"""`kind-edge eval`: what the judge says about a model's images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.tables import Cell
from kind_edge.cli.terminal import terminal_of

if TYPE_CHECKING:
    from kind_edge.training.evaluate import QualityReport


def evaluate(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="CHECKPOINT|BUNDLE", help="A checkpoint, a shipped model's name, or a bundle.")
    ] = options.SHIPPED,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="Images in all; compare equal numbers only.")
    ] = 1000,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="S", help="Of the noise.")] = 0,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, metavar="N", help="Sampling steps; a bundle has its own.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", metavar="W", help="Guidance weight; a bundle has its own.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", metavar="DIR", help="Folder of the data set.")] = None,
    as_json: options.Json = False,
) -> None:
    """Draw images of every class and judge them.

    How real, how varied, how much of their class? The judge is a classifier trained on Fashion-MNIST and shipped with
    the package; its hash stands in the report.
    """
    terminal = terminal_of(context)
    with terminal.counting("drawing") as count:
        from kind_edge.deploy import pipeline

        report = pipeline.evaluate(source, images, seed, steps, guidance, data, count)
    if as_json:
        terminal.json({"source": source, "seed": seed, **dataclasses.asdict(report)})
        return
    terminal.out.print(tables.heading(f"Quality of {source}", f"{tables.count(report.images, 'image')}, seed {seed}"))
    terminal.out.print(tables.facts(_rows(report)))
    if report.per_class_accuracy:
        rows = [(name, f"{share:.1%}") for name, share in report.per_class_accuracy.items()]
        terminal.out.print()
        terminal.out.print(tables.figures(("class", "recognised"), rows))
    terminal.out.print()


def _rows(report: QualityReport) -> Iterator[tuple[str, Cell]]:
    if report.frechet is not None:
        yield (
            "Fréchet distance",
            f"{report.frechet:.2f} to the training images of {len(report.reference_classes)} classes",
        )
    if report.class_accuracy is not None:
        yield "class accuracy", f"{report.class_accuracy:.1%}"
    if report.precision is not None and report.recall is not None:
        against = f"against {tables.count(report.real_images, 'real image')}"
        yield "precision, recall", f"{report.precision:.1%}, {report.recall:.1%} {against}"
    else:
        yield "precision, recall", "not measured: they need the data set (scripts/fetch-fashion-mnist, or --data)"
    yield "entropy", f"{report.entropy_nats:.3f} nats per image, {report.marginal_entropy_nats:.3f} over all"
    yield "judge", report.judge_sha256[:12]
