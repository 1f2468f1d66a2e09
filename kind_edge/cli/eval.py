"""`kind-edge eval`: what the judge says about a model's images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.tables import Cell
from kind_edge.cli.terminal import terminal_of
from kind_edge.errors import UsageError

if TYPE_CHECKING:
    from kind_edge.training.evaluate import QualityReport
    from kind_edge.training.sampled import Evaluation


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
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR|SHARDS",
            help="The images that the model was trained on, as for train.",
            show_default="Fashion-MNIST, where it is installed",
        ),
    ] = None,
    class_map: Annotated[
        Path | None,
        typer.Option("--class-map", metavar="FILE", help="The class map that the model was trained with."),
    ] = None,
    features: Annotated[
        Literal["classifier", "inception"],
        typer.Option(
            "--features",
            help="What Fréchet distance, precision and recall are measured with; classifier: Fashion-MNIST only.",
        ),
    ] = "classifier",
    weights: Annotated[
        Path | None,
        typer.Option("--weights", metavar="FILE", help="Inception's weights, as torch-fidelity publishes them."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Draw images of every class and judge them.

    How real, how varied, how much of their class? The judge is a classifier trained on Fashion-MNIST and shipped with
    the package; its hash stands in the report. With --features inception, Inception-v3 takes its place where images are
    compared with real ones. The judge knows Fashion-MNIST only: any other model of pixels is measured with
    --features inception --weights FILE --data DIR|SHARDS, without class accuracy and entropy. Checkpoints of
    latents are not judged: their pictures need a decoder, which a bundle made with export --autoencoder has.
    """
    _check_features(features, weights)
    terminal = terminal_of(context)
    with terminal.counting("drawing") as count:
        from kind_edge.deploy.evaluation import evaluate as judge

        found = judge(
            source,
            images,
            seed,
            steps,
            guidance,
            data,
            count,
            inception_weights=weights,
            class_map=class_map,
            on_note=terminal.note,
        )
    report = found.quality
    if as_json:
        terminal.json({"source": source, **found.to_dict()})
        return
    terminal.out.print(tables.heading(f"Quality of {source}", f"{tables.count(report.images, 'image')}, seed {seed}"))
    terminal.out.print(tables.facts(_rows(found)))
    if report.per_class_accuracy:
        rows = [(name, f"{share:.1%}") for name, share in report.per_class_accuracy.items()]
        terminal.out.print()
        terminal.out.print(tables.figures(("class", "recognised"), rows))
    terminal.out.print()


def _check_features(features: str, weights: Path | None) -> None:
    """Inception and its weights go together."""
    if features == "inception" and weights is None:
        raise UsageError(
            "--features inception needs --weights FILE: Inception's weights are not shipped; torch-fidelity publishes "
            "them with its releases as weights-inception-2015-12-05-6726825d.pth"
        )
    if features != "inception" and weights is not None:
        raise UsageError("--weights is for --features inception; add that, or leave --weights out")


def _rows(found: Evaluation) -> Iterator[tuple[str, Cell]]:
    report, sampling = found.quality, found.sampling
    cut = "cut from checkpoint " if found.kind == "bundle" else ""
    yield found.kind, f"{cut}{found.checkpoint_sha256[:12] or 'not stated'}, {found.precision}"
    guidance = "no guidance" if sampling.guidance == 1.0 else f"guidance {sampling.guidance:g}"
    guidance += " inside the model" if sampling.guidance_inside and sampling.guidance != 1.0 else ""
    yield "images", f"{report.images:,}, {sampling.sampler}, {sampling.steps} steps, {guidance}, seed {found.seed}"
    if report.frechet is not None:
        yield "Fréchet distance", f"{report.frechet:.2f} to {_real_words(report)}"
    if report.class_accuracy is not None:
        yield "class accuracy", f"{report.class_accuracy:.1%}"
    if report.precision is not None and report.recall is not None:
        against = f"against {tables.count(report.real_images, 'real image')}"
        yield "precision, recall", f"{report.precision:.1%}, {report.recall:.1%} {against}"
    elif report.real_images:
        yield "precision, recall", "not measured: too few images"
    else:
        yield "precision, recall", "not measured: they need the data set (scripts/fetch-fashion-mnist, or --data)"
    if report.entropy_nats is not None:
        yield "entropy", f"{report.entropy_nats:.3f} nats per image, {report.marginal_entropy_nats:.3f} over all"
    judge, beside = "accuracy and entropy are left out: the judge knows Fashion-MNIST only", ""
    if report.judge_sha256 is not None:
        judge, beside = f"classifier {report.judge_sha256[:12]}", "; accuracy and entropy are the judge's"
    yield "judge", judge
    if report.features == "inception":
        yield "features", f"Inception-v3, weights {report.features_sha256[:12]}{beside}"
        yield "real images", f"data {report.data_sha256[:12]}"


def _real_words(report: QualityReport) -> str:
    """What the distance is to; Inception sees a share of the training images, the judge all of them."""
    count = len(report.reference_classes)
    classes = "1 class" if count == 1 else f"{count} classes"
    whole = "the training images" if report.features == "classifier" else f"{report.real_images:,} training images"
    return f"{whole} of {classes}"
