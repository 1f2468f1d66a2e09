"""The one door to coremltools: says what to install where it is missing, and keeps it quiet."""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from kind_edge.errors import UsageError


def require_coremltools() -> ModuleType:
    """The module `coremltools`, imported now and without its advice; `UsageError` says what to install."""
    try:
        with quiet():
            importlib.import_module("coremltools.optimize.coreml")
            return importlib.import_module("coremltools")
    except ImportError as error:
        raise UsageError(
            f"--formats coreml needs coremltools ({error}): {sys.executable} -m pip install 'kind-edge[coreml]'"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """coremltools shows progress bars and advises on versions; nobody here can act on that."""
    loggers = [logging.getLogger(name) for name in ("coremltools", "torch.export")]
    levels = [logger.level for logger in loggers]
    disabled = logging.root.manager.disable
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _no_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without tqdm's bars, which would break into our own progress."""
    from tqdm import tqdm

    before = tqdm.__init__

    def silent(self: Any, *args: Any, **options: Any) -> None:
        before(self, *args, **{**options, "disable": True})

    tqdm.__init__ = silent
    try:
        yield
    finally:
        tqdm.__init__ = before
