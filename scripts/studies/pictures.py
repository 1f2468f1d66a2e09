"""The studies as pictures: grids of drawn images, and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.deploy.grid import save_grid
from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.training.sampled import sample_checkpoint, sampling_of
from studies.anysize import METHODS, PERCENTS, AnySize
from studies.decomposition import Decomposition, draw_learngene, draw_swapped
from studies.documents import stamp
from studies.statistics import spread_of_figure
from studies.store import Record, Subject

COLUMNS, SCALE = 10, 2
CLASS_COLUMNS, CLASS_SCALE = 8, 3


def draw_classes(subject: Subject, folder: Path) -> None:
    """The same noises under every tailor, as the checkpoint recommends to sample."""
    checkpoint = load_checkpoint(subject.folder)
    images = draw_swapped(checkpoint, CLASS_COLUMNS, 0, sampling_of(checkpoint))  # [C, M, H, W, ch]
    rows, path = images.reshape(-1, *images.shape[2:]), folder / "classes.png"
    save_grid(rows, path, CLASS_COLUMNS, CLASS_SCALE, list(checkpoint.class_names))
    stamp(path, subject.sha256)


def draw_decomposition(study: Decomposition, records: Sequence[Record], folder: Path) -> None:
    """Same noise under every tailor with the learngene alone below, and the swap matrices."""
    path, sha256 = folder / "decomposition.png", study.store.subject.sha256
    swapped = draw_swapped(study.checkpoint, COLUMNS, 0, study.guided)  # [C, M, H, W, ch]
    alone = draw_learngene(study.checkpoint, COLUMNS, 0, study.alone)
    rows = np.concatenate([swapped.reshape(-1, *swapped.shape[2:]), alone])
    save_grid(rows, path, COLUMNS, SCALE, [*study.checkpoint.class_names, "no tailor"])
    stamp(path, sha256)
    plot_swap_matrices(pyplot(), records, folder / "swap-matrix.png")
    stamp(folder / "swap-matrix.png", sha256)


def draw_anysize(study: AnySize, records: Sequence[Record], folder: Path) -> None:
    """One image of every class at every size from the same noise, and quality against FLOPs."""
    path, sha256 = folder / "anysize.png", study.subject.sha256
    classes, sampling = study.model.checkpoint.spec.num_classes, study.sampling
    sizes = [("full", 100)] + [(method, percent) for method in ("whitened", "plain") for percent in PERCENTS]
    rows = [
        sample_checkpoint(study.at_size(*size), classes, 3, sampling.steps, sampling.guidance).images for size in sizes
    ]
    save_grid(np.concatenate(rows), path, classes, SCALE, [f"{method} {percent} %" for method, percent in sizes])
    stamp(path, sha256)
    plot_sizes(pyplot(), records, folder / "anysize-curves.png")
    stamp(folder / "anysize-curves.png", sha256)


def pyplot() -> Any:
    """matplotlib's pyplot without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("the plots need matplotlib: pip install matplotlib") from error

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def plot_swap_matrices(plt: Any, records: Sequence[Record], path: Path) -> None:
    """Rows: whose tailor; columns: what the judge sees; mean percentages over the seeds."""
    kinds = [
        (words, own)
        for kind, words in (("full", "guided"), ("unguided", "without guidance"))
        if (own := [record["figures"] for record in records if record["conditions"]["kind"] == kind])
    ]
    figure, axes = plt.subplots(1, len(kinds), figsize=(4.6 * len(kinds), 4.8), layout="constrained", squeeze=False)
    for axis, (words, own) in zip(axes[0], kinds, strict=True):
        matrix = 100 * np.mean([figures["confusion"] for figures in own], axis=0)
        axis.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(matrix):
            if share >= 0.5:
                axis.text(
                    column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 60 else "black"
                )
        axis.set_xticks(range(10), own[0]["confusion_rows"], rotation=60, ha="right")
        axis.set_yticks(range(len(matrix)), own[0]["confusion_rows"])
        axis.set_title(f"{words}: {np.trace(matrix) / len(matrix):.1f} % on the diagonal")
        axis.set_xlabel("judged as")
        axis.set_ylabel("drawn with the tailor of")
    save(plt, figure, path)


def plot_sizes(plt: Any, records: Sequence[Record], path: Path) -> None:
    """Fréchet distance (logarithmic) and class accuracy against FLOPs; bars span the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained")
    whole = [record for record in records if record["conditions"]["percent"] == 100]
    for axis, (name, title, scale) in zip(
        axes, [("frechet", "Fréchet distance", 1.0), ("class_accuracy", "class accuracy (%)", 100.0)], strict=True
    ):
        for method in METHODS[1:]:
            points = []
            for percent in PERCENTS:
                wanted = {"method": method, "percent": percent}
                own = [record for record in records if wanted.items() <= record["conditions"].items()]
                spread = spread_of_figure(own, name)
                if spread:
                    points.append((own[0]["conditions"]["flops"] / 1e6, spread))
            if not points:
                continue
            start = spread_of_figure(whole, name)
            if start and method != "dense":
                points.insert(0, (whole[0]["conditions"]["flops"] / 1e6, start))
            x, means = [at for at, _ in points], [scale * spread.mean for _, spread in points]
            low = [scale * (spread.mean - spread.low) for _, spread in points]
            high = [scale * (spread.high - spread.mean) for _, spread in points]
            axis.errorbar(x, means, [low, high], marker="o", markersize=4, capsize=3, label=method)
        axis.set_xlabel("MFLOPs of one evaluation")
        axis.set_title(title)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].legend(frameon=False)
    save(plt, figure, path)


def save(plt: Any, figure: Any, path: Path) -> None:
    """Written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", metadata={"Software": None})
    temporary.replace(path)
    plt.close(figure)
