"""Model files of every peer, made by its own tools in its own environment, once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.budget.host import available_threads
from kind_edge.deploy.runtime import to_pixels
from kind_edge.errors import GateError
from peers.distance import GUIDANCE, Best, judged, noise_and_classes
from peers.environments import PINS, WORKERS, Peer, command
from peers.models import Dense, whole
from peers.race import Way, WorkerFailed, quickest_way, say, working
from peers.samplers import flow_table


def target_of(peer: Peer, dense: Dense) -> Path:
    """Where its files lie; another name where its versions or its worker changed."""
    key = repr(PINS.get(peer.environment or "", ())) + (WORKERS / f"{peer.worker}.py").read_text()
    return dense.folder / f"{peer.name.replace(' ', '-')}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def prepare(peer: Peer, dense: Dense) -> Path:
    """Make the environment and the files where they are missing. Raises `GateError` with what went wrong."""
    target, told = target_of(peer, dense), command(peer.worker, peer.environment)
    if not target.is_dir():
        say(f"converting for {peer.name}")
        with tempfile.TemporaryDirectory(dir=dense.folder, prefix="making-") as folder, working(told) as worker:
            made = Path(folder, "made")
            worker.ask("make", source=str(dense.folder), target=str(made), precision=peer.precision)
            made.rename(target)
    return target


def way_of(peer: Peer, dense: Dense, threads: int) -> Way:
    """How this engine takes a guided step most quickly: found once, and remembered."""
    known = dense.folder / f"{target_of(peer, dense).name}-way-of-{threads}-threads.json"
    if not known.exists():
        say(f"{peer.name}: one call of two rows, or two of one? how many threads?")
        way = quickest_way(command(peer.worker, peer.environment), target_of(peer, dense), peer.precision, threads)
        whole(known, lambda path: path.write_text(json.dumps(dataclasses.asdict(way))) and None)
    return Way(**json.loads(known.read_text()))


def prepare_all(peers: tuple[Peer, ...], dense: Dense, guided: bool = True) -> tuple[dict[str, Path], dict[str, str]]:
    """name -> its files; name -> why there are none, or, of those that are to draw `guided` images, why none runs."""
    ready: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for peer in peers:
        try:
            target = prepare(peer, dense)
            if guided:
                way_of(peer, dense, available_threads())
            ready[peer.name] = target
        except GateError as error:
            failed[peer.name] = short_reason(error)
            say(f"{peer.name}: {failed[peer.name]}")
    return ready, failed


def short_reason(error: Exception) -> str:
    return " ".join(str(error).split())[-300:]


def request_of(sampler: str, steps: int, null_index: int, guidance: float = GUIDANCE) -> dict[str, Any]:
    """What a worker is asked to draw by; a guidance of 1 leaves the null row out."""
    return {"table": flow_table(sampler, steps).to_dict(), "guidance": guidance, "null": null_index}


def judge_engine(peer: Peer, dense: Dense, best: Best, classes: int, threads: int) -> dict[str, Any]:
    """What the judge says of images that the engine itself drew, one at a time, at these steps."""
    spec, target = dense.spec, target_of(peer, dense)
    noise, labels = noise_and_classes(classes, (spec.channels, spec.image_size, spec.image_size))
    with tempfile.TemporaryDirectory() as folder, working(command(peer.worker, peer.environment)) as worker:
        given, drawn = Path(folder, "given.npz"), Path(folder, "drawn.npy")
        np.savez(given, noise=noise, classes=labels)
        asked = {"target": str(target), "precision": peer.precision, "threads": threads}
        worker.ask("open", **asked, batch=way_of(peer, dense, threads).batch)
        request = request_of(best.sampler, best.steps, spec.num_classes)
        worker.ask("draw", **request, images=str(given), output=str(drawn))
        images = np.load(drawn)
    if not np.isfinite(images).all():
        raise WorkerFailed(f"{peer.name} drew values that are not finite")
    return judged(to_pixels(images), labels)
