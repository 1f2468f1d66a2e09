"""An environment for every engine that is not among our own dependencies: made once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from kind_edge.errors import GateError
from peers.models import cache

TORCH = "torch==2.13.0"
"""Pinned everywhere: an open range would take a build with several GB of CUDA packages."""

PINS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "openvino": ("openvino==2026.4.1", "nncf==3.4.0"),
    "litert": (TORCH, "litert-torch==0.10.0", "ai-edge-litert==2.3.0"),
    "executorch": (TORCH, "executorch==1.5.1"),
})  # fmt: skip
"""PyTorch and ONNX Runtime are our own dependencies, pinned in constraints.txt, and run from our environment."""

WORKERS = Path(__file__).parent / "workers"


class CannotInstall(GateError):
    """pip could not make an engine's environment here; the row is left out, and the document says so."""


@dataclass(frozen=True)
class Peer:
    """One engine at one precision: which worker, in which environment (None: ours)."""

    engine: str
    precision: str
    worker: str
    environment: str | None = None

    @property
    def name(self) -> str:
        return f"{self.engine} {self.precision}"

    @property
    def int8(self) -> bool:
        return self.precision == "int8"


PEERS = (
    Peer("torch", "eager", "in_torch"),
    Peer("torch", "compiled", "in_torch"),
    Peer("onnxruntime", "fp32", "in_onnxruntime"),
    Peer("onnxruntime", "int8", "in_onnxruntime"),
    Peer("openvino", "fp32", "in_openvino", "openvino"),
    Peer("openvino", "int8", "in_openvino", "openvino"),
    Peer("litert", "int8", "in_litert", "litert"),
    Peer("executorch", "fp32", "in_executorch", "executorch"),
    Peer("executorch", "int8", "in_executorch", "executorch"),
)

LARGE_PEERS = tuple(peer for peer in PEERS if peer.engine != "executorch")
"""At the shape of DiT-B/2. Converting takes ExecuTorch far longer than the others, already at the small one."""


def command(worker: str, environment: str | None) -> list[str]:
    """What starts a worker in its environment, which is made first where it is missing."""
    python = sys.executable if environment is None else str(python_of(environment))
    return [python, str(WORKERS / f"{worker}.py")]


def python_of(name: str) -> Path:
    """The environment's interpreter. Raises `CannotInstall`."""
    folder = cache() / "envs" / name
    key = hashlib.sha256(repr((PINS[name], sys.version_info[:2])).encode()).hexdigest()
    python, stamp = folder / "bin" / "python", folder / ".ready"
    if stamp.is_file() and stamp.read_text().strip() == key:
        return python
    print(f"peers: setting up {folder} from {', '.join(PINS[name])}, once", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)], name)
    _install(python, name)
    stamp.write_text(key + "\n")
    return python


def _install(python: Path, name: str) -> None:
    """PyTorch first, its CPU build where pip's sources have one; what comes after is then content with it."""
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-qq"]
    pins = list(PINS[name])
    if TORCH in pins:
        pins.remove(TORCH)
        builds = [f"{TORCH}+cpu", TORCH] if platform.system() == "Linux" else [TORCH]
        for build in builds:
            if subprocess.run([*pip, build], stdout=sys.stderr, check=False).returncode == 0:
                break
        pins.append(TORCH)
    _run([*pip, *pins], name)


def _run(told: list[str], name: str) -> None:
    done = subprocess.run(told, stdout=sys.stderr, check=False)
    if done.returncode:
        raise CannotInstall(f"the environment of {name} could not be made: {' '.join(told)} failed; see above")
