"""This machine as a device profile: what ONNX Runtime reaches here, measured on first use and then remembered.

First use takes a few seconds and measures what a roofline needs; `kind-edge profiles calibrate` takes two minutes and
adds the tables of operators. Both are kept in the user's cache, as the TOML file of a profile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import platform
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from kind_edge.budget.calibrate import Measured, OnProgress, all_probes, measure_here, measured_profile
from kind_edge.budget.profile import HOST, DeviceProfile, Figure, packaged_text
from kind_edge.budget.profile_file import parse_profile
from kind_edge.budget.profile_text import profile_text
from kind_edge.budget.roofline import roofline_probes
from kind_edge.errors import InputError, UsageError
from kind_edge.model.cache import cache_base

CACHE_VERSION = 4

_APP_SHARE = 0.75


@dataclass(frozen=True)
class HostKey:
    """What the figures depend on."""

    cpu: str
    instructions: str
    threads: int
    onnxruntime: str

    def __str__(self) -> str:
        runtime = f"onnxruntime {self.onnxruntime}, no spinning"
        return f"{self.cpu} ({self.instructions}), threads: {self.threads}, {runtime}"


def host_profile() -> DeviceProfile:
    """This machine's profile, from the cache where it was measured before with the same CPU, threads and runtime.

    Takes a few seconds when it measures. Raises `UsageError` without ONNX Runtime.
    """
    key = host_key()
    path = cache_path(key)
    if known := cached_profile(path):
        return known
    return _remembered(path, _profile(key, measure_here(key.threads, roofline_probes()), with_table=False))


def calibrate_host(on_progress: OnProgress | None = None) -> DeviceProfile:
    """Measure this machine with all probes, and remember it: what `host_profile` returns from now on."""
    key = host_key()
    return keep_host(key, measure_here(key.threads, all_probes(key.threads > 1), on_progress))


def keep_host(key: HostKey, latency_us: Mapping[str, float]) -> DeviceProfile:
    """The profile of what all probes took here, remembered."""
    return _remembered(cache_path(key), _profile(key, latency_us, with_table=True))


def host_key() -> HostKey:
    """The CPU, the instructions that matter to int8 and fp32 products, the threads, the runtime's version."""
    return HostKey(*_cpu(), available_threads(), _onnxruntime().__version__)


def cache_path(key: HostKey) -> Path:
    """Where the figures for a key are kept: $XDG_CACHE_HOME (or ~/.cache) /kind-edge/host-*.toml."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {key}".encode()).hexdigest()[:16]
    return cache_base() / f"host-{digest}.toml"


def available_threads() -> int:
    """Cores that this process may use: its affinity, cut by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2 here, or "max": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)


def cached_profile(path: Path) -> DeviceProfile | None:
    """The profile in the cache; None where there is none, or where the file is damaged: measuring again mends it."""
    try:
        return parse_profile(path.read_text(encoding="utf-8"), HOST, str(path))
    except (OSError, UnicodeDecodeError, InputError):
        return None


def _profile(key: HostKey, latency_us: Mapping[str, float], with_table: bool) -> DeviceProfile:
    described = tomllib.loads(packaged_text(HOST))
    title, runtime = f"{described['title']}: {key.cpu}", f"onnxruntime {key.onnxruntime}"
    system, ram = f"{platform.system()} {platform.release()}", _ram_bytes()
    device = f"{key.cpu} ({key.instructions})"
    profile = measured_profile(HOST, Measured(device, system, runtime, key.threads, ram, latency_us), with_table)
    cpu = dataclasses.replace(
        profile.units["cpu"], sustained_share=Figure(1.0, "E", "mains power and a fan are assumed")
    )
    return dataclasses.replace(
        profile,
        title=title,
        units={"cpu": cpu},
        ram_bytes=Figure(ram, "M", "the operating system, cut by a container's limit"),
        app_memory_limit_bytes=Figure(ram * _APP_SHARE, "E", "derived: three quarters of the RAM"),
    )


def _remembered(path: Path, profile: DeviceProfile) -> DeviceProfile:
    """Written aside and renamed, and as it is read again. Without a cache folder it just holds for this process."""
    text = profile_text(profile)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
    return parse_profile(text, HOST, str(path))


def _ram_bytes() -> float:
    import psutil

    total = float(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2 here, or "max": no limit
        total = min(total, float(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))))
    return total


def _cpu() -> tuple[str, str]:
    """The CPU's name and which of the instruction sets that matter here it has."""
    wanted = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512f", "avx2", "i8mm", "asimddp", "asimd")
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):  # Linux only
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    found = " ".join(flag for flag in wanted if flag in flags)
    return fields.get("model name") or platform.processor() or platform.machine(), found or platform.machine()


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            f"--profile host measures this machine with ONNX Runtime, which cannot be imported ({error}); "
            "install one of onnxruntime and onnxruntime-gpu, or name another profile"
        ) from error
    return onnxruntime  # type: ignore[no-any-return]
