"""ONNX Runtime's execution providers: by which name, in which package, and what they cannot run."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import Any

from kind_edge.deploy.ort import require_onnxruntime, runtime_errors
from kind_edge.errors import UsageError, unknown

CPU = "CPUExecutionProvider"
PROVIDERS: Mapping[str, str] = MappingProxyType({
    "cpu": CPU,
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
})  # fmt: skip
"""Short names of ONNX Runtime's execution providers; the long names are understood as well."""

CONTROL_FLOW = frozenset({"cpu", "cuda", "tensorrt"})
"""Providers that run ONNX's Loop. The others take single nodes of its body at best, and the state goes back and forth
in every step; OpenVINO's takes the Loop, but cannot load one whose body reads weights of the outer graph, as ours."""

PLUGINS: Mapping[str, str] = MappingProxyType({
    "openvino": "onnxruntime_ep_openvino",
    "qnn": "onnxruntime_qnn",
    "webgpu": "onnxruntime_ep_webgpu",
})  # fmt: skip
"""Packages beside onnxruntime that bring a provider as a library, to be registered by its path."""

_FOUND_IN: Mapping[str, str] = MappingProxyType({
    "cuda": "pip's onnxruntime-gpu",
    "tensorrt": "pip's onnxruntime-gpu, with TensorRT installed",
    "coreml": "pip's onnxruntime for macOS",
    "directml": "pip's onnxruntime-directml for Windows",
    "nnapi": "Maven's onnxruntime-android: it runs on the phone itself",
    "openvino": "pip's onnxruntime-openvino, or onnxruntime-ep-openvino beside onnxruntime on Intel hardware",
    "qnn": "pip's onnxruntime-qnn beside onnxruntime",
    "webgpu": "pip's onnxruntime-ep-webgpu beside onnxruntime",
    "xnnpack": "Maven's onnxruntime-android, CocoaPods' onnxruntime-c, and builds with --use_xnnpack",
})  # fmt: skip

_SIMULATED_NPU: Mapping[str, str] = MappingProxyType({"soc_model": "57", "htp_arch": "75"})
"""The Snapdragon 8 Gen 3; without a model the simulator takes a small old one, which has no floating point."""

_REAL_DEVICE: Mapping[str, str] = MappingProxyType({"qnn": "NPU", "webgpu": "GPU"})
"""What a plug-in runs on, if it is no simulation."""

_DEVICE_TYPES = ("NPU", "GPU", "CPU")
"""Of a plug-in's devices the first of these is taken."""


def short_name(provider: str) -> str:
    """ "qnn" for "QNN", "qnn" or "QNNExecutionProvider"; a long name without a short one stays as it is."""
    lowered = provider if provider.endswith("ExecutionProvider") else provider.lower()
    return {long: key for key, long in PROVIDERS.items()}.get(provider, lowered)


def resolve_provider(provider: str) -> str:
    """ONNX Runtime's name of a provider; `UsageError` if it is unknown or not in the installed onnxruntime."""
    name = PROVIDERS.get(provider.lower(), provider)
    if provider.lower() not in PROVIDERS and not provider.endswith("ExecutionProvider"):
        raise unknown("provider", provider, PROVIDERS)
    runtime = require_onnxruntime()
    if name not in runtime.get_available_providers() and not _find_plugin(runtime, name):
        listed = ", ".join(short_name(other) for other in runtime.get_available_providers())
        where = _FOUND_IN.get(short_name(name))
        hint = f"; it is in {where}" if where else ""
        raise UsageError(f"provider {provider!r} is not in the installed onnxruntime; available here: {listed}{hint}")
    return name


def plugin_device(name: str) -> Any | None:
    """What a registered plug-in of that (long) name runs on; None for a provider that is built in."""
    runtime = require_onnxruntime()
    if short_name(name) not in PLUGINS or not hasattr(runtime, "get_ep_devices"):
        return None
    kinds = {device.device.type.name: device for device in runtime.get_ep_devices() if device.ep_name == name}
    return next((kinds[kind] for kind in _DEVICE_TYPES if kind in kinds), None)


def plugin_options(name: str) -> dict[str, str]:
    """What a registered plug-in of that (long) name has to be told.

    QNN's: which of its libraries is the NPU's, and where there is none (`is_simulated`), which one to simulate.
    """
    if short_name(name) != "qnn":
        return {}
    backend = {"backend_path": str(importlib.import_module(PLUGINS["qnn"]).get_qnn_htp_path())}
    return {**backend, **_SIMULATED_NPU} if is_simulated(name) else backend


def is_simulated(name: str) -> bool:
    """Whether a provider's (long) name is a simulation here: what it takes and computes is true, its times are not.

    QNN's package for PCs has a simulator of Qualcomm's NPUs; WebGPU runs on a Vulkan driver in software where there is
    no GPU, and only if it is told that it may (`ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1`).
    """
    device, real = plugin_device(name), _REAL_DEVICE.get(short_name(name))
    return device is not None and real is not None and device.device.type.name != real


def _find_plugin(runtime: ModuleType, name: str) -> bool:
    """Make a provider known that an installed plug-in package brings; False if there is no such package."""
    package = PLUGINS.get(short_name(name))
    if package is None or importlib.util.find_spec(package) is None:
        return False
    refusals: tuple[type[Exception], ...] = (ImportError, OSError, *runtime_errors(runtime))
    try:
        if plugin_device(name) is None:
            runtime.register_execution_provider_library(name, importlib.import_module(package).get_library_path())
    except refusals as error:
        raise UsageError(
            f"provider {short_name(name)!r}: the library of {package} cannot be loaded: {error}"
        ) from error
    if plugin_device(name) is None:
        raise UsageError(
            f"provider {short_name(name)!r}: {package} is installed, but finds no device here that it can use"
        )
    return True
