"""The measuring process of `bench`: a JSON request as its argument, one JSON answer a line on stdout.

It loads and warms up, says so, and then times as many calls as each line on stdin asks for; at the end of stdin it
says how much memory all that took. In between it sleeps, so that two of them can take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.deploy.bench import Conditions
from kind_edge.deploy.ort import require_onnxruntime
from kind_edge.deploy.placement import check_placement
from kind_edge.deploy.providers import is_simulated, resolve_provider
from kind_edge.deploy.runtime import load_bundle
from kind_edge.deploy.session import open_session, return_freed_blocks
from kind_edge.errors import InputError, KindEdgeError

_TELLING_FLAGS = (
    "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme",
)  # fmt: skip
"""The instruction sets that decide which matrix kernels ONNX Runtime picks, on x86 and on Arm."""

_NUMPY_TYPES = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64, "tensor(uint32)": np.uint32, "tensor(uint16)": np.uint16, "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}  # fmt: skip

_LINUX_STATUS = Path("/proc/self/status")

Action = Callable[[], object]
Say = Callable[[dict[str, Any]], None]


def serve(request: dict[str, Any], say: Say) -> None:
    """Load, warm up and time what the request names."""
    require_onnxruntime()
    gc.collect()
    baseline_bytes = reset_peak_memory()
    started = time.perf_counter()
    action = _prepare(request)
    cold_load_ms = (time.perf_counter() - started) * 1e3
    for _ in range(request["warmups"]):
        action()
    say({
        "cold_load_ms": cold_load_ms,
        "conditions": dataclasses.asdict(conditions(request["threads"], request["provider"])),
    })  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        for _ in range(asked["untimed"]):
            action()
        say({"latencies_ms": [_timed_ms(action) for _ in range(asked["runs"])]})
    peak_bytes = peak_memory()
    known = peak_bytes is not None and baseline_bytes is not None
    say({"peak_memory_bytes": max(peak_bytes - baseline_bytes, 0) if known else None})  # type: ignore[operator]


def place(request: dict[str, Any], say: Say) -> None:
    """Say where the nodes of a model run, or refuse it."""
    path = Path(request["path"])
    feeds = random_inputs(open_session(path))
    with tempfile.TemporaryDirectory(prefix="kind-edge-bench-") as folder:
        found = check_placement(
            path, feeds, request["provider"], request["threads"], Path(folder), request["allow_fallback"]
        )
    say(dataclasses.asdict(found))


def random_inputs(session: Any, batch: int = 1) -> dict[str, Any]:
    """Inputs of the declared types and shapes: dynamic sizes `batch`, normal values, integers 0 (they are indices)."""
    generator = np.random.default_rng(0)
    feeds = {}
    for tensor in session.get_inputs():
        if tensor.type not in _NUMPY_TYPES:
            raise InputError(f"input {tensor.name!r} has type {tensor.type}; want one of {', '.join(_NUMPY_TYPES)}")
        dtype = np.dtype(_NUMPY_TYPES[tensor.type])
        shape = [size if isinstance(size, int) and size > 0 else batch for size in tensor.shape]
        values = generator.standard_normal(shape) if dtype.kind == "f" else np.zeros(shape)
        feeds[tensor.name] = np.asarray(values, dtype)
    return feeds


def conditions(threads: int | None, provider: str) -> Conditions:
    """This machine and runtime, as a report records them."""
    name, flags = _processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Conditions(
        cpu=name,
        instruction_sets=tuple(flag for flag in _TELLING_FLAGS if flag in flags),
        cores=cores,
        threads=threads,
        runtime=f"onnxruntime {require_onnxruntime().__version__}",
        provider=provider,
        spinning=False,
        system=platform.platform(),
        simulated=is_simulated(resolve_provider(provider)),
    )


def reset_peak_memory() -> int | None:
    """Resident bytes now, from which the peak is counted; None where the system does not tell.

    Linux keeps a high-water mark that can be reset. macOS only has one since the start of the process: importing rarely
    peaks above what stays, so it serves as the baseline there.
    """
    # Where a container forbids the reset, the mark starts with the imports, as on macOS.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _linux_status("VmRSS") if _LINUX_STATUS.exists() else peak_memory()


def peak_memory() -> int | None:
    """The high-water mark of resident memory in bytes; None where the system does not tell."""
    if _LINUX_STATUS.exists():
        # Not getrusage: its mark survives exec, so a child would report the peak of the parent that forked it.
        return _linux_status("VmHWM")
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _linux_status(key: str) -> int | None:
    for line in _LINUX_STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _prepare(request: dict[str, Any]) -> Action:
    """What one run does. It ends when its result is an array in the host's memory, on every provider."""
    threads, provider = request["threads"], request["provider"]
    if request["subject"] == "image":
        bundle = load_bundle(request["path"], request["model"], threads, verify=False, provider=provider)
        name = bundle.classes[0] if len(bundle.classes) == 1 or "class_index" in bundle.model.input_names() else None
        return lambda: bundle.generate(name)
    session = open_session(request["path"], threads, provider)
    feeds = random_inputs(session, request["batch"])
    return lambda: session.run(None, feeds)


def _timed_ms(action: Action) -> float:
    started = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - started) / 1e6


def _processor() -> tuple[str, frozenset[str]]:
    """The processor's name and its instruction sets."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip(), frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    fields = {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or fields.get("hardware") or platform.machine()
    return name, frozenset((fields.get("flags") or fields.get("features") or "").split())


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    return_freed_blocks()
    request = json.loads(sys.argv[1])
    try:
        (place if request["subject"] == "placement" else serve)(request, say)
    except KindEdgeError as error:
        say({"error": {"kind": type(error).__name__, "message": str(error)}})
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
