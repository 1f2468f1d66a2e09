"""The command line as a function, and real things to call it with: a tiny checkpoint and a small bundle."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kind_edge.cli import main


@dataclass(frozen=True)
class Answer:
    """What one command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Exactly one JSON object is on stdout, or this fails."""
        assert self.code == 0, self.err
        values = json.loads(self.out)
        assert isinstance(values, dict)
        return values


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run a command in this process."""

    def run(*arguments: object) -> Answer:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


def deploy_fixtures() -> ModuleType:
    """The hand-made models and manifest of tests/deploy."""
    path = Path(__file__).parents[1] / "deploy" / "conftest.py"
    spec = importlib.util.spec_from_file_location("deploy_fixtures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of hand-made ONNX models: classes sneaker and bag."""
    from kind_edge.deploy.bundle import write_manifest, writing_bundle

    made = deploy_fixtures()
    place = tmp_path_factory.mktemp("bundle") / "out"
    with writing_bundle(place) as folder:
        made.save_denoiser(folder / "onnx/denoiser.onnx", quantized=False)
        made.save_denoiser(folder / "onnx/denoiser.int8.onnx", quantized=True)
        made.save_sampler(folder / "onnx/sampler.onnx")
        write_manifest(folder, made.manifest_values())
    return place


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model of the smallest preset."""
    from kind_edge.model.checkpoint import Checkpoint, save_checkpoint
    from kind_edge.model.dit import DiT, initialise
    from kind_edge.training.config import preset
    from kind_edge.training.data import CLASS_NAMES

    spec = preset("smoke").spec
    place = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_checkpoint(place, Checkpoint(spec, CLASS_NAMES, initialise(DiT(spec), 0).state_dict(), {"seed": 0}))
    return place
