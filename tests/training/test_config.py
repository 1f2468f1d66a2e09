"""A training run's configuration: presets, TOML, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kind_edge.errors import InputError, UsageError
from kind_edge.training.config import PRESETS, TrainConfig, preset, read_config

MODEL = """
[model]
image_size = 28
channels = 1
patch_size = 7
width = 32
depth = 2
heads = 2
num_classes = 10
learngene_rank = 12
tailor_rank = 2
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_comes_back_from_its_dict(name: str) -> None:
    config = preset(name)
    assert TrainConfig.from_dict(config.to_dict(), "here") == config
    assert config.steps == config.images // config.batch_size


def test_a_file_overrides_the_defaults(tmp_path: Path) -> None:
    config = read_config(written(tmp_path, "images = 4800\nbatch_size = 40\nlearning_rate = 1\nseed = 7\n" + MODEL))
    assert (config.steps, config.learning_rate, config.seed) == (120, 1, 7)
    assert (config.spec.width, config.spec.objective, config.ema_decay) == (32, "flow", 0.9995)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("imagse = 5\n" + MODEL, ("imagse", "images")),
        ("images = '5'\n" + MODEL, ("images", "'5'", "int")),
        ("images = 5.5\n" + MODEL, ("images", "5.5")),
        ("images = true\n" + MODEL, ("images", "True")),
        ("images = 0\n" + MODEL, ("images", "0")),
        ("batch_size = 0\n" + MODEL, ("batch_size", "0")),
        ("learning_rate = -1.0\n" + MODEL, ("learning_rate", "-1.0")),
        ("learning_rate = nan\n" + MODEL, ("learning_rate", "nan")),
        ("null_share = 1.5\n" + MODEL, ("null_share", "1.5")),
        ("ema_decay = 1.0\n" + MODEL, ("ema_decay", "1.0")),
        ("dataset = 'cifar'\n" + MODEL, ("dataset", "cifar", "fashion-mnist")),
        ("images = 5\n", ("missing table [model]",)),
        ("model = 3\n", ("missing table [model]",)),
        (MODEL + "wdith = 3\n", ("[model]", "wdith", "width")),
        (MODEL.replace("heads = 2\n", ""), ("missing heads",)),
        (MODEL.replace("learngene_rank = 12", "learngene_rank = 33"), ("learngene_rank", "33", "at most 32")),
        ("images = \n", ("cannot read",)),
    ],
)
def test_mistakes_are_named(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        read_config(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_no_file_and_no_preset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: cannot read .*: No such file or directory$"):
        read_config(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read"):
        read_config(tmp_path / "bytes.toml")
    with pytest.raises(UsageError, match=r"did you mean: .*fashion-mnist"):
        preset("fashion-mnits")


def test_training_takes_no_model_that_only_training_makes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.toml \[model\]: step_counts: .* kind-edge distill"):
        read_config(written(tmp_path, MODEL + "step_counts = [1, 4]\ninside_guidance = 1.5\n"))
    with pytest.raises(InputError, match=r"run\.toml \[model\]: nested: .* set nested_share instead"):
        read_config(written(tmp_path, MODEL + "nested = true\n"))
