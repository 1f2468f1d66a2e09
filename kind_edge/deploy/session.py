"""Opening a model file in ONNX Runtime, on the unit that was asked for and on no other. Needs onnxruntime alone."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from kind_edge.deploy.ort import require_onnxruntime, runtime_errors
from kind_edge.deploy.providers import PROVIDERS, plugin_device, plugin_options, resolve_provider
from kind_edge.errors import InputError, UsageError

__all__ = ["open_session", "return_freed_blocks", "runtime_errors"]

_NOT_STARTED = "Error creating execution provider"
"""What ONNX Runtime says of a plug-in that finds nothing to run on."""

_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES = -3, 128 * 1024
"""glibc's mallopt parameter, and the value with which it starts: larger blocks are mappings of their own."""


def open_session(
    path: Path | str, threads: int | None = None, provider: str = "cpu", profile_prefix: str | None = None
) -> Any:
    """An `onnxruntime.InferenceSession` of a `.onnx` or `.ort` file.

    `threads` None leaves the number to ONNX Runtime (one per physical core). Idle threads sleep instead of spinning:
    on shared cores spinning slows everything down, our own timings included. With `profile_prefix` the session records
    what runs where. WebGPU gets the nodes that it takes (see `webgpu`), for which onnx is needed. Raises `InputError`
    for a file that is not a model, `UsageError` if the provider cannot start.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads: got {threads}, want at least 1")
    if threads is not None and threads > 4 * (os.cpu_count() or 1):
        raise UsageError(f"threads: got {threads}, but this machine has {os.cpu_count()} cores; take at most four each")
    runtime = require_onnxruntime()
    name = resolve_provider(provider)
    if not Path(path).is_file():
        raise InputError(f"{path}: no such model file")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors only: they come to us as exceptions, the rest is no news to a user
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile_prefix
    device = plugin_device(name)
    if device is not None:
        options.add_provider_for_devices([device], plugin_options(name))
    model = _for_webgpu(path) if name == PROVIDERS["webgpu"] else str(path)
    refusals: tuple[type[Exception], ...] = (RuntimeError, *runtime_errors(runtime))  # plug-ins raise the plain one
    chosen: dict[str, Any] = {"providers": [name]} if device is None else {"enable_fallback": 0}
    try:
        session = runtime.InferenceSession(model, options, **chosen)
    except refusals as error:
        if _NOT_STARTED in str(error):
            why = str(error).strip().rsplit(" was false. ", 1)[-1]
            raise UsageError(
                f"provider {provider!r} cannot start here: {why}; check its driver and libraries"
            ) from error
        raise InputError(f"{path}: ONNX Runtime cannot load it: {error}") from error
    if name not in session.get_providers():
        raise UsageError(
            f"provider {provider!r} could not start, ONNX Runtime fell back to {', '.join(session.get_providers())}; "
            "check its driver and libraries, or name that provider"
        )
    return session


def _for_webgpu(path: Path | str) -> str | bytes:
    """The file with the nodes that WebGPU takes; an `.ort` file, which cannot be rewritten, as it is."""
    if not str(path).endswith(".onnx"):
        return str(path)
    if importlib.util.find_spec("onnx") is None:
        raise UsageError("provider 'webgpu' takes other nodes than the CPU, for which onnx is needed: pip install onnx")
    from kind_edge.deploy.graph_facts import load_graph
    from kind_edge.deploy.webgpu import for_webgpu

    return bytes(for_webgpu(load_graph(Path(path))).SerializeToString())


def return_freed_blocks() -> None:
    """Let glibc give large freed blocks back to the system at once, in this whole process and from now on.

    While a session is made, weights are packed for the kernels and the file's copies freed. By default glibc soon takes
    blocks of their size from its heap, where what is freed stays, or not, by chance: up to a whole copy of the weights.
    Only for processes of our own: in somebody's server it is not for a library to say how memory is kept.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and bionic have none, nor the need
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
