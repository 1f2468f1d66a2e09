"""The house rules: who may import whom, what a light import loads, what the public surface is."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kind_edge

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"kind_edge": "kind_edge", "exporters": "kind_edge.exporters", "profiles": "kind_edge.profiles"}
HEAVY = {
    "coremltools", "datasets", "diffusers", "onnx", "onnxruntime", "onnxscript", "optimum", "pyarrow", "torch",
    "transformers", "webdataset",
}  # fmt: skip

ALL_BUT_EXPORTERS = {"budget", "cli", "deploy", "model", "profiles", "registry", "training"}
FREE = {"bounded", "errors", "units", "_version"}
ARROWS = {
    "bounded": set(),
    "errors": set(),
    "units": set(),
    "_version": set(),
    "profiles": set(),
    "model": set(),
    "training": {"model"},
    "budget": {"model", "profiles"},
    "registry": {"model", "budget"},
    "deploy": {"model", "budget", "registry"},
    "exporters": {"model", "training", "budget", "deploy", "registry"},
    "cli": ALL_BUT_EXPORTERS,
    "": ALL_BUT_EXPORTERS,  # kind_edge/__init__.py
}
"""Room -> rooms it may import, besides itself and FREE."""
EXCEPTIONS = {("kind_edge.deploy.pipeline", "training"), ("kind_edge.deploy.evaluation", "training")}
EXCEPTIONS |= {("kind_edge.deploy.resizing", "training")}  # it heals, as pipeline does
EXCEPTIONS |= {
    ("kind_edge.exporters.optimum_plugin.register_kind_edge", "cli")
}  # it is another front of the command line

HEAVY_ALLOWED = {"kind_edge.budget.sensitivity": HEAVY, "kind_edge.budget.host": {"onnxruntime"}}
HEAVY_ALLOWED |= {"kind_edge.budget.onnx_writer": {"onnx"}, "kind_edge.budget.runner": {"onnxruntime"}}
"""In `budget`, who may import what of HEAVY."""
MAX_LINES = 400


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = [FOLDERS[relative.parts[0]], *relative.parts[1:]]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sources(*FOLDERS) if "templates" not in path.parts}


def imports_of(path: Path) -> Iterator[str]:
    """Every module that `path` imports at any depth; `from a import b` counts as a.b where that is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            package = node.module or ""
            for alias in node.names:
                inner = f"{package}.{alias.name}"
                yield inner if inner in MODULES or inner in FOLDERS.values() else package


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_imports_follow_the_arrows() -> None:
    broken = []
    for module, path in MODULES.items():
        room = room_of(module)
        assert room in ARROWS, f"{path.relative_to(ROOT)}: a new room; say in ARROWS whom it may import"
        for target in imports_of(path):
            if target.split(".")[0] != "kind_edge" or target == "kind_edge":
                continue
            goal = room_of(target)
            if goal not in {room, *FREE, *ARROWS[room]} and (module, goal) not in EXCEPTIONS:
                broken.append(f"{module} -> {target}")
    assert broken == []


def test_only_the_registry_names_exporters() -> None:
    naming = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and str(node.value).startswith("kind_edge.exporters")
    }
    assert {module for module in naming if room_of(module) != "exporters"} <= {"kind_edge.registry"}


def test_budget_needs_torch_in_sensitivity_alone() -> None:
    for module, path in MODULES.items():
        if room_of(module) == "budget":
            heavy = {name.split(".")[0] for name in imports_of(path)} & HEAVY
            assert heavy <= HEAVY_ALLOWED.get(module, set()), module


def test_the_runtime_needs_numpy_and_onnxruntime_alone() -> None:
    tops = {name.split(".")[0] for name in imports_of(MODULES["kind_edge.deploy.runtime"])}
    assert tops - sys.stdlib_module_names <= {"kind_edge", "numpy", "onnxruntime"}


def loaded_by(code: str) -> set[str]:
    """Top-level names of what a fresh interpreter has loaded after `code`, which may print and may exit."""
    script = f"""
import json, sys
try:
    {code}
except SystemExit:
    pass
print("\\n" + json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


LIGHT_BUDGET = [m for m in MODULES if room_of(m) == "budget" and m not in HEAVY_ALLOWED]


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import kind_edge", HEAVY | {"numpy"}),
        ("import kind_edge.model.spec, kind_edge.registry, kind_edge.profiles", HEAVY),
        (f"import {', '.join(LIGHT_BUDGET)}", HEAVY),
        (
            "import kind_edge.deploy.runtime, kind_edge.deploy.noise, kind_edge.deploy.bundle",
            (HEAVY - {"onnxruntime"}) | {"PIL", "rich", "safetensors", "scipy", "typer"},
        ),
        (
            "import runpy; sys.argv = ['kind-edge', '--help']; runpy.run_module('kind_edge.cli', run_name='__main__')",
            HEAVY,
        ),
    ],
    ids=["package", "spec", "budget", "runtime", "help"],
)
def test_a_light_import_stays_light(code: str, forbidden: set[str]) -> None:
    assert loaded_by(code) & forbidden == set()


def test_help_takes_half_a_second_of_cpu_time() -> None:
    def cpu_time_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times_s = []
    for _ in range(3):
        before = cpu_time_s()
        subprocess.run([sys.executable, "-m", "kind_edge.cli", "--help"], cwd=ROOT, capture_output=True, check=True)
        times_s.append(cpu_time_s() - before)
    assert min(times_s) < 0.5


def test_the_public_surface() -> None:
    assert sorted(kind_edge.__all__) == ["__version__", "export", "export_many", "load_bundle", "plan"]
    assert all(callable(getattr(kind_edge, name)) for name in ("export", "export_many", "load_bundle", "plan"))
    assert kind_edge.__version__ == importlib.metadata.version("kind-edge")


def test_files_stay_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*FOLDERS, "tests", "scripts")}
    assert {str(path): count for path, count in lines.items() if count > MAX_LINES} == {}


def test_exporters_from_the_root_is_refused() -> None:
    command = [sys.executable, "-c", "import exporters"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "import kind_edge.exporters instead" in done.stderr
