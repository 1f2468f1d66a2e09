"""The studies as pictures: grids of drawn images, and plots where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.deploy.grid import save_grid
from kind_edge.training.sampled import sample_checkpoint
from studies.anysize import METHODS, PERCENTS, AnySize
from studies.decomposition import Decomposition, draw_learngene, draw_swapped
from studies.statistics import spread_of_figure
from studies.store import Record

COLUMNS = 10
SCALE = 2


def draw_decomposition(study: Decomposition, records: Sequence[Record], folder: Path) -> None:
    """Same noise under every tailor with the learngene alone below, and the swap matrices."""
    path = folder / "decomposition.png"
    swapped = draw_swapped(study.checkpoint, COLUMNS, 0, study.guided)  # [C, M, H, W, ch]
    alone = draw_learngene(study.checkpoint, COLUMNS, 0, study.unguided)
    rows = np.concatenate([swapped.reshape(-1, *swapped.shape[2:]), alone])
    save_grid(rows, path, COLUMNS, SCALE, [*study.checkpoint.class_names, "no tailor"])
    if plt := pyplot():
        plot_swap_matrices(plt, records, folder / "swap-matrix.png")


def draw_anysize(study: AnySize, records: Sequence[Record], folder: Path) -> None:
    """One image of every class at every size from the same noise, and quality against FLOPs."""
    path = folder / "anysize.png"
    classes, sampling = study.model.checkpoint.spec.num_classes, study.sampling
    sizes = [("full", 100)] + [(method, percent) for method in ("whitened", "plain") for percent in PERCENTS]
    rows = [
        sample_checkpoint(study.at_size(*size), classes, 3, sampling.steps, sampling.guidance).images for size in sizes
    ]
    save_grid(np.concatenate(rows), path, classes, SCALE, [f"{method} {percent} %" for method, percent in sizes])
    if plt := pyplot():
        plot_sizes(plt, records, folder / "anysize-curves.png")


def pyplot() -> Any:
    """matplotlib's pyplot without a display; None, said once, where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots", file=sys.stderr)
        return None
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "figure.dpi": 100, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def plot_swap_matrices(plt: Any, records: Sequence[Record], path: Path) -> None:
    """Rows: whose tailor; columns: what the judge sees; mean percentages over the seeds."""
    kinds = [("full", "guided"), ("unguided", "without guidance")]
    figure, axes = plt.subplots(1, 2, figsize=(9.2, 4.8), layout="constrained")
    for axis, (kind, words) in zip(axes, kinds, strict=True):
        own = [record["figures"] for record in records if record["conditions"]["kind"] == kind]
        if not own:
            continue
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
