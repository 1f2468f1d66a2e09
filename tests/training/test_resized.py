"""Training on from a checkpoint: one of another size is healed, and its tailors still decide what is drawn."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from kind_edge.model.diffusion import add_noise
from kind_edge.model.provenance import lineage
from kind_edge.model.resize import resized, target_spec
from kind_edge.model.spec import ModelSpec
from kind_edge.training.beginning import begin_with, check_same_classes
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import DataSplit, in_memory
from kind_edge.training.heal import heal_config, same_config
from kind_edge.training.loop import run
from kind_edge.training.state import averaged_tensors, start, start_from
from kind_edge.training.train import train_stages

SPEC = ModelSpec(8, 1, 4, 24, 3, 3, 3, learngene_rank=8, tailor_rank=4)
CONFIG = TrainConfig(
    SPEC, images=24 * 150, batch_size=24, learning_rate=5e-3, warmup_steps=10, ema_decay=0.97, nested_share=0.0
)
LABELS = torch.arange(96) % 3
NAMES = ("bar", "box", "cross")


def pictures() -> torch.Tensor:
    """Three shapes [96, 1, 8, 8], each at places of its own and in noise."""
    images = torch.randint(60, (96, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    for number, (image, label) in enumerate(zip(images, LABELS.tolist(), strict=True)):
        at = 1 + number // 3 % 5
        if label == 0:
            image[0, :, at : at + 2] += 190
        elif label == 1:
            image[0, at : at + 2, :] += 190
        else:
            image[0, (torch.arange(8) + at) % 8, torch.arange(8)] += 190
            image[0, (torch.arange(8) + at + 1) % 8, torch.arange(8)] += 190
    return images.to(torch.uint8)


DATA = in_memory(pictures().numpy(), LABELS, NAMES, "0")


def after(config: TrainConfig, begin: Checkpoint | None) -> Checkpoint:
    state = start(config) if begin is None else start_from(config, begin_with(begin, config))
    run(config, state, DATA, lambda _: None, lambda _: None)
    return Checkpoint(config.spec, NAMES, averaged_tensors(config, state), {"config": config.to_dict()})


@torch.no_grad()
def decided_by_the_tailor(checkpoint: Checkpoint) -> float:
    """Of noised training images: how often their own tailor predicts best of all. A third is chance."""
    stream, model = torch.Generator().manual_seed(7), checkpoint.model()
    images = DATA.batch(torch.arange(96))
    noise, timestep = torch.randn(images.shape, generator=stream), torch.full((96,), 500.0)
    noised = (images + noise) / 2
    losses = [
        (model(noised, timestep, torch.full((96,), c)) - (noise - images)).square().mean((1, 2, 3)) for c in range(3)
    ]
    return float((torch.stack(losses).argmin(0) == LABELS).float().mean())


@pytest.fixture(scope="module")
def trained() -> Checkpoint:
    return after(CONFIG, None)


@pytest.mark.parametrize(("method", "sizes"), [("front", (2, 16)), ("bot", (4, 32))])
def test_the_tailor_still_decides_after_a_short_heal(trained: Checkpoint, method: str, sizes: tuple[int, int]) -> None:
    assert decided_by_the_tailor(trained) > 0.9
    begun = resized(trained, target_spec(SPEC, *sizes), method)
    healed = after(dataclasses.replace(heal_config(begun, steps=40), learning_rate=5e-3), begun)
    assert (healed.spec.depth, healed.spec.width) == sizes
    assert decided_by_the_tailor(healed) > 0.75


@torch.no_grad()
def test_a_fit_is_the_nearest_start(trained: Checkpoint) -> None:
    """Of what the source predicts, how much is missed with nothing trained, and whose tailor is whose."""
    stream, images = torch.Generator().manual_seed(3), DATA.batch(torch.arange(96))
    timestep = torch.rand(96, generator=stream) * 1000
    noised, _ = add_noise("flow", images, torch.randn(images.shape, generator=stream), timestep)
    wanted = trained.model()(noised, timestep, LABELS)
    missed = {}
    for method in ("fit", "selection"):
        small = resized(trained, target_spec(SPEC, 2, 16), method)
        missed[method] = float((small.model()(noised, timestep, LABELS) - wanted).square().mean())
        if method == "fit":
            assert decided_by_the_tailor(small) > 0.5
    assert missed["fit"] < 0.85 * missed["selection"]


def test_a_run_from_a_checkpoint_says_so_and_is_no_other_run(trained: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "trained",
        dataclasses.replace(
            trained, provenance={"imported_from": "dit.pt", "recommended": {"guidance": 1.25}, **trained.provenance}
        ),
    )
    source = load_checkpoint(tmp_path / "trained")
    save_checkpoint(tmp_path / "small", resized(source, target_spec(SPEC, 2), "selection"))
    small = load_checkpoint(tmp_path / "small")
    config = dataclasses.replace(same_config(small), images=24 * 4, nested_share=0.5)
    assert config.spec == small.spec
    split = DataSplit(DATA, DATA.of_classes(()))

    (tmp_path / "out").mkdir()

    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stages(config, split, tmp_path / "out", begin=small, on_progress=stop)
    train_stages(config, split, tmp_path / "out", begin=small)
    done = load_checkpoint(tmp_path / "out")
    assert done.spec == dataclasses.replace(small.spec, nested=True)
    assert done.provenance["recommended"] == {"steps": 20, "guidance": 1.25, "sampler": "euler"}
    assert lineage("small", "0", done.provenance)["imported_from"] == "dit.pt"
    assert done.provenance["begun_from"]["resized"] == json.loads(json.dumps(small.provenance["resized"]))
    with pytest.raises(UsageError, match="begun_from"):
        train_stages(config, split, tmp_path / "out", resume=True)


def test_the_licence_goes_along_and_that_of_other_images_does_not(trained: Checkpoint) -> None:
    stated = {"author": "A. Nother", "licence": "CC-BY-4.0", "data_licence": "CC0"}
    told = same_config(dataclasses.replace(trained, provenance={**trained.provenance, "stated": stated})).stated
    assert told.to_dict() == {"author": "A. Nother", "licence": "CC-BY-4.0"}


def test_what_training_does_not_go_on_with(trained: Checkpoint, make_checkpoint: Callable[..., Checkpoint]) -> None:
    with pytest.raises(UsageError, match="class 1 is 'box' there and 'ring' in the data"):
        check_same_classes(trained, ("bar", "ring", "cross"))
    with pytest.raises(UsageError, match="another shape"):
        begin_with(trained, dataclasses.replace(CONFIG, spec=dataclasses.replace(SPEC, depth=2)))
    with pytest.raises(UsageError, match="distilled"):
        same_config(make_checkpoint(step_counts=(1, 2), inside_guidance=1.5))
