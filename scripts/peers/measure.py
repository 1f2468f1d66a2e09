"""The whole comparison: environments, model files, Fréchet distances, then one interleaved run at each shape."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from studies.store import TWIN, Record, Store, Subject, subject_of

from kind_edge.budget.host import available_threads
from kind_edge.errors import KindEdgeError
from kind_edge.model.shipped import DEFAULT_MODEL
from peers import ours
from peers.distance import CLASS_SETS, GUIDANCE, IMAGES, MOST, SEED, Best, best_of, distance, judge
from peers.environments import LARGE_PEERS, PEERS, Peer, command
from peers.models import Dense, dense_twin, large_dense
from peers.prepared import judge_engine, prepare_all, request_of, short_reason, target_of, way_of
from peers.profiled import operator_shares
from peers.race import EQUAL, GUIDED, Contestant, Measured, WorkerFailed, quickest_way, run, say
from peers.summary import AT_MOST, BASELINE, INT8_BASELINE, OUR_INT8

NAME, RUN = "peers", "run"
ROUNDS, RUNS = 20, 3
LARGE_ROUNDS, LARGE_RUNS = 4, 1
EQUAL_STEPS = 4


def distances(output: Path) -> dict[str, Best]:
    """Every Fréchet distance of the dense twin that the comparison needs; finished ones are read. Hours of one core."""
    store, dense = Store(output, NAME, subject_of(TWIN)), dense_twin()
    fp32 = best_of(store, dense, "fp32")
    best = {"fp32": fp32, "int8": best_of(store, dense, "int8", near=fp32)}
    for classes in CLASS_SETS:
        for precision, found in best.items():
            distance(store, dense, precision, found.sampler, found.steps, classes)
        distance(store, dense, "fp32", "euler", MOST, classes)
    return best


def publish(subject: Subject, output: Path) -> list[Record]:
    """The records of a comparison, which is made where there is none of this model."""
    done = next((each for each in records(output) if each["run"] == RUN), None)
    return measure(output) if done is None else records(output)


def measure(output: Path) -> list[Record]:
    """All that is not finished; what is timed is timed anew. The records of all."""
    here, best = machine(), distances(output)
    dense = dense_twin()
    ready, failed = prepare_all(PEERS, dense)
    left = [peer for peer in PEERS if peer.name in ready]
    judge_engines(output, dense, left, best)
    store = Store(output, NAME, subject_of(DEFAULT_MODEL))
    with tempfile.TemporaryDirectory(prefix="kind-edge-peers-") as folder:
        made = []
        for variant in ours.VARIANTS:
            try:
                made.append(_exported(store, variant, Path(folder)))
            except KindEdgeError as error:  # a gate failed, or nothing fits: that is news for the page
                failed[variant.name] = short_reason(error)
        contestants = [*(_peer(peer, dense, best) for peer in left), *(one for each in made for one in _ours(each))]
        contestants.append(_our_int8(dense))
        shipped, dropped = run(contestants, ROUNDS, RUNS)
    large, large_failed = measure_large()
    figures = {
        "shipped": [dataclasses.asdict(each) for each in shipped],
        "large": [dataclasses.asdict(each) for each in large],
        "failed": failed | dropped,
        "large_failed": large_failed,
        "operators": operator_shares(dense.our_int8, available_threads()),
    }
    conditions = {"kind": "run", **here, "best": {name: dataclasses.asdict(each) for name, each in best.items()}}
    anew(store, RUN, conditions, lambda: figures)
    return records(output)


def records(output: Path) -> list[Record]:
    """Of the shipped model and of its dense twin, by name."""
    found = [each for model in (DEFAULT_MODEL, TWIN) for each in Store(output, NAME, subject_of(model)).finished()]
    return sorted(found, key=lambda each: str(each["run"]))


def anew(store: Store, name: str, conditions: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> Record:
    """A record in the place of one that is there already."""
    (store.folder / f"{name}.json").unlink(missing_ok=True)
    return store.run(name, conditions, compute)


def where_changed(
    store: Store, name: str, conditions: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
) -> Record:
    """A record that is kept as long as its conditions are these."""
    path = store.folder / f"{name}.json"
    if path.exists() and json.loads(path.read_text())["conditions"] != json.loads(json.dumps(conditions)):
        path.unlink()
    return store.run(name, conditions, compute)


def judge_engines(output: Path, dense: Dense, peers: Sequence[Peer], best: Mapping[str, Best]) -> None:
    """Every int8 engine rounds in its own way, so each draws images of its own at the steps that were found.

    ONNX Runtime's are what the steps were found with.
    """
    store, threads = Store(output, NAME, subject_of(TWIN)), available_threads()
    for peer in (each for each in peers if each.int8 and each.name != INT8_BASELINE):
        for classes, names in CLASS_SETS.items():
            conditions = {
                "kind": "engine", "peer": peer.name, "files": target_of(peer, dense).name, "classes": list(names),
                "sampler": best["int8"].sampler, "steps": best["int8"].steps, "guidance": GUIDANCE, "images": IMAGES,
                "seed": SEED, "judge_sha256": judge().judge_sha256,
            }  # fmt: skip
            compute = partial(judge_engine, peer, dense, best["int8"], classes, threads)
            try:
                where_changed(store, f"{peer.name.replace(' ', '-')}-{classes}-classes", conditions, compute)
            except WorkerFailed as error:
                say(f"{peer.name} cannot be judged: {error}")


def _peer(peer: Peer, dense: Dense, best: Mapping[str, Best]) -> Contestant:
    null = dense.spec.num_classes
    found = best["int8" if peer.int8 else "fp32"]
    images = {GUIDED: request_of(found.sampler, found.steps, null)}
    if peer.name == BASELINE:
        images[AT_MOST] = request_of("euler", MOST, null)
    late = {EQUAL: request_of("euler", EQUAL_STEPS, null, guidance=1.0)}
    way, told = way_of(peer, dense, available_threads()), tuple(command(peer.worker, peer.environment))
    return Contestant(peer.name, told, target_of(peer, dense), peer.precision, images, late, way.batch, way.threads)


def _exported(store: Store, variant: ours.Variant, folder: Path) -> ours.Made:
    say(f"exporting {variant.name}")
    made = ours.export_variant(variant, folder)
    conditions = {
        "kind": "ours", **dataclasses.asdict(variant), "profile": ours.PROFILE, "images": IMAGES, "seed": SEED,
        "denoiser_sha256": made.sha256(), "judge_sha256": judge().judge_sha256,
    }  # fmt: skip
    where_changed(store, f"ours-{variant.folder}", conditions, lambda: ours.judge_variant(made))
    return made


def _ours(made: ours.Made) -> list[Contestant]:
    """The denoiser in the runtime's loop; of the recommended steps also `sampler.onnx`."""
    told = tuple(command("in_kind_edge", None))
    equal = {EQUAL: {}} if made.variant.steps == EQUAL_STEPS else {}
    say(f"{made.variant.name}: how many threads?")
    threads = quickest_way(told, made.path, made.files["denoiser"], available_threads(), batches=(1,)).threads
    denoiser = made.files["denoiser"]
    found = [Contestant(made.variant.name, told, made.path, denoiser, {GUIDED: {}}, equal, threads=threads)]
    if equal and "sampler" in made.files:
        name = f"{made.variant.name}, sampler.onnx"
        sampler = made.files["sampler"]
        found.append(Contestant(name, told, made.path, sampler, {GUIDED: {}}, threads=threads, single=False))
    return found


def _our_int8(dense: Dense) -> Contestant:
    """The twin through our int8: how it compares with other engines on one and the same denoiser."""
    told, path = tuple(command("in_onnxruntime", None)), dense.our_int8
    way = quickest_way(told, path.parent, path.name, available_threads())
    return Contestant(OUR_INT8, told, path.parent, path.name, {}, batch=2, threads=way.threads)


# --- DiT-B/2 ----------------------------------------------------------------------------------------------------------


def measure_large() -> tuple[list[Measured], dict[str, str]]:
    """Single evaluations alone: an image of the dense model would take a minute."""
    dense = large_dense()
    threads = available_threads()  # work enough for all
    ready, failed = prepare_all(LARGE_PEERS, dense, guided=False)
    contestants = [
        Contestant(
            peer.name,
            tuple(command(peer.worker, peer.environment)),
            target,
            peer.precision,
            {},
            batch=2,
            threads=threads,
        )
        for peer in LARGE_PEERS
        if (target := ready.get(peer.name)) is not None
    ]
    told = tuple(command("in_kind_edge", None))
    for storage, classes, precision in ours.LARGE_MODELS:
        path = ours.large_files(storage, classes)[precision]
        name = f"kind-edge {precision}, {storage}, {classes} classes"
        contestants.append(Contestant(name, told, path.parent, path.name, {}, threads=threads))
    measured, dropped = run(contestants, LARGE_ROUNDS, LARGE_RUNS)
    return measured, failed | dropped


def machine() -> dict[str, Any]:
    from kind_edge.deploy.bench_worker import conditions

    here = conditions(available_threads(), "cpu")
    return {
        "cpu": here.cpu, "instruction_sets": list(here.instruction_sets), "cores": here.cores, "threads": here.threads,
        "load_average": round(os.getloadavg()[0], 1),
        "system": here.system, "python": platform.python_version(), "rounds": ROUNDS, "runs": RUNS,
        "large_rounds": LARGE_ROUNDS, "large_runs": LARGE_RUNS,
    }  # fmt: skip
