"""`kind-edge train`: one decomposable model, from a preset or a file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kind_edge.cli import options, tables
from kind_edge.cli.terminal import Terminal, terminal_of
from kind_edge.errors import UsageError
from kind_edge.units import format_seconds

if TYPE_CHECKING:
    from kind_edge.model.checkpoint import Checkpoint
    from kind_edge.training.config import TrainConfig
    from kind_edge.training.loop import Progress

LOG_EVERY_S = 30.0


def train(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The checkpoint.")],
    preset: Annotated[
        str | None, typer.Option("--preset", metavar="NAME", help="A configuration that comes with the package.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="A configuration of your own, as TOML.")
    ] = None,
    begin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="Begin with the weights of this one (resized, for instance), and train as it was trained.",
        ),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option("--images", min=1, metavar="N", help="Images seen.", show_default="the configuration's"),
    ] = None,
    spectral_penalty: Annotated[
        float | None,
        typer.Option(
            "--spectral-penalty",
            min=0,
            metavar="W",
            help="Favour weights that are alike over blocks and channels, for a model to be resized.",
            show_default="the configuration's: 0",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="PATH",
            help="Images: a folder per class, .tar shards, or a Hugging Face data set; docs/data.md says more.",
            show_default="the usual places of Fashion-MNIST",
        ),
    ] = None,
    class_map: Annotated[
        Path | None,
        typer.Option(
            "--class-map", metavar="FILE", help='Which classes of the data, and merged how: shoe = ["sneaker", "boot"].'
        ),
    ] = None,
    autoencoder: Annotated[
        Path | None,
        typer.Option("--autoencoder", metavar="DIR", help="For a model of latents: the autoencoder, from diffusers."),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", help="Where to train.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted run in DIR, if it has begun.")
    ] = False,
) -> None:
    """Train one decomposable model.

    It has a learngene that every image sees, and a tailor per class. An interrupted run is saved; the same command with
    --resume goes on with it. On several GPUs or machines: accelerate launch -m kind_edge.cli train ... (or torchrun); a
    configuration chooses precision = "bf16", compile = true and accumulation = 4.
    """
    terminal = terminal_of(context)
    chosen = _chosen(preset, config, begin)
    options.check_writable(output)
    with following(terminal, output) as on_progress:
        from kind_edge.training.heal import same_config
        from kind_edge.training.train import train as run

        source = _source(begin)
        chosen = same_config(source) if source is not None else chosen
        assert chosen is not None
        folder = run(
            _changed(chosen, images, spectral_penalty),
            output,
            begin=source,
            data=data,
            class_map=class_map,
            autoencoder=autoencoder,
            device=device,
            resume=resume,
            on_progress=on_progress,
            on_note=terminal.note,
        )
        from kind_edge.training.distributed import first_process

        if not first_process():
            return
    terminal.out.print(tables.heading("Checkpoint", str(folder)))
    terminal.out.print(tables.facts(_result(folder)))
    terminal.out.print()
    terminal.next("export", str(folder), "--profile", "host", column=12)


def _chosen(preset: str | None, config: Path | None, begin: str | None) -> TrainConfig | None:
    """The configuration that is named; None: that of the checkpoint to begin from."""
    from kind_edge.training.config import PRESETS, read_config
    from kind_edge.training.config import preset as named

    if sum(given is not None for given in (preset, config, begin)) != 1:
        raise UsageError(f"give either --preset or --config or --from; presets: {', '.join(PRESETS)}")
    if preset is not None:
        return named(preset)
    return None if config is None else read_config(config)


def _source(begin: str | None) -> Checkpoint | None:
    from kind_edge.model.checkpoint import load_checkpoint
    from kind_edge.model.shipped import find_model

    return None if begin is None else load_checkpoint(find_model(begin))


def _changed(config: TrainConfig, images: int | None, spectral_penalty: float | None) -> TrainConfig:
    asked = {"images": images, "spectral_penalty": spectral_penalty}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return dataclasses.replace(config, **given)


def _result(folder: Path) -> Iterator[tuple[str, str]]:
    provenance = json.loads((folder / "config.json").read_text(encoding="utf-8"))["provenance"]
    yield "images seen", f"{provenance['images_seen']:,}"
    yield "time", format_seconds(provenance["seconds"])
    yield "loss", f"{provenance['final_loss']:.4f}"


@contextlib.contextmanager
def following(terminal: Terminal, output: Path) -> Iterator[Callable[[Progress], None]]:
    """Progress of a run into `output`; if it is interrupted, how to go on with it."""
    try:
        with _progress(terminal) as on_progress:
            yield on_progress
    except KeyboardInterrupt:
        if (output / "state.safetensors").exists():
            terminal.note(f"saved in {output}; the same command with --resume goes on")
        raise


@contextlib.contextmanager
def _progress(terminal: Terminal) -> Iterator[Callable[[Progress], None]]:
    """Progress of a run: a bar on a terminal, a line every half minute in a log."""
    import time

    with terminal.working():
        if terminal.animated:
            with terminal.progress_bar() as bar:
                task = bar.add_task("training", total=None, details="")

                def show(progress: Progress) -> None:
                    bar.update(task, total=progress.steps, completed=progress.step, details=_details(progress))

                yield show
            return
        last = time.monotonic() - LOG_EVERY_S

        def log(progress: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= LOG_EVERY_S or progress.step == progress.steps:
                last = time.monotonic()
                left = f", {format_seconds(progress.left_s)} left" if progress.left_s > 0 else ""
                terminal.note(f"step {progress.step} of {progress.steps}: {_details(progress)}{left}")

        yield log


def _details(progress: Progress) -> str:
    return f"loss {progress.loss:.4f}, {progress.images_per_s:.0f} images/s"
