"""The Kotlin of a bundle, by Kotlin's own compiler against ONNX Runtime's signatures, draws what the tables say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kind_edge.deploy.manifest import read_manifest
from kind_edge.deploy.noise import gaussian_noise

STAND_IN = Path(__file__).resolve().parents[1] / "android"
USE = Path("lib/kotlin-stdlib-jdk7.jar")
"""Kotlin's `use` of an AutoCloseable; since 1.8 it is in the standard library itself."""


def tool(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not on this machine: generated Kotlin is not compiled")
    return Path(found).resolve()


@pytest.mark.slow
def test_it_compiles_and_draws(packaged: Path, tmp_path: Path) -> None:
    """Against a session that computes x / 2 + class / 4 + step / 8 in the place of the network."""
    kotlinc, javac, java = map(tool, ("kotlinc", "javac", "java"))

    def run(*command: object) -> str:
        words = list(map(str, command))
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    library = kotlinc.parents[1] / USE
    path = f"stand-in:{library}" if library.exists() else "stand-in"
    run(javac, "-d", "stand-in", *sorted(STAND_IN.rglob("*.java")))
    sources = (packaged / "android" / "KindEdge.kt", STAND_IN / "Main.kt")
    run(kotlinc, "-cp", path, "-include-runtime", "-d", "app.jar", *sources)
    told, *values = run(java, "-cp", f"app.jar:{path}", "MainKt", "bag", 2**40 + 7).split()
    manifest = read_manifest(packaged)
    tables, size = manifest.sampler.tables, manifest.image
    x = gaussian_noise(2**40 + 7, 3, 1, (size.channels, size.height, size.width)).astype(np.float64).ravel()
    before, index, null = np.zeros_like(x), manifest.classes.index("bag"), manifest.sampler.null_index
    assert null is not None
    for row in range(len(tables)):
        own, empty = (x / 2 + label / 4 + row / 8 for label in (index, null))
        direction = tables.p[row] * x + tables.q[row] * (empty + manifest.sampler.guidance * (own - empty))
        x, before = tables.a[row] * x + tables.b[row] * direction + tables.c[row] * before, direction
    np.testing.assert_allclose(np.array(values, np.float64), x.clip(-1, 1), atol=1e-5)
    assert int(told) == sum(range(len(tables)))
