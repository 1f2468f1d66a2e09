"""What the study of resizing says: tables, claims and curves. "Times fewer" is of images for the same held-out loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from studies.pictures import pyplot, save
from studies.statistics import conditions_line, markdown, paragraph, spread_of
from studies.store import Record, having

SCRATCH, WHOLE = "scratch", "whole"
ORDER = ("front", "bot", "selection", SCRATCH, WHOLE)
"""Of rows and colours; a method that is not named here comes after the first two."""
SIZES = {
    "half-width": "width 32, depth 4",
    "half-depth": "width 64, depth 2",
    "three-quarters": "width 48, depth 3",
    "four-thirds": "width 80, depth 5",
}
SMALLER = tuple(SIZES)[:3]
WANTED_RATIO = 5.0

Curve = list[tuple[int, float]]
"""Images and held-out loss of one training's lengths, by images."""


@dataclass(frozen=True)
class Times:
    """How many times fewer; `bound` says where a curve ended before: at least ("≥") or at most ("≤"), else ""."""

    value: float
    bound: str = ""


def loss_of(record: Record) -> float:
    return float(np.mean(record["figures"]["heldout_losses"]))


def curve(records: Sequence[Record], size: str, method: str, seed: int) -> Curve:
    own = having(records, size=size, method=method, seed=seed)
    return sorted((record["conditions"]["seen"], loss_of(record)) for record in own)


def images_for(loss: float, own: Curve) -> Times | None:
    """Images after which a training has that loss: between lengths by a power law (a straight line on two log scales).

    None for a training with no lengths. Where the first length is enough the figure is an upper bound, where the last
    one is not it is a lower bound.
    """
    trained = [(seen, value) for seen, value in own if seen]
    if not trained:
        return None
    if own[0][0] == 0 and own[0][1] <= loss:
        return Times(0.0)
    if trained[0][1] <= loss:
        return Times(float(trained[0][0]), "" if trained[0][1] == loss else "≤")
    for (before, high), (after, low) in itertools.pairwise(trained):
        if low <= loss < high:
            share = math.log(high / loss) / math.log(high / low)
            return Times(before * (after / before) ** share)
    return Times(float(trained[-1][0]), "≥")


def times_fewer(records: Sequence[Record], size: str, method: str, seen: int) -> list[Times]:
    """For every seed: images from scratch for the loss that the method has after `seen` images, over `seen`."""
    found = []
    for record in having(records, size=size, method=method, seen=seen):
        needed = images_for(loss_of(record), curve(records, size, SCRATCH, record["conditions"]["seed"]))
        if needed is not None:
            found.append(Times(needed.value / seen, needed.bound))
    return found


def times_text(found: Sequence[Times]) -> str:
    """ "5.2 (4.8 to 5.5)"; with a bound, where any seed has one."""
    if not found:
        return "–"
    bounds = {each.bound for each in found} - {""}
    return (bounds.pop() + " " if len(bounds) == 1 else "") + spread_of(each.value for each in found).text(1)


def rows_of(records: Sequence[Record]) -> list[str]:
    """The methods that there are, in the order of rows."""
    found = {record["conditions"]["method"] for record in records if record["conditions"]["size"] in SIZES}
    others = sorted(found - set(ORDER))
    return [method for method in (*ORDER[:2], *others, *ORDER[2:]) if method in found]


def text(records: Sequence[Record]) -> str:
    """All that is said, as markdown."""
    if not records:
        return "No run is finished yet."
    present = [size for size in SIZES if having(records, size=size)]
    parts = [paragraph(_heading(records))]
    for size in present:
        parts += [f"**{size}** ({SIZES[size]}), loss on held-out images:", _losses(records, size)]
    parts += ["Fréchet distance:", _distances(records, present)]
    if claims := [*_claims(records)]:
        parts.append("\n".join(claims))
    parts.append("![Loss on held-out images against images, by start](studies/resize/loss.png)")
    return "\n\n".join([*parts, paragraph(conditions_line(having(records)))])


def _heading(records: Sequence[Record]) -> str:
    own, paired = _errors(records)
    first = records[0]["conditions"]
    share = max(record["conditions"]["rate_share"] for record in records)
    return (
        f"All starts are trained at {share:g} times the preset's learning rate, which suits short runs "
        "better from every start; *whole* is the preset itself at that size, from scratch at its own rate. "
        "Mean (lowest to highest) over the seeds that are done, each with a source of its own. Held-out loss: "
        f"{first['heldout_images']} images under {first['draws']} noises and times each, the same for all; over the "
        f"noises, the standard error of one loss is {100 * own:.1f} %, of two models' ratio {100 * paired:.1f} %."
        f"{_source_words(records)}"
    )


def _source_words(records: Sequence[Record]) -> str:
    own = having(records, size="source")
    if not own:
        return ""
    loss, distance = (spread_of(values) for values in ([*map(loss_of, own)], [r["figures"]["frechet"] for r in own]))
    return f" The source itself (width 64, depth 4): loss {loss.text(4)}, Fréchet distance {distance.text(1)}."


def _errors(records: Sequence[Record]) -> tuple[float, float]:
    """Relative standard errors over the draws: of a loss, and of its ratio to the loss from scratch after as many."""

    def error(draws: NDArray[np.float64]) -> float:
        return float(draws.std(ddof=1) / draws.mean() / math.sqrt(len(draws)))

    own, paired = [], []
    for record in records:
        here, drawn = record["conditions"], np.array(record["figures"]["heldout_losses"])
        own.append(error(drawn))
        beside = having(records, size=here["size"], seen=here["seen"], seed=here["seed"], method=SCRATCH)
        if here["method"] not in (SCRATCH, WHOLE) and beside:
            paired.append(error(drawn / np.array(beside[0]["figures"]["heldout_losses"])))
    return float(np.mean(own)), float(np.mean(paired)) if paired else 0.0


def _lengths(records: Sequence[Record]) -> list[int]:
    return sorted({record["conditions"]["seen"] for record in records if record["conditions"]["size"] in SIZES})


def _losses(records: Sequence[Record], size: str) -> str:
    lengths, rows = _lengths(records), []
    methods = rows_of(having(records, size=size))
    for method in methods:
        cells = [having(records, size=size, method=method, seen=seen) for seen in lengths]
        rows.append((method, *(spread_of(map(loss_of, own)).text(4) if own else "–" for own in cells)))
    for method in methods:
        if method not in (SCRATCH, WHOLE):
            times = [times_fewer(records, size, method, seen) if seen else [] for seen in lengths]
            rows.append((f"{method}, times fewer than scratch", *map(times_text, times)))
    return markdown(("start", *(f"{seen:,} images" for seen in lengths)), rows)


def _distances(records: Sequence[Record], sizes: Sequence[str]) -> str:
    lengths, rows = _lengths(records), []
    for size in sizes:
        for method in rows_of(having(records, size=size)):
            cells = [having(records, size=size, method=method, seen=seen) for seen in lengths]
            values = ([record["figures"]["frechet"] for record in own] for own in cells)
            rows.append((f"{size}, {method}", *(spread_of(own).text(1) if own else "–" for own in values)))
    return markdown(("size and start", *(f"{seen:,} images" for seen in lengths)), rows)


def _claims(records: Sequence[Record]) -> Iterator[str]:
    """Whether each method reaches the loss of the whole training with five times fewer images."""
    for size in SMALLER:
        for method in rows_of(having(records, size=size)):
            if method != WHOLE:
                yield from _claim(records, size, method)


def _claim(records: Sequence[Record], size: str, method: str) -> Iterator[str]:
    needed, times = [], []
    for record in having(records, size=size, method=WHOLE):
        seen = record["conditions"]["seen"]
        found = images_for(loss_of(record), curve(records, size, method, record["conditions"]["seed"]))
        if found is not None and found.value:
            needed.append(found)
            times.append(Times(seen / found.value, {"≤": "≥", "≥": "≤"}.get(found.bound, "")))
    if not needed:
        return
    met = all(each.value >= WANTED_RATIO and each.bound != "≤" for each in times)
    missed = any(each.value < WANTED_RATIO or each == Times(WANTED_RATIO, "≤") for each in times)
    verdict = "met" if met else "not met" if missed else "longer runs are still to come"
    images = f"{spread_of(each.value for each in needed).mean:,.0f} images"
    reached = f"the loss of the whole training after {images}, {times_text(times)} times fewer"
    if any(each.bound == "≥" for each in needed):
        most = max(each.value for each in times)
        reached = f"after {images} not at the loss of the whole training, so at most {most:.1f} times fewer"
    yield paragraph(f"- {size}, {method}: {reached} (wanted: at least {WANTED_RATIO:g}): {verdict}.", "  ")


def draw(records: Sequence[Record], path: Path) -> None:
    """Held-out loss against images, a panel per size; the mean of the seeds, and their range as a band."""
    plt = pyplot()
    sizes = [size for size in SIZES if having(records, size=size)]
    figure, axes = plt.subplots(1, len(sizes), figsize=(3.1 * len(sizes), 3.4), layout="constrained", squeeze=False)
    for axis, size in zip(axes[0], sizes, strict=True):
        for number, method in enumerate(rows_of(records)):
            own = having(records, size=size, method=method)
            lengths = sorted({record["conditions"]["seen"] for record in own})
            spreads = [spread_of(map(loss_of, having(own, seen=seen))) for seen in lengths]
            style = f"C{number}" + ("*" if method == WHOLE else "o-")
            axis.plot(lengths, [each.mean for each in spreads], style, markersize=4, label=method)
            low, high = [each.low for each in spreads], [each.high for each in spreads]
            axis.fill_between(lengths, low, high, color=f"C{number}", alpha=0.2, linewidth=0)
        axis.set_xscale("symlog", linthresh=6_000, linscale=0.6)
        axis.set_xticks([0, 6_000, 24_000, 96_000], ["0", "6 K", "24 K", "96 K"])
        axis.set_yscale("log")
        axis.set_yticks([0.25, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5], ["0.25", "0.3", "0.4", "0.5", "0.7", "1", "1.5"])
        axis.minorticks_off()
        axis.set_title(size)
        axis.set_xlabel("images")
    axes[0][0].set_ylabel("loss on held-out images")
    axes[0][0].legend(frameon=False)
    save(plt, figure, path)
