"""A whole training run in miniature, on the real images."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch

from kind_edge.deploy.reference import load_heldout
from kind_edge.errors import UsageError
from kind_edge.model.calibration import load_calibration
from kind_edge.model.checkpoint import CALIBRATION, load_checkpoint
from kind_edge.training.config import TrainConfig, preset
from kind_edge.training.data import CLASS_NAMES, DATA_SHA256, load_fashion_mnist
from kind_edge.training.loop import Progress
from kind_edge.training.state import STATE
from kind_edge.training.train import pick_device, train

SMOKE = preset("smoke")
SPEC = dataclasses.replace(SMOKE.spec, depth=1)
CONFIG = dataclasses.replace(SMOKE, images=6 * SMOKE.batch_size, nested_share=0.5, spec=SPEC)


@pytest.fixture(scope="module")
def trained(fashion_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted after three steps of six and resumed."""

    def interrupt(progress: Progress) -> None:
        if progress.step == 3:
            signal.raise_signal(signal.SIGTERM)

    folder = tmp_path_factory.mktemp("run") / "model"
    with pytest.raises(KeyboardInterrupt):
        train(CONFIG, folder, data=fashion_folder, device="cpu", on_progress=interrupt)
    assert [path.name for path in folder.iterdir()] == [STATE]
    with pytest.raises(UsageError, match="add --resume to go on"):
        train(CONFIG, folder, data=fashion_folder, device="cpu")
    assert train(CONFIG, folder, data=fashion_folder, device="cpu", resume=True) == folder
    return folder


def test_it_leaves_a_checkpoint_in_fp16(trained: Path) -> None:
    checkpoint = load_checkpoint(trained)
    assert (checkpoint.spec, checkpoint.class_names) == (dataclasses.replace(SPEC, nested=True), CLASS_NAMES)
    dtypes = {tensor.dtype for name, tensor in checkpoint.tensors.items() if name != "pos_embed"}  # loaded unrounded
    assert dtypes == {torch.float16}
    provenance = checkpoint.provenance
    assert provenance["images_seen"] == 360
    assert TrainConfig.from_dict(provenance["config"], "provenance") == CONFIG
    assert provenance["data_sha256"] == DATA_SHA256
    assert 0 < provenance["final_loss"] < 10
    assert provenance["recommended"].keys() == {"steps", "guidance", "sampler"}


def test_it_leaves_what_planning_needs(trained: Path, fashion_folder: Path) -> None:
    calibration = load_calibration(trained / CALIBRATION, CONFIG.spec)
    for covariance in calibration.pooled.values():
        assert torch.linalg.eigvalsh(covariance).min() > -1e-3 * covariance.diagonal().mean()
    heldout = load_heldout(trained, CONFIG.spec)
    assert heldout is not None
    assert heldout.labels.bincount().tolist() == [50] * 10
    test_images = torch.from_numpy(load_fashion_mnist(fashion_folder).test_images)
    pixels = ((heldout.images + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(pixels[heldout.labels == 9][0, 0], test_images[0])  # the first test image is an ankle-boot


def test_the_same_run_in_one_go_gives_the_same_weights(trained: Path, fashion_folder: Path, tmp_path: Path) -> None:
    whole = load_checkpoint(train(CONFIG, tmp_path / "whole", data=fashion_folder, device="cpu"))
    for name, tensor in load_checkpoint(trained).tensors.items():
        assert torch.equal(tensor, whole.tensors[name]), name


def test_a_dense_model_needs_no_calibration(fashion_folder: Path, tmp_path: Path) -> None:
    spec = CONFIG.spec.dense()
    config = dataclasses.replace(CONFIG, images=SMOKE.batch_size, spec=spec)
    train(config, tmp_path, data=fashion_folder, device="cpu")
    assert not (tmp_path / CALIBRATION).exists()
    assert load_checkpoint(tmp_path).spec == spec


@pytest.mark.parametrize("changes", [{"num_classes": 9}, {"image_size": 14}, {"channels": 3}])
def test_a_model_that_the_images_do_not_fit_is_refused(
    changes: dict[str, int], fashion_folder: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(CONFIG, spec=dataclasses.replace(CONFIG.spec, **changes))
    with pytest.raises(UsageError, match="Fashion-MNIST has"):
        train(config, tmp_path / "run", data=fashion_folder, device="cpu")
    assert not (tmp_path / "run").exists()


def test_what_is_in_the_way_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(UsageError, match="not empty; choose another -o"):
        train(CONFIG, tmp_path, device="cpu")
    with pytest.raises(UsageError, match="is a file"):
        train(CONFIG, tmp_path / "letter.txt", device="cpu")
    assert (tmp_path / "letter.txt").read_text() == "dear reader"


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="want auto, cpu or cuda"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        assert pick_device("auto") == torch.device("cpu")
        with pytest.raises(UsageError, match="finds no CUDA GPU"):
            pick_device("cuda")
