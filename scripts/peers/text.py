"""What docs/benchmarks.md says of the records."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from studies.statistics import in_percent, markdown, paragraph
from studies.store import Record

from peers.distance import CLASS_SETS, GUIDANCE, IMAGES, WITHIN
from peers.environments import PEERS, PINS
from peers.ours import LARGE_STEPS, VARIANTS, large_about
from peers.race import EQUAL, GUIDED, ratio
from peers.summary import AT_MOST, BASELINE, OUR_INT8, Found, Outcome, best_int8_peer, found_in, outcomes

WORDS = {
    "image_latency_vs_dense_fp32": "an image, against the dense model in fp32 at 50 guided steps in ONNX Runtime",
    "image_latency_vs_best_int8_peer": "an image, against the fastest int8 engine at its best",
    "file_size_vs_dense_fp32": "file, against the dense model in fp32",
}


def text(records: Sequence[Record]) -> str:
    """All tables; without a run, the Fréchet distances alone."""
    found = found_in(records)
    parts = [*_run_parts(found)] if found else []
    return "\n\n".join([*parts, *_distance_parts(records)])


def _run_parts(found: Found) -> Iterator[str]:
    yield paragraph(_conditions(found.run))
    yield "### What came of it"
    yield "\n".join(paragraph(_verdict(each), indent="  ") for each in outcomes(found))
    yield "### The shipped shape"
    yield markdown(
        ("model", "evaluations", "ms an image", "times the baseline's speed", "Fréchet, 2 classes", "10 classes",
         "file, MB", "peak memory, MB", "load, ms"),
        _shipped_rows(found),
    )  # fmt: skip
    yield "### Equal evaluations"
    yield paragraph(_equal_words(found))
    yield markdown(("model", "ms an image", "times ours"), _equal_rows(found))
    yield "### One evaluation of the denoiser"
    yield paragraph(_single_words(found))
    yield markdown(("model", "one row, ms", "two rows, ms", "a guided step", "threads"), _single_rows(found))
    yield f"### {large_about()}"
    yield paragraph(_large_words(found))
    yield markdown(
        ("model", "one row, ms", "two rows, ms", "an image, s", "file, MB", "peak memory, MB", "load, ms"),
        _large_rows(found),
    )
    if missing := [*_missing(found)]:
        yield "### What could not be measured here"
        yield "\n".join(missing)


def _conditions(run: Record) -> str:
    own = run["conditions"]
    runtimes = sorted({each["runtime"] for each in run["figures"]["shipped"]})
    pins = ", ".join(pin for name in PINS for pin in PINS[name] if not pin.startswith("torch"))
    return (
        f"`scripts/bench peers` on {own['cpu']} ({', '.join(own['instruction_sets'])}), {own['cores']} cores, "
        f"one thread or {own['threads']}, whichever an engine is quicker with (`threads` below; at DiT-B/2 all), load "
        f"average {own['load_average']} before it began; "
        f"{own['system']}, Python {own['python']}; {', '.join(runtimes)} (made with {pins}). {own['rounds']} rounds, "
        "forth and back over all processes; a figure is the median over the rounds of the median of "
        f"{own['runs']} images; ratios are taken within a round, and the range in brackets is that of the middle 80 % "
        "of the rounds. Peak memory is what a process held beyond its imports, up to the last guided image; load is "
        "opening the file and the first call."
    )


def _verdict(each: Outcome) -> str:
    wanted = f"wanted: {each.wanted:g} x"
    what = f"**{WORDS[each.key]}, {each.classes} classes** ({wanted})"
    if each.better is None or each.our_frechet is None:
        return (
            f"- {what}: missed. No bundle of ours has a Fréchet distance as low as {each.other}'s "
            f"{each.other_frechet:.2f}."
        )
    spread = f"{each.better.median:.1f} x"
    if each.better.low != each.better.high:
        spread = f"{each.better.median:.1f} x ({each.better.low:.1f} to {each.better.high:.1f})"
    verdict = "reached" if each.reached else "missed"
    return (
        f"- {what}: {verdict}, {spread}, with {each.ours} at Fréchet distance {each.our_frechet:.2f} against "
        f"{each.other_frechet:.2f} of {BASELINE if each.other == AT_MOST else each.other}."
    )


def _shipped_rows(found: Found) -> Iterator[tuple[str, ...]]:
    best = found.run["conditions"]["best"]
    for name, one in found.shipped.items():
        for label in (key for key in (AT_MOST, GUIDED) if key in one["image_ms"]):
            peer = next((each for each in PEERS if each.name == name), None)
            if label == AT_MOST:
                told, evaluations, key = f"{name}, 50 Euler steps", 100, AT_MOST
            elif peer is not None:
                at = best["int8" if peer.int8 else "fp32"]
                told, evaluations, key = f"{name}, at its best", 2 * at["steps"], name
            else:
                told, key = name, name.split(", sampler")[0]
                evaluations = next(variant.steps for variant in VARIANTS if variant.name == key)
            times = one["image_ms"][label]
            speed = ratio(found.times(BASELINE, AT_MOST), times)
            distances = (_number(found.frechet.get((key, classes))) for classes in CLASS_SETS)
            yield (told, str(evaluations), f"{statistics.median(times):.2f}", speed.text(), *distances, *_costs(one))


def _costs(one: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = (f"{one[key] / 1e6:.1f}" for key in ("file_bytes", "peak_bytes"))
    return (*sizes, f"{one['load_ms']:.0f}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _equal_ours(found: Found) -> str | None:
    """The fastest of ours at four evaluations and ten classes."""
    names = [name for name, one in found.shipped.items() if EQUAL in one["image_ms"] and name.startswith("kind-edge")]
    names = [name for name in names if "10 classes" in name]
    return min(names, key=lambda name: statistics.median(found.times(name, EQUAL)), default=None)


def _equal_words(found: Found) -> str:
    return (
        "Four evaluations of one row each, for all: the dense twin without guidance, ours as they are. The dense "
        "twin's images are no longer as good there: this row compares engines and graphs, not artefacts. Ratios are "
        f"to {_equal_ours(found)}."
    )


def _equal_rows(found: Found) -> Iterator[tuple[str, ...]]:
    ours = _equal_ours(found)
    for name, one in found.shipped.items():
        if EQUAL in one["image_ms"] and ours is not None:
            times = one["image_ms"][EQUAL]
            yield name, f"{statistics.median(times):.2f}", ratio(times, found.times(ours, EQUAL)).text(2)


def _single_words(found: Found) -> str:
    told = "A guided step is one call of two rows, or two calls of one, whichever was quicker before the run."
    fastest, own = best_int8_peer(found), found.shipped.get(OUR_INT8)
    if fastest is None or own is None:
        return told
    rows = str(found.shipped[fastest]["batch"])
    slower = ratio(own["evaluation_ms"][rows], found.shipped[fastest]["evaluation_ms"][rows])
    operators = found.run["figures"]["operators"]
    products = sum(share for name, share in operators.items() if "MatMul" in name)
    shares = ", ".join(f"{name} {in_percent(share)}" for name, share in [*operators.items()][:8])
    return (
        f"{told} On the same dense denoiser our int8, in ONNX Runtime, takes {slower.text(2)} times as long as "
        f"{fastest}. Of ONNX Runtime's time within operators {in_percent(products)} goes into products, those of "
        "attention among them; the rest into what other engines fuse with them or find beforehand (ranges of "
        f"activations, transposes, normalisation, Gelu). The largest: {shares}."
    )


def _single_rows(found: Found) -> Iterator[tuple[str, ...]]:
    for name, one in found.shipped.items():
        if one["evaluation_ms"]:
            figures = (f"{statistics.median(one['evaluation_ms'][rows]):.2f}" for rows in ("1", "2"))
            step = "–" if name.startswith("kind-edge") else "two rows" if one["batch"] == 2 else "one row, twice"
            yield name, *figures, step, str(one["threads"])


def _large_words(found: Found) -> str:
    own, best = found.run["conditions"], found.run["conditions"]["best"]
    return (
        "Random weights: what the images would be like is not known. Dense for the other engines, baked modulation "
        f"for ours. An image is reckoned from single calls ({own['large_rounds']} rounds of {own['large_runs']}), with "
        f"the steps found at the small shape: {best['fp32']['steps']} guided ones in fp32, {best['int8']['steps']} in "
        f"int8, and for ours {LARGE_STEPS} without guidance, as the shipped model has; whether so few would do for "
        "a trained model of this shape is not known either. No decoder is counted for any of them."
    )


def _large_rows(found: Found) -> Iterator[tuple[str, ...]]:
    best = found.run["conditions"]["best"]
    for name, one in found.large.items():
        one_row, two_rows = (statistics.median(one["evaluation_ms"][rows]) for rows in ("1", "2"))
        peer = next((each for each in PEERS if each.name == name), None)
        if peer is None:
            image_ms = LARGE_STEPS * one_row
        else:
            image_ms = best["int8" if peer.int8 else "fp32"]["steps"] * min(two_rows, 2 * one_row)
        yield name, f"{one_row:.0f}", f"{two_rows:.0f}", f"{image_ms / 1e3:.2f}", *_costs(one)


def _missing(found: Found) -> Iterator[str]:
    for shape, key in (("the shipped shape", "failed"), ("DiT-B/2", "large_failed")):
        for name, reason in found.run["figures"][key].items():
            yield paragraph(f"- {name} at {shape}: {reason}", indent="  ")


# --- distances --------------------------------------------------------------------------------------------------------


def _distance_parts(records: Sequence[Record]) -> Iterator[str]:
    own = [each for each in records if each["conditions"]["kind"] == "distance"]
    if not own:
        return
    keys = ("precision", "sampler", "steps", "classes")
    order = sorted(own, key=lambda each: [each["conditions"][key] for key in keys])
    yield "### Samplers and steps of the dense twin"
    yield paragraph(
        f"{IMAGES:,} images each, from the same noises, guidance {GUIDANCE:g}, drawn through ONNX Runtime; Heun takes "
        "two guided evaluations a step, and they are what is counted here. A precision's best is the fewest guided "
        f"steps within {in_percent(WITHIN - 1)} of its own distance at 50 Euler steps, of ten classes. Judge "
        f"{own[0]['conditions']['judge_sha256'][:12]}."
    )
    yield markdown(
        ("precision", "sampler", "guided steps", "classes", "Fréchet", "accuracy"), map(_distance_row, order)
    )


def _distance_row(record: Record) -> tuple[str, ...]:
    own, figures = record["conditions"], record["figures"]
    accuracy = in_percent(figures["class_accuracy"], 1)
    return (
        own["precision"],
        own["sampler"],
        str(own["steps"]),
        str(len(own["classes"])),
        f"{figures['frechet']:.2f}",
        accuracy,
    )
