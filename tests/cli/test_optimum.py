"""`optimum-cli export kind-edge`, run as its users run it, from the wheel that they install."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# All that the script optimum-cli does. The wheel is what is tested: an editable install beside it would register twice.
LAUNCHER = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]
sys.path = [path for path in sys.path if "__editable__" not in path]
from optimum.commands.optimum_cli import main
main()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The wheel of this tree, unpacked where Python finds it, and Optimum's command line beside it."""
    work = tmp_path_factory.mktemp("wheel")
    check = [sys.executable, "-P", ROOT / "scripts" / "_check_wheel.py", ROOT, work]
    built = subprocess.run(check, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    environment = {**os.environ, "PYTHONPATH": str(work / "installed")}

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", LAUNCHER, *map(str, arguments)]
        return subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)

    return call


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("optimum.commands.export") is None, reason="Optimum is not installed")
def test_optimum_hands_everything_to_kind_edge(
    run: Callable[..., subprocess.CompletedProcess[str]], tiny_folder: Path, tmp_path: Path
) -> None:
    helped = run("export", "kind-edge", "--help")
    assert helped.returncode == 0, helped.stderr
    assert all(flag in helped.stdout for flag in ("--profile", "--max-memory", "--autoencoder", "--formats"))
    refused = run("export", "kind-edge", "-q", "--profile", "nope")
    assert (refused.returncode, "unknown profile" in refused.stderr) == (2, True), refused.stderr
    asked = ["--profile", "raspberry-pi-5", "--classes", "bag", "--steps=1", "--max-size", "1B", "--json"]
    planned = run("export", "kind-edge", tiny_folder, *asked, "-o", tmp_path / "out")
    assert planned.returncode == 3, planned.stderr
    assert json.loads(planned.stdout)["closest"]["classes"] == ["bag"]
    assert not (tmp_path / "out").exists()
