"""The measuring process of one engine: a JSON request a line on stdin, a JSON answer a line on stdout.

Every engine's file describes itself as an `Engine` and calls `serve`. It runs in that engine's own environment, where
numpy is all that can be counted on, so nothing of kind_edge is imported here.

    {"do": "make", "source": DIR, "target": DIR, "precision": P}     convert the dense twin; the answer holds nothing
    {"do": "open", "target": DIR, "precision": P, "batch": B, "threads": T}  -> load_ms, runtime
    {"do": "evaluate", "batch": B, "runs": N}                                -> latencies_ms of single calls
    {"do": "image", "table": {...}, "guidance": W, "null": K, "runs": N}     -> latencies_ms of whole guided images
    {"do": "draw", "table": ..., "guidance": W, "null": K, "images": NPZ, "output": NPY}   guided images of given noises
    {"do": "peak"}                                                           -> peak_bytes above what imports had taken

A guided step is one call of two rows, or two calls of one, as the batch that was opened says.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Predict = Callable[[Any, Any, Any], Any]
"""(sample [B, ch, H, W], timestep [B], class index [B]) -> prediction, NumPy arrays"""

_COLUMNS = ("timestep", "p", "q", "a", "b", "c")


@dataclass(frozen=True)
class Opened:
    """A model that is loaded. `image` draws one image where the engine has a loop of its own."""

    predict: Predict
    shape: tuple[int, int, int]
    image: Callable[[], object] | None = None


@dataclass(frozen=True)
class Engine:
    """`load` imports the libraries and tells their versions; `make` writes files into a folder; `open` loads them.

    `make(source, target, precision)`, `open(target, precision, batch, threads)`. An engine whose files serve every
    batch ignores `batch`.
    """

    load: Callable[[], str]
    make: Callable[[Path, Path, str], None]
    open: Callable[[Path, str, int, int], Opened]


class Session:
    """One process's state between requests."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.runtime = engine, engine.load()
        self.request: dict[str, Any] = {}
        self.batch, self.baseline = 0, 0
        self.opened: dict[int, Opened] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        return dict(getattr(self, f"do_{request['do']}")(request) or {})

    def do_make(self, request: dict[str, Any]) -> None:
        Path(request["target"]).mkdir(parents=True, exist_ok=True)
        self.engine.make(Path(request["source"]), Path(request["target"]), request["precision"])

    def do_open(self, request: dict[str, Any]) -> dict[str, Any]:
        gc.collect()
        self.request, self.batch = request, request["batch"]
        self.baseline = reset_peak()
        started = time.perf_counter()
        self.at(self.batch)
        return {"load_ms": 1e3 * (time.perf_counter() - started), "runtime": self.runtime}

    def at(self, batch: int) -> Opened:
        """The model for calls of `batch` rows, called once: some engines prepare themselves in the first call."""
        if batch not in self.opened:
            asked = self.request
            opened = self.engine.open(Path(asked["target"]), asked["precision"], batch, asked["threads"])
            if opened.image is None:
                opened.predict(*_inputs(opened.shape, batch))
            self.opened[batch] = opened
        return self.opened[batch]

    def do_evaluate(self, request: dict[str, Any]) -> dict[str, Any]:
        opened = self.at(request["batch"])
        inputs = _inputs(opened.shape, request["batch"])
        return {"latencies_ms": [timed_ms(lambda: opened.predict(*inputs)) for _ in range(request["runs"])]}

    def do_image(self, request: dict[str, Any]) -> dict[str, Any]:
        batch = 1 if request.get("guidance") == 1 else self.batch  # no null row, no second row
        opened = self.at(batch)
        if opened.image is not None:
            draw_one: Callable[[], object] = opened.image
        else:
            noise = np.random.default_rng(0).standard_normal((1, *opened.shape)).astype(np.float32)
            classes = np.zeros(1, np.int64)

            def draw_one() -> object:
                return draw(opened.predict, batch, request, noise, classes)

        return {"latencies_ms": [timed_ms(draw_one) for _ in range(request["runs"])]}

    def do_draw(self, request: dict[str, Any]) -> None:
        opened, given = self.at(self.batch), np.load(request["images"])
        images = [
            draw(opened.predict, self.batch, request, given["noise"][at : at + 1], given["classes"][at : at + 1])
            for at in range(len(given["noise"]))
        ]
        np.save(request["output"], np.concatenate(images))

    def do_peak(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"peak_bytes": max(0, peak() - self.baseline)}


def draw(predict: Predict, batch: int, request: dict[str, Any], noise: Any, classes: Any) -> Any:
    """One guided image [1, ch, H, W] by the rows of a sampler's table; without guidance there is no null row."""
    sample, previous = noise, np.zeros_like(noise)
    nulls, weight = np.full_like(classes, request["null"]), np.float32(request["guidance"])
    for row in zip(*(request["table"][name] for name in _COLUMNS), strict=True):
        timestep, (p, q, a, b, c) = np.full(1, row[0], np.float32), map(np.float32, row[1:])
        if weight == 1:
            guided = predict(sample, timestep, classes)
        else:
            if batch == 2:
                both = predict(np.repeat(sample, 2, 0), np.repeat(timestep, 2), np.concatenate([classes, nulls]))
                of_class, of_null = both[:1], both[1:]
            else:
                of_class = np.array(predict(sample, timestep, classes))
                of_null = predict(sample, timestep, nulls)
            guided = of_null + weight * (of_class - of_null)
        direction = p * sample + q * guided
        sample, previous = a * sample + b * direction + c * previous, direction
    return np.clip(sample, -1.0, 1.0)


def _inputs(shape: tuple[int, int, int], batch: int) -> tuple[Any, Any, Any]:
    sample = np.random.default_rng(0).standard_normal((batch, *shape)).astype(np.float32)
    return sample, np.full(batch, 500.0, np.float32), np.zeros(batch, np.int64)


def timed_ms(action: Callable[[], object]) -> float:
    started = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - started) / 1e6


def reset_peak() -> int:
    """Resident bytes now; Linux starts its high-water mark anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux: no figure
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def serve(engine: Engine) -> None:
    """Answer requests until stdin ends. Whatever libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session: Session | None = None
    for line in sys.stdin:
        try:
            session = session or Session(engine)
            answer = session.answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever an engine raises, the other side is told
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
