"""kind-edge.js under Node: the pictures of the Python runtime, class packs, and errors in words."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kind_edge.deploy.noise import gaussian_noise
from kind_edge.deploy.packs_bundle import change_bundle
from kind_edge.deploy.pipeline import export
from kind_edge.deploy.runtime import load_bundle
from kind_edge.deploy.web import PAGE

pytestmark = pytest.mark.slow
TEMPLATES = Path(__file__).resolve().parents[2] / "kind_edge" / "deploy" / "templates" / "web"
SCRIPT = """
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { gaussianNoise, load } from "./kind-edge.js";
const { packages, bundle, calls } = JSON.parse(readFileSync(0, "utf8"));
const ort = createRequire(packages + "/here.js")("onnxruntime-node");
const answers = [];
for (const { model, className, options, packs = [] } of calls) {
  try {
    const added = packs.map((path) => new Uint8Array(readFileSync(path)));
    const opened = await load(bundle, { ort, model, threads: 1, packs: added });
    let steps = 0;
    const pictures = await opened.generate(className, { ...options, onStep: () => steps++ });
    await opened.release();
    answers.push({ classes: opened.classes, steps, values: pictures.map((picture) => Array.from(picture.values)) });
  } catch (error) {
    answers.push({ error: `${error.name}: ${error.message}` });
  }
}
console.log(JSON.stringify(answers));
"""


@pytest.fixture(scope="module")
def bundle(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided bundle of three classes in fp32, with packs."""
    output = tmp_path_factory.mktemp("javascript") / "b"
    choices: dict[str, Any] = {"classes": ["shirt", "bag", "coat"], "precision": "fp32", "max_flops": "60%"}
    export(tiny_folder, profile="raspberry-pi-5", formats=["packs"], output=output, **choices)
    return output


@pytest.fixture(scope="module")
def run(node_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Calls of `generate` in one Node process."""
    folder = tmp_path_factory.mktemp("script")
    for name in PAGE:
        shutil.copy(TEMPLATES / name, folder)
    (folder / "calls.mjs").write_text(SCRIPT)

    def answer(bundle: Path, *calls: dict[str, Any]) -> list[dict[str, Any]]:
        asked = json.dumps({"packages": str(node_folder), "bundle": str(bundle), "calls": calls})
        command = ["node", str(folder / "calls.mjs")]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    return answer


def python(bundle: Path, name: str, seed: int, n: int) -> np.ndarray:
    loaded = load_bundle(bundle, "fp32", threads=1)
    noise = gaussian_noise(seed, 0, n, loaded.noise_shape)
    return loaded.sample_float(noise, np.full(n, loaded.classes.index(name))).reshape(n, -1)


def test_draws_what_python_draws(bundle: Path, run: Any) -> None:
    """Guided: class and null are a batch of two, and the null class follows the last one."""
    (found,) = run(bundle, {"className": "bag", "options": {"n": 3, "seed": str(2**63 + 5)}})
    rows = len(load_bundle(bundle).manifest.sampler.tables)
    assert found["classes"] == ["shirt", "bag", "coat"]
    assert found["steps"] == 3 * rows
    np.testing.assert_allclose(np.array(found["values"]), python(bundle, "bag", 2**63 + 5, 3), atol=2e-5)


def test_takes_packs(bundle: Path, run: Any, tmp_path: Path) -> None:
    small = shutil.copytree(bundle, tmp_path / "small")
    change_bundle(small, remove=["bag"])
    pack = str(bundle / "packs" / "bag.safetensors")
    (tmp_path / "bad").write_bytes(bytearray((bundle / "packs" / "bag.safetensors").read_bytes())[:-100] + bytes(100))
    found, twice, bad = run(
        small,
        {"className": "bag", "options": {"seed": 4}, "packs": [pack]},
        {"className": "bag", "packs": [pack, pack]},
        {"className": "bag", "packs": [str(tmp_path / "bad")]},
    )
    assert found["classes"] == ["shirt", "coat", "bag"]
    np.testing.assert_allclose(np.array(found["values"]), python(bundle, "bag", 4, 1), atol=2e-5)
    assert twice["error"] == "KindEdgeError: bag is there already"
    assert "not a class pack, or a damaged one" in bad["error"]


def test_refuses_in_words(bundle: Path, run: Any, tmp_path: Path) -> None:
    damaged = shutil.copytree(bundle, tmp_path / "damaged")
    model = damaged / "onnx" / "denoiser.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    asked: list[dict[str, Any]] = [
        {"className": "boot"},
        {"className": "bag", "options": {"seed": "-1"}},
        {"className": "bag", "options": {"n": 0}},
        {"className": "bag", "model": "int7"},
    ]
    said = [each["error"] for each in run(bundle, *asked)]
    wanted = ("unknown class boot; this bundle draws: shirt, bag, coat", "seed: got -1", "n: got 0", "no model int7")
    for text, part in zip(said, wanted, strict=True):
        assert part in text
    (found,) = run(damaged, {"className": "bag"})
    assert "onnx/denoiser.onnx is damaged" in found["error"]
    (found,) = run(tmp_path / "none", {"className": "bag"})
    assert "cannot read manifest.json" in found["error"]
