"""`web/`: a static folder that runs the bundle in a browser. One page, one script, the models; nothing to build."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from kind_edge.deploy.bundle import hash_files
from kind_edge.deploy.graph_facts import load_graph
from kind_edge.deploy.manifest import MANIFEST_NAME
from kind_edge.deploy.notice import NOTICE, notice
from kind_edge.deploy.packs import CORE_FILE, read_core
from kind_edge.deploy.web_runtime import CPU_FILES, GPU_FILES, RUNTIME_NOTICE, copy_runtime, fetch_runtime

if TYPE_CHECKING:
    from kind_edge.model.spec import ModelSpec

FOLDER = "web"
_FOR_TOOLS = ("kind-edge.d.ts", "package.json")
PAGE = ("index.html", "page.js", "kind-edge.js", "noise.js", "packs.js", "webgpu.js", *_FOR_TOOLS)
WORKER = "offline.js"
_KEYS = (
    "schema_version",
    "name",
    "source",
    "licence",
    "provenance",
    "classes",
    "image",
    "latent",
    "sampler",
    "packs",
    "threads",
)
"""What the script needs of the bundle's manifest."""
_ROLES = ("denoiser", "decoder")


@dataclass(frozen=True)
class WebPackager:
    """Writes `web/` from the bundle's ONNX files and the values of its manifest."""

    def check(self, spec: ModelSpec) -> None:
        """ONNX Runtime for browsers must be at hand: it is fetched here, before any work."""
        fetch_runtime()

    def write(self, folder: Path, values: Mapping[str, Any]) -> None:
        _write_page(folder / FOLDER, folder, values, _models(values))


PACKAGER = WebPackager()


def _write_page(web: Path, folder: Path, values: Mapping[str, Any], models: Mapping[str, str]) -> None:
    (web / "models").mkdir(parents=True)
    for path, place in models.items():
        shutil.copyfile(folder / path, web / place)
    nodes = _webgpu_nodes(folder, values, web, models)
    cores = _core_files(folder, models) if "packs" in values else {}
    if cores:
        (web / CORE_FILE).parent.mkdir()
        shutil.copyfile(folder / CORE_FILE, web / CORE_FILE)
    gpu = any(values["models"][path]["precision"].startswith("fp") for path in models)
    copy_runtime(web / "runtime", (*CPU_FILES, *(GPU_FILES if gpu else ())))
    (web / NOTICE).write_text(f"{notice(values)}\nruntime/\n  {RUNTIME_NOTICE}\n", encoding="utf-8")
    (web / MANIFEST_NAME).write_text(_manifest(values, models, cores, nodes, web), encoding="utf-8")
    for name in PAGE:
        (web / name).write_bytes(_template(name))
    (web / WORKER).write_text(_worker(web, models[values["default_model"]], models), encoding="utf-8")


def _models(values: Mapping[str, Any]) -> dict[str, str]:
    """Where the bundle's ONNX denoisers and decoders go, by path in the bundle."""
    wanted = [path for path, entry in values["models"].items() if entry["role"] in _ROLES and path.endswith(".onnx")]
    return {path: f"models/{PurePosixPath(path).name}" for path in wanted}


def _webgpu_nodes(folder: Path, values: Mapping[str, Any], web: Path, models: Mapping[str, str]) -> dict[str, str]:
    """Nodes of the models that a GPU can run, as WebGPU takes them, where it does not take their own: by the model's
    place, where theirs is."""
    from kind_edge.deploy.webgpu import webgpu_nodes

    written = {}
    for path, place in models.items():
        if not values["models"][path]["precision"].startswith("fp"):
            continue
        nodes = webgpu_nodes(load_graph(folder / path))
        if nodes is not None:
            written[place] = f"{place.removesuffix('.onnx')}.webgpu"
            (web / written[place]).write_bytes(nodes.SerializeToString(deterministic=True))
    return written


def _core_files(folder: Path, models: Mapping[str, str]) -> dict[str, str]:
    """The models here that take class packs: their names in the core."""
    core = read_core((folder / CORE_FILE).read_bytes(), CORE_FILE)
    return {place: path for path, place in models.items() if path in core.files}


def _manifest(
    values: Mapping[str, Any],
    models: Mapping[str, str],
    cores: Mapping[str, str],
    nodes: Mapping[str, str],
    web: Path,
) -> str:
    """The part of the bundle's manifest that the script reads, with the paths of this folder."""
    hashes = hash_files(web)
    checked = [*models.values(), *nodes.values(), *([CORE_FILE] if cores else [])]
    written = {
        **{key: values[key] for key in _KEYS if key in values},
        "models": {
            place: {**values["models"][path], **({"webgpu": nodes[place]} if place in nodes else {})}
            for path, place in models.items()
        },
        "default_model": models[values["default_model"]],
        "files": {place: {"bytes": hashes[place].size_bytes, "sha256": hashes[place].sha256} for place in checked},
        **({"core_files": dict(cores)} if cores else {}),
    }
    return json.dumps(written, indent=1) + "\n"


def _worker(web: Path, default_model: str, models: Mapping[str, str]) -> str:
    """The service worker: it keeps the page and the default model at once, and the rest when it is first used."""
    first = [MANIFEST_NAME, *(name for name in PAGE if name not in _FOR_TOOLS), default_model]
    first += [f"runtime/{name}" for name in CPU_FILES]
    first += [CORE_FILE] if (web / CORE_FILE).exists() else []
    first += [place for place in models.values() if PurePosixPath(place).name.startswith("decoder")]
    hashes = hash_files(web)
    everything = "".join(f"{name} {entry.sha256}\n" for name, entry in sorted(hashes.items()))
    version = hashlib.sha256(f"{everything}{(web / MANIFEST_NAME).read_text()}".encode()).hexdigest()[:16]
    listed = json.dumps(["./", *dict.fromkeys(first)])
    return _template(WORKER).decode().replace("{{version}}", version).replace("{{files}}", listed)


def _template(name: str) -> bytes:
    return files("kind_edge.deploy").joinpath("templates", "web", name).read_bytes()
