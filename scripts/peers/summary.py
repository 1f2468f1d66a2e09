"""What the records come to: who is compared with whom, how many times better, and at which Fréchet distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from studies.store import Record

from peers.distance import CLASS_SETS, MOST
from peers.environments import PEERS
from peers.ours import VARIANTS, Variant
from peers.race import EQUAL, GUIDED, Ratio, ratio

AT_MOST = f"guided, {MOST} steps"
BASELINE = "onnxruntime fp32"
OUR_INT8 = "the dense twin in our int8"
TARGETS: Mapping[str, Mapping[int, float]] = {
    "image_latency_vs_dense_fp32": {2: 40.0, 10: 40.0},
    "image_latency_vs_best_int8_peer": {2: 3.0, 10: 3.0},
    "file_size_vs_dense_fp32": {2: 8.0, 10: 4.0},
}


@dataclass(frozen=True)
class Found:
    """The records of one comparison, by what they are about."""

    run: Record
    frechet: Mapping[tuple[str, int], float]
    """(peer, variant, or BASELINE at 50 steps; number of classes) -> Fréchet distance"""

    @property
    def shipped(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in self.run["figures"]["shipped"]}

    @property
    def large(self) -> dict[str, dict[str, Any]]:
        return {each["name"]: each for each in self.run["figures"]["large"]}

    def times(self, name: str, label: str = GUIDED) -> Sequence[float]:
        return list(self.shipped[name]["image_ms"][label])


def found_in(records: Sequence[Record]) -> Found | None:
    """None without a run."""
    run = next((each for each in records if each["conditions"]["kind"] == "run"), None)
    return None if run is None else Found(run, _frechets(records, run["conditions"]["best"]))


def _frechets(records: Sequence[Record], best: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    found: dict[tuple[str, int], float] = {}
    for record in records:
        own, frechet = record["conditions"], record["figures"].get("frechet")
        if own["kind"] == "engine":
            found[own["peer"], len(own["classes"])] = frechet
        elif own["kind"] == "ours":
            variant = Variant(own["classes"], own["precision"], own["steps"], own["max_size"])
            found[variant.name, variant.classes] = frechet
        elif own["kind"] == "distance":
            at, classes = (own["sampler"], own["steps"]), len(own["classes"])
            if own["precision"] == "fp32" and at == ("euler", MOST):
                found[AT_MOST, classes] = frechet
            if own["precision"] == "fp32" and at == (best["fp32"]["sampler"], best["fp32"]["steps"]):
                found |= {(peer.name, classes): frechet for peer in PEERS if not peer.int8}
    return found


def fastest_no_worse(found: Found, classes: int, frechet: float) -> str | None:
    """Of our variants, also as `sampler.onnx`, the fastest whose images are no worse."""
    names = [name for variant in _no_worse(found, classes, frechet) for name in found.shipped
             if name.split(", sampler")[0] == variant.name]  # fmt: skip
    return min(names, key=lambda name: sorted(found.times(name))[len(found.times(name)) // 2], default=None)


def smallest_no_worse(found: Found, classes: int, frechet: float) -> str | None:
    names = [each.name for each in _no_worse(found, classes, frechet) if each.name in found.shipped]
    return min(names, key=lambda name: int(found.shipped[name]["file_bytes"]), default=None)


def _no_worse(found: Found, classes: int, frechet: float) -> list[Variant]:
    own = [each for each in VARIANTS if each.classes == classes]
    return [each for each in own if found.frechet.get((each.name, classes), frechet + 1) <= frechet]


def best_int8_peer(found: Found) -> str | None:
    """The fastest at its best steps."""
    names = [peer.name for peer in PEERS if peer.int8 and peer.name in found.shipped]
    return min(names, key=lambda name: sorted(found.times(name))[len(found.times(name)) // 2], default=None)


@dataclass(frozen=True)
class Outcome:
    """One target at one number of classes: ours, the other, how many times better, both distances."""

    key: str
    classes: int
    ours: str | None
    other: str
    better: Ratio | None
    our_frechet: float | None
    other_frechet: float

    @property
    def wanted(self) -> float:
        return TARGETS[self.key][self.classes]

    @property
    def reached(self) -> bool:
        return self.better is not None and self.better.median >= self.wanted


def outcomes(found: Found) -> list[Outcome]:
    """Every target, where there is anything to compare."""
    results = []
    for classes in (count for count in CLASS_SETS if (AT_MOST, count) in found.frechet):
        dense = found.frechet[AT_MOST, classes]
        ours = fastest_no_worse(found, classes, dense)
        better = None if ours is None else ratio(found.times(BASELINE, AT_MOST), found.times(ours))
        results.append(_outcome(found, "image_latency_vs_dense_fp32", classes, ours, AT_MOST, better))
        peer = best_int8_peer(found)
        if peer is not None and (peer, classes) in found.frechet:
            ours = fastest_no_worse(found, classes, found.frechet[peer, classes])
            better = None if ours is None else ratio(found.times(peer), found.times(ours))
            results.append(_outcome(found, "image_latency_vs_best_int8_peer", classes, ours, peer, better))
        ours = smallest_no_worse(found, classes, dense)
        sizes = [found.shipped[name]["file_bytes"] for name in (BASELINE, ours) if name]
        better = Ratio(*[sizes[0] / sizes[1]] * 3) if ours else None
        results.append(_outcome(found, "file_size_vs_dense_fp32", classes, ours, AT_MOST, better))
    return results


def _outcome(found: Found, key: str, classes: int, ours: str | None, other: str, better: Ratio | None) -> Outcome:
    own = None if ours is None else found.frechet[ours.split(", sampler")[0], classes]
    return Outcome(key, classes, ours, other, better, own, found.frechet[other, classes])


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """The figures that have targets, by number of classes, with the Fréchet distances that they were reached at."""
    found = found_in(records)
    if found is None:
        return {}
    result: dict[str, Any] = {key: {} for key in TARGETS}
    result["compared"] = []
    for each in outcomes(found):
        result[each.key][str(each.classes)] = None if each.better is None else each.better.median
        result["compared"].append({
            "figure": each.key, "classes": each.classes, "ours": each.ours, "other": each.other,
            "our_frechet": each.our_frechet, "other_frechet": each.other_frechet,
            "low": each.better and each.better.low, "high": each.better and each.better.high,
            "wanted": each.wanted, "reached": each.reached,
        })  # fmt: skip
    if all(found.shipped.get(name) for name in (BASELINE,)):
        result["equal_evaluations_ms"] = {
            name: sorted(one["image_ms"][EQUAL])[len(one["image_ms"][EQUAL]) // 2]
            for name, one in found.shipped.items()
            if EQUAL in one["image_ms"]
        }
    return result
