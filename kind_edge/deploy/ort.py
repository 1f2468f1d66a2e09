"""The one door to ONNX Runtime: says what to install where it is missing, and refuses two copies of it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

from kind_edge.errors import UsageError

DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
"""All unpack into the same folder `onnxruntime/`: with two installed, the one unpacked last decides what runs."""


def require_onnxruntime() -> ModuleType:
    """The module `onnxruntime`, imported now.

    Raises UsageError, with the pip command that mends it, if no distribution of it is installed, or two are.
    """
    pip = f"{sys.executable} -m pip"
    installed = [name for name in DISTRIBUTIONS if _is_installed(name)]
    if len(installed) > 1:
        raise UsageError(
            f"{' and '.join(installed)} are installed together and overwrite one another's files; keep one: "
            f"{pip} uninstall -y {' '.join(installed)} && {pip} install onnxruntime   (or onnxruntime-gpu)"
        )
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        if installed:
            raise UsageError(
                f"{installed[0]} is installed but cannot be imported ({error}); put it in again: "
                f"{pip} install --force-reinstall --no-deps {installed[0]}"
            ) from error
        raise UsageError(
            f"ONNX Runtime is not installed; one of the two is needed: "
            f"{pip} install onnxruntime   (or onnxruntime-gpu for NVIDIA GPUs)"
        ) from error


def runtime_errors(runtime: ModuleType) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions have no common base of their own."""
    state = runtime.capi.onnxruntime_pybind11_state
    found = [value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception)]
    return (*found, ValueError)


@contextlib.contextmanager
def quiet_tools() -> Iterator[None]:
    """Around what `onnxruntime.tools` does with ORT files: it logs every file, and leaves those that it reads open."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield
    finally:
        logging.disable(disabled)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
