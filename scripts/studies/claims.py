"""What docs/claims.md says of the runs of `decomposition` and `anysize`: tables, and claims with what they would take.

Every claim names the figure that it wants, so that the verdict is arithmetic. Where runs are missing, so is the claim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from kind_edge.training.data import CLASS_NAMES
from studies.anysize import METHODS, PERCENTS
from studies.statistics import cell, conditions_line, in_percent, markdown, paragraph, spread_of, spread_of_figure
from studies.store import Record, having

WANTED_ACCURACY = 0.9
WANTED_MEAN_ENTROPY, WANTED_IMAGE_ENTROPY = 0.9, 0.5
"""Shares of the entropy of no idea at all."""
WANTED_DISTANCE, WANTED_LOSS_OF_ACCURACY = 1.5, 0.02
"""A cut costs little: Frechet distance times that, class accuracy less that."""

DECOMPOSITION_PICTURES = (
    "![Pictures of the shipped model: a row for each tailor, the same noise down a column](images/decomposition.png)",
    "![Whose tailor, and what the judge sees](images/swap-matrix.png)",
)
ANYSIZE_PICTURES = (
    "![One image of every class at every size, from the same noise](images/anysize.png)",
    "![Fréchet distance and class accuracy against FLOPs](images/anysize-curves.png)",
)


def decomposition_text(records: Sequence[Record]) -> str:
    claims = "\n".join(_decomposition_claims(records))
    return "\n\n".join([decomposition_table(records), *DECOMPOSITION_PICTURES, claims])


def anysize_text(records: Sequence[Record]) -> str:
    return "\n\n".join([anysize_table(records), *ANYSIZE_PICTURES, "\n".join(_anysize_claims(records))])


def _claim(claim: str, wanted: str, supported: bool, measured: str) -> str:
    line = f"- **{claim}** (wanted: {wanted}): {'supported' if supported else 'not supported'}. {measured}"
    return paragraph(line, indent="  ")


# --- decomposition ----------------------------------------------------------------------------------------------------

ROWS = (
    ("real", "real test images"),
    ("full", "full, guided"),
    ("unguided", "full, without guidance"),
    ("learngene", "learngene alone"),
    ("noise", "noise"),
)


def decomposition_table(records: Sequence[Record]) -> str:
    """Mean and range over the seeds, one row per kind of image."""
    header = (
        "images",
        "entropy per image (nats)",
        "of the mean (nats)",
        "judge over 90 % sure",
        "class accuracy",
        "Fréchet distance",
    )
    rows = []
    for kind, words in ROWS:
        own = having(records, kind=kind)
        if own:
            figures = (cell(own, "entropy_nats", 3), cell(own, "marginal_entropy_nats", 3))
            shares = (cell(own, name, 1, 100, " %") for name in ("confident_share", "class_accuracy"))
            rows.append((words, *figures, *shares, cell(own, "frechet", 1)))
    return f"{markdown(header, rows)}\n\n{conditions_line(records)}"


def _decomposition_claims(records: Sequence[Record]) -> Iterator[str]:
    full, unguided, real = (having(records, kind=kind) for kind in ("full", "unguided", "real"))
    if full and real:
        without = f", in {_share(unguided, 'class_accuracy', 1)} without guidance" if unguided else ""
        yield _claim(
            "A class is drawn by its tailor",
            f"{in_percent(WANTED_ACCURACY)} of the images are taken for their tailor's class",
            _mean(full, "class_accuracy") >= WANTED_ACCURACY,
            f"They are in {_share(full, 'class_accuracy', 1)}{without}; of as many real test images the judge "
            f"recognises {_share(real, 'class_accuracy', 1)}. The weakest class: {_weakest(full)}.",
        )
    for figures in (record["figures"] for record in having(records, kind="swap")):
        yield _claim(
            "The same noise under another tailor is another class",
            f"{in_percent(WANTED_ACCURACY)} again",
            figures["class_accuracy"] >= WANTED_ACCURACY,
            f"With {figures['noises']} noises under every tailor, {in_percent(figures['class_accuracy'], 1)} are taken "
            f"for their tailor's class; {in_percent(figures['tailor_share'])} of the variance of the judge's features "
            f"goes with the tailor. Of the rest {in_percent(figures['noise_share_of_rest'])} goes with the noise, "
            f"where {in_percent(figures['chance_share'])} would be chance.",
        )
    if full and (learngene := having(records, kind="learngene")):
        yield from _learngene_claims(learngene, full)


def _learngene_claims(learngene: Sequence[Record], full: Sequence[Record]) -> Iterator[str]:
    shares = [share for record in learngene for share in record["figures"]["judged_shares"].values()]
    no_idea = math.log(len(learngene[0]["figures"]["judged_shares"]))
    yield _claim(
        "The learngene alone prefers no class",
        f"its mean prediction has {in_percent(WANTED_MEAN_ENTROPY)} of {no_idea:.3f} nats",
        _mean(learngene, "marginal_entropy_nats") >= WANTED_MEAN_ENTROPY * no_idea,
        f"It has {cell(learngene, 'marginal_entropy_nats', 2)} nats; a class is seen in {in_percent(min(shares))} to "
        f"{in_percent(max(shares))} of its images.",
    )
    yield _claim(
        "A single image of the learngene is classless",
        f"the prediction for one has {in_percent(WANTED_IMAGE_ENTROPY)} of {no_idea:.3f} nats",
        _mean(learngene, "entropy_nats") >= WANTED_IMAGE_ENTROPY * no_idea,
        f"It has {cell(learngene, 'entropy_nats', 2)} nats, with a tailor {cell(full, 'entropy_nats', 2)}; the judge "
        f"is over 90 % sure of a class in {_share(learngene, 'confident_share', 0)} of the images, with a tailor in "
        f"{_share(full, 'confident_share', 0)}.",
    )


def _share(records: Sequence[Record], name: str, digits: int) -> str:
    return cell(records, name, digits, 100, " %")


def _weakest(records: Sequence[Record]) -> str:
    """ "shirt, 83 %": the lowest on the diagonal, over all seeds."""
    shares = {
        name: spread_of(record["figures"]["confusion"][row][CLASS_NAMES.index(name)] for record in records).mean
        for row, name in enumerate(records[0]["figures"]["confusion_rows"])
    }
    name = min(shares, key=lambda each: shares[each])
    return f"{name}, {in_percent(shares[name])}"


# --- any size ---------------------------------------------------------------------------------------------------------


def anysize_table(records: Sequence[Record]) -> str:
    """Mean and range over the seeds; one row per method and size."""
    header = (
        "model", "rank (learngene + tailor), or width", "FLOPs", "share", "Fréchet distance", "class accuracy",
        "worst class", "held-out change",
    )  # fmt: skip
    whole = next((record["conditions"]["flops"] for record in records if record["conditions"]["percent"] == 100), None)
    sizes = [(method, percent) for method in METHODS for percent in (100, *PERCENTS)]
    rows = [_row(own, whole) for method, percent in sizes if (own := having(records, method=method, percent=percent))]
    return f"{markdown(header, rows)}\n\n{conditions_line(records)}"


def _row(own: Sequence[Record], whole: int | None) -> tuple[str, ...]:
    size = own[0]["conditions"]
    name = size["method"] if size["percent"] == 100 else f"{size['method']}, {size['percent']} %"
    shape = size.get("ranks") or f"width {size['width']}"
    share = f"{100 * size['flops'] / whole:.0f} %" if whole else "–"
    flops = f"{size['flops'] / 1e6:.1f} M"
    accuracy = (cell(own, key, 1, 100, " %") for key in ("class_accuracy", "worst_class_accuracy"))
    loss = cell(own, "heldout_change", 1, 100, " %")
    loss = loss if loss == "–" else f"+{loss}"
    return (name, shape, flops, share, cell(own, "frechet", 1), *accuracy, loss)


def _anysize_claims(records: Sequence[Record]) -> Iterator[str]:
    judged = having(records, kind="judged")
    full = having(judged, method="full")
    plain, whitened = (
        {size: own for size in PERCENTS if (own := having(judged, method=method, percent=size))}
        for method in ("plain", "whitened")
    )
    if full:
        yield from (_cheap_claim(size, own, full) for size, own in whitened.items())
    pairs = [(size, _mean(plain[size], "frechet"), _mean(whitened[size], "frechet")) for size in plain | whitened
             if size in plain and size in whitened]  # fmt: skip
    if pairs:
        told = ", ".join(f"{before:.1f} against {after:.1f} at {size} %" for size, before, after in pairs)
        lower = all(after < before for _, before, after in pairs)
        wanted = "a lower Fréchet distance than the plain cut of the same ranks"
        yield _claim("Whitening is what matters", wanted, lower, f"Plain against whitened: {told}.")


def _cheap_claim(size: int, cut: Sequence[Record], full: Sequence[Record]) -> str:
    distances, accuracies = ([_mean(own, name) for own in (full, cut)] for name in ("frechet", "class_accuracy"))
    flops = cut[0]["conditions"]["flops"] / full[0]["conditions"]["flops"]
    less = in_percent(WANTED_LOSS_OF_ACCURACY)
    return _claim(
        f"{size} % of the rank, {in_percent(flops)} of the FLOPs, costs little",
        f"at most {WANTED_DISTANCE:g} times the Fréchet distance, and {less} less in class accuracy",
        distances[1] <= WANTED_DISTANCE * distances[0] and accuracies[1] >= accuracies[0] - WANTED_LOSS_OF_ACCURACY,
        f"The whitened cut goes from {distances[0]:.1f} to {distances[1]:.1f} in Fréchet distance and from "
        f"{in_percent(accuracies[0], 1)} to {in_percent(accuracies[1], 1)} in class accuracy.",
    )


def _mean(records: Sequence[Record], name: str) -> float:
    spread = spread_of_figure(records, name)
    return math.nan if spread is None else spread.mean
