"""This machine as a device profile: what ONNX Runtime reaches here, measured on first use and then remembered.

Four things are timed on graphs of a few nodes: matrix products of a DiT's shapes in each precision, a product that
must stream its weight from memory, the elementwise operators of a block, and a chain of tiny operators. The best of
several runs counts, so that the figures describe the machine and not what else it was doing. Threads do not spin while
idle: spinning distorts timings on shared cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from kind_edge.budget.profile import HOST, ComputeUnit, DeviceProfile, Figure, Precision, packaged_text
from kind_edge.errors import UsageError

CACHE_VERSION = 1

# (tokens, width) of small DiTs; each is measured through the two matrices of its MLP, width -> 4 width -> width.
_SHAPES = ((49, 128), (64, 256), (256, 384), (256, 768))
_PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
_STREAMED_BYTES = 2**27
"""Well above the share of a last-level cache that one process gets."""
_CHAIN_FLOPS = 2 * 10**8
"""Enough work that one run is far above the clock's resolution."""
_TINY_OPERATORS = 256
_ELEMENTWISE_ROUNDS = 4
_SECONDS_PER_TIMING = 0.1
_APP_SHARE = 0.75


@dataclass(frozen=True)
class HostFigures:
    """What was measured: FLOP/s (integer OP/s for int8) by precision, bytes/s, microseconds per operator."""

    throughput_flops_per_s: Mapping[Precision, float]
    memory_bytes_per_s: float
    activation_bytes_per_s: float
    overhead_us: float


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


def host_profile(refresh: bool = False) -> DeviceProfile:
    """This machine's profile, from the cache where it was measured before with the same CPU, threads and runtime.

    `refresh` measures again. Takes a few seconds when it measures. Raises `UsageError` without ONNX Runtime.
    """
    key = host_key()
    path = cache_path(key)
    figures = None if refresh else cached_figures(path)
    if figures is None:
        figures = measure_host(key.threads)
        _write_cache(path, key, figures)
    return _profile(key, figures)


def host_key() -> HostKey:
    """The CPU, the instructions that matter to int8 and fp32 products, the threads, the runtime's version."""
    return HostKey(*_cpu(), available_threads(), _onnxruntime().__version__)


def cache_path(key: HostKey) -> Path:
    """Where the figures for a key are kept: $XDG_CACHE_HOME (or ~/.cache) /kind-edge/host-*.json."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    digest = hashlib.sha256(f"{CACHE_VERSION} {key}".encode()).hexdigest()[:16]
    return Path(root) / "kind-edge" / f"host-{digest}.json"


def available_threads() -> int:
    """Cores that this process may use: its affinity, cut by a container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2 here, or "max": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(cores, 1)


def measure_host(threads: int) -> HostFigures:
    """Measure now, with that many threads. A few seconds."""
    throughput = {precision: _product_flops_per_s(precision, threads) for precision in _PRECISIONS}
    return HostFigures(
        throughput, _streaming_bytes_per_s(threads), _activation_bytes_per_s(threads), _operator_us(threads)
    )


def _product_flops_per_s(precision: Precision, threads: int) -> float:
    """Geometric mean over `_SHAPES`: no shape outweighs another."""
    rates = []
    for tokens, width in _SHAPES:
        pair_flops = 2 * (2 * tokens * width * 4 * width)
        pairs = max(1, min(8, _CHAIN_FLOPS // pair_flops))
        run = _session(_product_chain(precision, tokens, width, pairs), {"x": _normal(tokens, width)}, threads)
        rates.append(pairs * pair_flops / _best_s(run))
    return _geometric_mean(rates)


def _streaming_bytes_per_s(threads: int) -> float:
    """Bytes of weights per second that one row of activations draws through the processor."""
    width = 4096
    outputs = _STREAMED_BYTES // 4 // width
    graph = _Graph()
    graph.node("MatMul", ["x", "w"], "y")
    model = graph.model([("x", [1, width]), ("w", [width, outputs])], ("y", [1, outputs]))
    weight = np.full((width, outputs), 1e-3, np.float32)
    run = _session(model, {"x": _normal(1, width), "w": weight}, threads)
    return _STREAMED_BYTES / _best_s(run)


def _activation_bytes_per_s(threads: int) -> float:
    """Bytes that elementwise work reads and writes per second, in a block's own mixture; geometric mean over shapes."""
    rates = []
    for tokens, width in _SHAPES:
        graph, name, moved = _Graph(), "x", 0
        ones = graph.constant(np.ones(width, np.float32))
        for index in range(_ELEMENTWISE_ROUNDS):
            # Norm, modulation, softmax, activation, residual: each reads one or two arrays and writes one.
            name = graph.node("LayerNormalization", [name, ones], f"{index}.norm")
            name = graph.node("Mul", [name, ones], f"{index}.scaled")
            name = graph.node("Softmax", [name], f"{index}.softmax")
            name = graph.node("Gelu", [name], f"{index}.gelu", approximate="tanh")
            name = graph.node("Add", [name, f"{index}.norm"], f"{index}.sum")
            moved += 11 * tokens * width * 4
        model = graph.model([("x", [tokens, width])], (name, [tokens, width]))
        rates.append(moved / _best_s(_session(model, {"x": _normal(tokens, width)}, threads)))
    return _geometric_mean(rates)


def _operator_us(threads: int) -> float:
    graph = _Graph()
    for index in range(_TINY_OPERATORS):
        # Squares in a chain depend on one another and cannot be folded, fused or run side by side.
        graph.node("Mul", [f"t{index}" if index else "x"] * 2, f"t{index + 1}")
    model = graph.model([("x", [1, 8])], (f"t{_TINY_OPERATORS}", [1, 8]))
    run = _session(model, {"x": np.ones((1, 8), np.float32)}, threads)
    return _best_s(run) / _TINY_OPERATORS * 1e6


def _product_chain(precision: Precision, tokens: int, width: int, pairs: int) -> bytes:
    """`pairs` times width -> 4 width -> width, float32 in and out."""
    graph, name = _Graph(), "x"
    if precision == "fp16":
        name = graph.node("Cast", [name], "x16", to=10)
    for index in range(2 * pairs):
        inputs, outputs = (width, 4 * width) if index % 2 == 0 else (4 * width, width)
        weight = _normal(inputs, outputs) / np.float32(math.sqrt(inputs))
        if precision == "int8":
            name = graph.dynamic_int8_product(name, weight, f"p{index}")
        else:
            typed = weight.astype(np.float16) if precision == "fp16" else weight
            name = graph.node("MatMul", [name, graph.constant(typed)], f"p{index}")
    graph.node("Cast", [name], "y", to=1)
    return graph.model([("x", [tokens, width])], ("y", [tokens, width]))


class _Graph:
    """An ONNX graph under construction."""

    def __init__(self) -> None:
        import onnx

        self._onnx = onnx
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def node(self, kind: str, inputs: list[str], output: str, **attributes: int | str) -> str:
        self._nodes.append(self._onnx.helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, values: np.ndarray[Any, Any]) -> str:
        name = f"w{len(self._constants)}"
        self._constants.append(self._onnx.numpy_helper.from_array(values, name))
        return name

    def dynamic_int8_product(self, x: str, weight: np.ndarray[Any, Any], output: str) -> str:
        """The nodes that dynamic quantization puts in the place of a MatMul, with one weight scale per column."""
        scale = np.abs(weight).max(0) / np.float32(127)
        integers = self.constant(np.rint(weight / scale).astype(np.int8))
        quantized = [f"{output}.q", f"{output}.scale", f"{output}.zero"]
        self._nodes.append(self._onnx.helper.make_node("DynamicQuantizeLinear", [x], quantized))
        zeros = self.constant(np.zeros(weight.shape[1], np.int8))
        self.node("MatMulInteger", [quantized[0], integers, quantized[2], zeros], f"{output}.i")
        self.node("Cast", [f"{output}.i"], f"{output}.f", to=1)
        self.node("Mul", [quantized[1], self.constant(scale)], f"{output}.s")
        return self.node("Mul", [f"{output}.f", f"{output}.s"], output)

    def model(self, inputs: list[tuple[str, list[int]]], output: tuple[str, list[int]]) -> bytes:
        """The serialized model; every input and output is float32."""
        helper = self._onnx.helper
        ends = [[helper.make_tensor_value_info(name, 1, shape) for name, shape in side] for side in (inputs, [output])]
        graph = helper.make_graph(self._nodes, "probe", *ends, initializer=self._constants)
        opsets = [helper.make_opsetid("", 20)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def _session(model: bytes, feed: dict[str, np.ndarray[Any, Any]], threads: int) -> Callable[[], object]:
    """A call that runs the model once."""
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feed)


def _best_s(run: Callable[[], object]) -> float:
    """Seconds of the fastest of the runs that fit into `_SECONDS_PER_TIMING`, at least three; two warm up."""
    run(), run()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < _SECONDS_PER_TIMING:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def _geometric_mean(rates: list[float]) -> float:
    return math.exp(sum(math.log(rate) for rate in rates) / len(rates))


def _normal(rows: int, columns: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(rows + columns).standard_normal((rows, columns), dtype=np.float32)


def _profile(key: HostKey, figures: HostFigures) -> DeviceProfile:
    described = tomllib.loads(packaged_text(HOST))
    source = f"measured: {key}"
    whole = Figure(1.0, "M", "by construction: the throughput measured is the one reached")
    ram = _ram_bytes()
    cpu = ComputeUnit(
        name="cpu",
        peak_flops_per_s={p: Figure(rate, "M", source) for p, rate in figures.throughput_flops_per_s.items()},
        efficiency=dict.fromkeys(figures.throughput_flops_per_s, whole),
        sustained_share=Figure(1.0, "E", "mains power and a fan are assumed"),
        overhead_us=Figure(figures.overhead_us, "M", source),
    )
    return DeviceProfile(
        name=HOST,
        title=f"{described['title']}: {key.cpu}",
        os=f"{platform.system()} {platform.release()}",
        execution_providers=tuple(described["execution_providers"]),
        units={"cpu": cpu},
        memory_bytes_per_s=Figure(figures.memory_bytes_per_s, "M", source),
        activation_bytes_per_s=Figure(figures.activation_bytes_per_s, "M", source),
        ram_bytes=Figure(ram, "M", "the operating system, cut by a container's limit"),
        app_memory_limit_bytes=Figure(ram * _APP_SHARE, "E", "derived: three quarters of the RAM"),
    )


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


def cached_figures(path: Path) -> HostFigures | None:
    """The figures in the cache; None where there are none, or where the file is damaged: measuring again mends it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["figures"]
        figures = HostFigures(**values)
        numbers = [figures.memory_bytes_per_s, figures.activation_bytes_per_s, figures.overhead_us]
        numbers += [figures.throughput_flops_per_s[precision] for precision in _PRECISIONS]
        return figures if all(math.isfinite(number) and number > 0 for number in numbers) else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write_cache(path: Path, key: HostKey, figures: HostFigures) -> None:
    """Written aside and renamed. Without a cache folder to write to, the figures just hold for this process."""
    text = json.dumps({"key": dataclasses.asdict(key), "figures": dataclasses.asdict(figures)}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
            file.write(text)
        os.replace(file.name, path)
