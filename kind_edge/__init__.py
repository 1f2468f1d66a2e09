"""kind-edge: train one decomposable diffusion transformer, then cut it to any device and any classes, with proof.

Importing this package loads neither torch nor onnx; the functions below do, when they are called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kind_edge._version import __version__

if TYPE_CHECKING:
    from kind_edge.deploy.fleet import export_many
    from kind_edge.deploy.pipeline import export, plan
    from kind_edge.deploy.runtime import load_bundle

__all__ = ["__version__", "export", "export_many", "load_bundle", "plan"]

_HOMES = {"plan": "pipeline", "export": "pipeline", "export_many": "fleet", "load_bundle": "runtime"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"kind_edge.deploy.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
