"""What may be gone on with: the same run alone, told before the data are touched; and a job that was killed, always."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kind_edge.cli import main
from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import load_checkpoint, read_metadata, read_tensors, write_tensors
from kind_edge.training.config import TrainConfig
from kind_edge.training.nested import nested_config
from kind_edge.training.state import STATE
from kind_edge.training.train import train

MAP, REVERSED = 'pet = ["cat", "dog"]\nfish = ["eel"]\n', 'fish = ["eel"]\npet = ["cat", "dog"]\n'


@pytest.fixture(autouse=True)
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kind-edge" / "prepared"


@pytest.fixture
def config(make_config: Callable[..., Any]) -> TrainConfig:
    """Four steps and, of two in the second stage, warm-up and images that nobody wrote."""
    made: TrainConfig = make_config(2)
    return dataclasses.replace(made, nested_share=0.5)


@pytest.fixture
def begun(config: TrainConfig, make_folder: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`begun(**changes)`: train in the folder `run`, or go on there; by default with the same choices."""
    root, names = make_folder(cat=4, dog=4, eel=4), tmp_path / "map.toml"
    names.write_text(MAP)

    def run(config: TrainConfig = config, **changes: Any) -> Path:
        return train(config, tmp_path / "run", **{"data": root, "class_map": names, "device": "cpu", **changes})

    run()
    return run


def test_other_data_are_refused_and_nothing_is_touched(
    begun: Callable[..., Path], make_png: Callable[..., bytes], tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    (tmp_path / "reversed.toml").write_text(REVERSED)
    with pytest.raises(UsageError, match=r"class_names\[0\] was 'pet', now 'fish'; data_sha256 was '\w+', now '\w+'; "):
        begun(class_map=tmp_path / "reversed.toml", resume=True)
    (tmp_path / "images/cat/new.png").write_bytes(make_png(77))
    with pytest.raises(UsageError, match=r"was started otherwise: data_sha256 was '\w+', now '\w+'; give what it was"):
        begun(resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "images/cat/new.png").unlink()
    begun(resume=True)
    assert load_checkpoint(tmp_path / "run").class_names == ("pet", "fish")


def test_a_state_of_before_data_were_noted_goes_on_with_a_warning(
    begun: Callable[..., Path], config: TrainConfig, tmp_path: Path
) -> None:
    state, said = tmp_path / "run" / STATE, list[str]()
    metadata = {key: value for key, value in read_metadata(state).items() if key != "stage"}
    stage = nested_config(config)
    assert stage is not None
    metadata["config"] = json.dumps(stage.to_dict())  # not the run's, and without choices
    write_tensors(state, read_tensors(state), metadata)
    begun(resume=True, on_note=said.append)
    assert [line for line in said if line.startswith("warning: ")] == [said[0]]
    assert "did not note its data" in said[0]


def test_what_the_file_tells_is_refused_before_the_data_are_opened(
    begun: Callable[..., Path], config: TrainConfig, tmp_path: Path
) -> None:
    def refusal(kind: type[Exception], changed: TrainConfig = config, **choices: Any) -> str:
        with pytest.raises(kind) as caught:
            begun(changed, data=tmp_path / "nowhere", resume=True, **choices)  # opening that would be another refusal
        return str(caught.value)

    # The second stage is in the file; what differs is named as it was written.
    longer = dataclasses.replace(config, images=240, learning_rate=0.5)
    assert "images was 24, now 240; learning_rate was 0.0015, now 0.5; give" in refusal(UsageError, longer)
    wider = dataclasses.replace(config, spec=dataclasses.replace(config.spec, width=32))
    assert "model.width was 16, now 32" in refusal(UsageError, wider)
    state = tmp_path / "run" / STATE
    state.write_bytes(state.read_bytes()[:-100])
    assert "truncated or corrupt" in refusal(InputError)
    state.unlink()
    assert "holds no run to continue, but other files; choose another -o" in refusal(UsageError)
    with pytest.raises(InputError, match="nowhere"):
        train(config, tmp_path / "new", data=tmp_path / "nowhere", device="cpu", resume=True)
    assert not (tmp_path / "new").exists()


def test_a_job_that_is_killed_before_its_first_save_begins_anew(
    make_config: Callable[..., Any],
    make_folder: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A script that starts its job again after a kill always says --resume."""
    spec = make_config(2).spec.to_dict()
    model = "".join(f"{key} = {spec[key]}\n" for key in ("image_size", "channels", "patch_size", "width", "depth"))
    model += "heads = 2\nnum_classes = 2\nlearngene_rank = 4\ntailor_rank = 2\n"
    common = f'dataset = "files"\nbatch_size = 6\nwarmup_steps = 1\nnested_share = 0.0\n{{}}\n[model]\n{model}'
    (tmp_path / "run.toml").write_text(common.format("images = 60_000_000"))
    command = ["train", "--config", tmp_path / "run.toml", "--data", make_folder(cat=4, dog=4), "--device", "cpu"]
    command = [str(argument) for argument in (*command, "-o", tmp_path / "out", "--resume")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "kind_edge.cli", *command], stderr=subprocess.PIPE, text=True, env=environment
    ) as job:
        assert job.stderr is not None
        said = [next(job.stderr)]
        while not said[-1].startswith("step 1 of"):
            said.append(next(job.stderr))
        job.kill()
    assert f"nothing has been saved in {tmp_path / 'out'} yet; the run begins" in said[0]
    assert not list((tmp_path / "out").iterdir())
    left = tmp_path / "out" / f"{STATE}.01234567.partial"
    left.write_bytes(b"cut short")  # had it been killed within the first save
    (tmp_path / "run.toml").write_text(common.format("images = 12"))
    assert main(command) == 0, capsys.readouterr().err
    assert load_checkpoint(tmp_path / "out").provenance["images_seen"] == 12
    assert not left.exists()
    assert main([*command[:-1]]) == 2
    assert "add --resume to go on with the run in it" in capsys.readouterr().err
