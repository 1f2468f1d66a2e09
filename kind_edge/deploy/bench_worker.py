"""The measuring process of `bench`: one JSON request as its argument, one JSON answer as the last line of stdout."""

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
from kind_edge.deploy.runtime import load_bundle
from kind_edge.deploy.session import open_session
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


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Load, warm up and time what the request names."""
    require_onnxruntime()
    gc.collect()
    baseline_bytes = reset_peak_memory()
    started = time.perf_counter()
    action, session = _prepare(request)
    cold_load_ms = (time.perf_counter() - started) * 1e3
    for _ in range(request["warmups"]):
        action()
    latencies_ms = [_timed_ms(action) for _ in range(request["runs"])]
    peak_bytes = peak_memory()
    if request["provider"] != "cpu":
        _check_provider(request, session)
    return {
        "cold_load_ms": cold_load_ms,
        "latencies_ms": latencies_ms,
        "peak_memory_bytes": None
        if peak_bytes is None or baseline_bytes is None
        else max(peak_bytes - baseline_bytes, 0),
        "conditions": dataclasses.asdict(conditions(request["threads"], request["provider"])),
    }


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


def _prepare(request: dict[str, Any]) -> tuple[Action, Any]:
    """What one run does, and the session that it uses."""
    threads, provider = request["threads"], request["provider"]
    if request["subject"] == "image":
        bundle = load_bundle(request["path"], request["model"], threads, verify=False, provider=provider)
        name = bundle.classes[0] if len(bundle.classes) == 1 or "class_index" in bundle.model.input_names() else None
        return lambda: bundle.generate(name), bundle.session
    session = open_session(request["path"], threads, provider)
    feeds = random_inputs(session, request.get("batch", 1))
    return lambda: session.run(None, feeds), session


def _timed_ms(action: Action) -> float:
    started = time.perf_counter_ns()
    action()
    return (time.perf_counter_ns() - started) / 1e6


def _check_provider(request: dict[str, Any], session: Any) -> None:
    """Fail if the requested provider leaves the work to the CPU."""
    path = Path(request["path"])
    model = path / request["model"] if request["subject"] == "image" else path
    with tempfile.TemporaryDirectory(prefix="kind-edge-bench-") as folder:
        check_placement(model, random_inputs(session), request["provider"], request["threads"], Path(folder))


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
    try:
        answer = measure(json.loads(sys.argv[1]))
    except KindEdgeError as error:
        print(json.dumps({"error": {"kind": type(error).__name__, "message": str(error)}}))
        return error.exit_code
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
