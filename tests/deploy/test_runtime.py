"""The runtime's loop against the same loop written out in NumPy, on real ONNX models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kind_edge.deploy.bundle import write_manifest, writing_bundle, zip_bundle
from kind_edge.deploy.noise import gaussian_noise
from kind_edge.deploy.runtime import MAX_BATCH, load_bundle, to_pixels
from kind_edge.errors import InputError, UsageError

SHAPE = (1, 6, 5)
MakeBundle = Callable[..., Path]
Loop = Callable[..., np.ndarray]


@pytest.mark.parametrize("guidance", [1.0, 1.5, 4.0])
def test_loop_and_guidance_are_those_of_the_manifest(
    make_bundle: MakeBundle, reference_loop: Loop, guidance: float
) -> None:
    bundle = load_bundle(make_bundle(guidance=guidance), threads=1)
    noise, classes = gaussian_noise(3, 0, 5, SHAPE), np.array([0, 1, 0, 1, 1])
    images = bundle.sample_float(noise, classes)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images, reference_loop(noise, classes, guidance), atol=2e-6)


def test_images_come_from_numbered_noise(make_bundle: MakeBundle, reference_loop: Loop) -> None:
    bundle = load_bundle(make_bundle(), threads=1)
    images = bundle.generate("bag", n=3, seed=7)
    assert (images.dtype, images.shape) == (np.uint8, (3, 6, 5, 1))
    expected = reference_loop(gaussian_noise(7, 0, 3, SHAPE), np.array([1, 1, 1]), 1.5)
    distance = np.abs(images[..., 0] - (expected[:, 0] + 1) * 127.5)
    assert distance.max() <= 0.501


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_same_seed_same_images_whatever_the_batch(make_bundle: MakeBundle, precision: str) -> None:
    bundle = load_bundle(make_bundle(), model=precision, threads=1)
    many = bundle.generate("sneaker", n=MAX_BATCH + 3, seed=1)
    np.testing.assert_array_equal(bundle.generate("sneaker", n=2, seed=1), many[:2])
    both = bundle.generate(["bag", "sneaker"], n=2, seed=1)
    np.testing.assert_array_equal(both, np.concatenate([bundle.generate("bag", n=2, seed=1), many[:2]]))
    assert not np.array_equal(bundle.generate("sneaker", n=2, seed=2), many[:2])


def test_int8_rows_do_influence_each_other_in_one_call(make_bundle: MakeBundle) -> None:
    bundle = load_bundle(make_bundle(), model="int8", threads=1)
    noise = gaussian_noise(0, 0, 8, SHAPE)
    together = bundle.predict(noise, 0, np.zeros(8, np.int64))
    alone = bundle.predict(noise[:1], 0, np.zeros(1, np.int64))
    assert together.shape == noise.shape  # the variance is dropped
    assert not np.array_equal(together[:1], alone)  # else the test above proves nothing


def test_sampler_model_and_zip(make_bundle: MakeBundle) -> None:
    folder = make_bundle()
    bundle = load_bundle(zip_bundle(folder), model="onnx/sampler.onnx", threads=1)
    noise = gaussian_noise(0, 0, 2, SHAPE)
    expected = 2 / (1 + np.exp(-(noise + 1.5 * 0.5))) - 1
    np.testing.assert_allclose(bundle.sample_float(noise, np.zeros(2, np.int64)), expected, atol=1e-6)
    assert bundle.generate("sneaker").shape == (1, 6, 5, 1)


def test_progress_counts_every_row(make_bundle: MakeBundle) -> None:
    calls: list[tuple[int, int]] = []
    bundle = load_bundle(make_bundle(), threads=1)
    bundle.generate("bag", n=MAX_BATCH + 1, on_step=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 8) for done in range(1, 9)]


def test_refusals_teach(make_bundle: MakeBundle) -> None:
    folder = make_bundle()
    bundle = load_bundle(folder)
    with pytest.raises(UsageError, match=r"unknown class 'sneakers'; did you mean: sneaker\?"):
        bundle.generate("sneakers")
    with pytest.raises(UsageError, match=r"which class.*sneaker, bag"):
        bundle.generate()
    with pytest.raises(UsageError, match="at least 1 image"):
        bundle.generate("bag", n=0)
    with pytest.raises(UsageError, match=r"unknown model 'int4'.*int8"):
        load_bundle(folder, model="int4")
    with pytest.raises(UsageError, match="threads: got 0"):
        load_bundle(folder, threads=0)
    with pytest.raises(UsageError, match="cores"):
        load_bundle(folder, threads=10**6)
    (folder / "onnx/denoiser.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match=r"onnx/denoiser\.onnx: 11 bytes, the manifest says"):
        load_bundle(folder)
    with pytest.raises(InputError, match="ONNX Runtime cannot load it"):
        load_bundle(folder, verify=False)


def test_manifest_that_does_not_fit_its_model_is_refused(
    tmp_path: Path, make_bundle: MakeBundle, bundle_values: Callable[..., dict[str, Any]]
) -> None:
    models = {p.name: p.read_bytes() for p in (make_bundle() / "onnx").iterdir()}

    def variant(values: dict[str, Any]) -> Path:
        with writing_bundle(tmp_path / "variant") as folder:
            (folder / "onnx").mkdir()
            for name, data in models.items():
                (folder / "onnx" / name).write_bytes(data)
            write_manifest(folder, values)
        return tmp_path / "variant"

    values = bundle_values()
    values["image"]["height"] = 7
    with pytest.raises(InputError, match="shaped like the image"):
        load_bundle(variant(values))
    values = bundle_values(guidance=1.0)
    inputs = values["models"]["onnx/denoiser.onnx"]["inputs"]
    values["models"]["onnx/denoiser.onnx"]["inputs"] = inputs[:2]
    with pytest.raises(InputError, match=r"class_index.*the manifest says"):
        load_bundle(variant(values))


def test_pixels_round_to_the_nearest_level() -> None:
    values = np.array([-2, -1, -1 + 1 / 127.5, 0.001, 1, 3], np.float32).reshape(1, 1, 1, 6)
    assert to_pixels(values).ravel().tolist() == [0, 0, 1, 128, 255, 255]
