"""Training on one's own images, from the command line to a plan; and everything that is refused before the work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kind_edge.cli import main
from kind_edge.deploy.reference import load_heldout
from kind_edge.errors import InputError, KindEdgeError, UsageError
from kind_edge.model.autoencoder import open_autoencoder
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.training.latents import open_encoder
from kind_edge.training.open import open_data
from kind_edge.training.pictures import decode

CPU = torch.device("cpu")
LATENT = {"image_size": 4, "channels": 4, "patch_size": 2, "pixels_per_latent": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kind-edge" / "prepared"


def toml(config: Any, path: Path) -> Path:
    values = config.to_dict()
    model = {name: value for name, value in values.pop("model").items() if value not in (None, {}, [])}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    path.write_text("\n".join([*lines, "[model]", *(f"{name} = {json.dumps(value)}" for name, value in model.items())]))
    return path


@pytest.mark.parametrize("kind", ["pixels", "kl", "tiny"])
def test_from_images_to_a_plan(
    kind: str, make_folder: Callable[..., Path], make_config: Callable[..., Any], autoencoders: Path,
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    root = make_folder(side=32, cat=20, dog=10, eel=10)
    (root / "cat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "map.toml").write_text('fish = ["eel"]\npet = ["dog", "cat"]\n')
    config = toml(make_config(2, **(LATENT if kind != "pixels" else {})), tmp_path / "run.toml")
    given = ["train", "--config", config, "--data", root, "--class-map", tmp_path / "map.toml", "--device", "cpu"]
    given += ["--autoencoder", autoencoders / kind] if kind != "pixels" else []
    assert main([str(argument) for argument in (*given, "-o", tmp_path / "run")]) == 0
    said = capsys.readouterr().err
    assert f"data: image folder {root}, 41 images of 2 classes" in said
    assert "1 of 41 images (2.4%) could not be read and are left out: cat/broken.png (" in said
    assert "training on 36 images, 4 held out" in said

    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.class_names == ("fish", "pet")
    facts = checkpoint.provenance["data"]
    assert (facts["images"], facts["unreadable"], facts["heldout"]) == (40, 1, 4)
    assert facts["merged_classes"] == {"fish": ["eel"], "pet": ["dog", "cat"]}
    assert facts.get("autoencoder", {}).get("scaling_factor") == {"pixels": None, "kl": 0.5, "tiny": 1.0}[kind]
    if kind != "pixels":  # the same folder is known again when the model is exported
        known = open_autoencoder(autoencoders / kind, checkpoint.spec, checkpoint.provenance)
        assert known.sha256 == facts["autoencoder"]["sha256"]
    heldout = load_heldout(tmp_path / "run", checkpoint.spec)
    assert heldout is not None
    assert heldout.labels.tolist() == [0, 1, 1, 1]
    shards = [np.load(path) for path in own_cache.glob("*/*.npy")]
    assert [shard.dtype for shard in shards] == [np.uint8 if kind == "pixels" else np.float16]
    kept = torch.from_numpy(shards[0]).float()
    kept = kept / 127.5 - 1 if kind == "pixels" else kept
    assert all(any(torch.equal(image, item) for item in kept) for image in heldout.images)

    assert main(["plan", str(tmp_path / "run"), "--profile", "raspberry-pi-5", "--classes", "pet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == ["pet"]
    again = [str(argument) for argument in (*given, "-o", tmp_path / "again")]
    assert main(again) == 0
    assert "prepared before" in capsys.readouterr().err
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["kl", "tiny"])
def test_latents_are_the_scaled_means(
    kind: str, make_folder: Callable[..., Path], make_config: Callable[..., Any], autoencoders: Path
) -> None:
    import diffusers

    root = make_folder(side=32, cat=3)
    config = make_config(1, **LATENT)
    data = open_data(config, root, autoencoder=autoencoders / kind, device=CPU).training
    kinds = {"kl": diffusers.AutoencoderKL, "tiny": diffusers.AutoencoderTiny}
    model = kinds[kind].from_pretrained(autoencoders / kind)
    pixels = np.stack([decode(path.read_bytes(), 32, 3).pixels for path in sorted(root.rglob("*.png"))])
    with torch.no_grad():
        encoded = model.encode(torch.from_numpy(pixels).float() / 127.5 - 1)
    wanted = (encoded.latent_dist.mean - 0.25) * 0.5 if kind == "kl" else encoded.latents
    torch.testing.assert_close(data.batch(torch.arange(3)), wanted, rtol=2e-3, atol=1e-3)
    assert data.batch(torch.arange(3)).std() > 0


def test_an_autoencoders_own_mean_and_spread_count(
    autoencoders: Path, make_config: Callable[..., Any], tmp_path: Path
) -> None:
    for file in (autoencoders / "kl").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = make_config(1, **LATENT).spec
    pixels = np.full((2, 3, 32, 32), 200, dtype=np.uint8)
    plain = torch.from_numpy(open_encoder(tmp_path, spec, CPU).encode(pixels)).float() / 0.5 + 0.25
    values = json.loads((tmp_path / "config.json").read_text())
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 4.0, 8.0]
    (tmp_path / "config.json").write_text(json.dumps({**values, "latents_mean": mean, "latents_std": std}))
    scaled = torch.from_numpy(open_encoder(tmp_path, spec, CPU).encode(pixels)).float()
    means, stds = (torch.tensor(numbers).view(1, 4, 1, 1) for numbers in (mean, std))
    torch.testing.assert_close(scaled, (plain - means) * 0.5 / stds, rtol=5e-3, atol=2e-3)


def test_another_autoencoder_is_another_cache(
    make_folder: Callable[..., Path], make_config: Callable[..., Any], autoencoders: Path, tmp_path: Path
) -> None:
    root, config = make_folder(side=32, cat=3), make_config(1, **LATENT)
    for file in (autoencoders / "kl").iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes().replace(b'"scaling_factor": 0.5', b'"scaling_factor": 0.7')
        )
    places = (autoencoders / "kl", autoencoders / "tiny", tmp_path)
    assert len({open_data(config, root, autoencoder=place, device=CPU).training.sha256 for place in places}) == 3


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(config: Any, root: Path | None, kind: type[KindEdgeError], own_cache: Path, **choices: Path) -> str:
    with pytest.raises(kind) as caught:
        open_data(config, root, device=CPU, **choices)
    assert not own_cache.exists()  # before any work
    return str(caught.value)


def test_what_does_not_fit_is_refused_before_the_work(
    make_folder: Callable[..., Path],
    make_config: Callable[..., Any],
    autoencoders: Path,
    tmp_path: Path,
    own_cache: Path,
) -> None:
    root = make_folder(cat=3, dog=2)
    kl = autoencoders / "kl"

    def usage(config: Any, data: Path | None = root, **choices: Path) -> str:
        return refused(config, data, UsageError, own_cache, **choices)

    assert 'dataset = "files" needs --data: a folder' in usage(make_config(2), None)
    assert "has 2 classes (cat, dog), the model has num_classes 3; set num_classes = 2" in usage(make_config(3))
    assert "2 channels; pixels have 1 (grey) or 3" in usage(make_config(2, channels=2))
    assert "works on latents (pixels_per_latent 8); give the autoencoder" in usage(make_config(2, **LATENT))
    assert "the model works on pixels" in usage(make_config(2), autoencoder=kl)
    other = {**LATENT, "channels": 16}
    assert "latents of 4 x 4 x 4 from 32 x 32 pixels" in usage(make_config(2, **other), autoencoder=kl)

    def unreadable(data: Path, **choices: Path) -> str:
        latent = LATENT if "autoencoder" in choices else {}
        return refused(make_config(2, **latent), data, InputError, own_cache, **choices)

    (tmp_path / "none").mkdir()
    assert "no autoencoder of diffusers" in unreadable(root, autoencoder=tmp_path / "none")
    (tmp_path / "none/config.json").write_text('{"_class_name": "UNet2DModel"}')
    assert "describes 'UNet2DModel', want AutoencoderKL" in unreadable(root, autoencoder=tmp_path / "none")
    (tmp_path / "none/config.json").write_bytes((kl / "config.json").read_bytes())
    assert "has no *.safetensors" in unreadable(root, autoencoder=tmp_path / "none")
    (tmp_path / "none/diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 9)
    assert "AutoencoderKL does not load" in unreadable(root, autoencoder=tmp_path / "none")
    (tmp_path / "map.json").write_text('{"pet": ["cat", "dgo"], "b": ["dog"]}')
    assert "has no class 'dgo' (nearest: dog)" in unreadable(root, class_map=tmp_path / "map.json")
    (root / "dog/000.png").unlink()
    assert "fewer than 2 images of dog (1); add images, or leave the class out" in unreadable(root)
    (root / "dog/001.png").unlink()
    assert "no image of dog" in unreadable(root)


def test_copies_of_one_image_are_one_image(make_folder: Callable[..., Path], make_config: Callable[..., Any]) -> None:
    root = make_folder(cat=4, dog=5)
    for path in (root / "dog").rglob("*.png"):
        path.write_bytes((root / "dog/000.png").read_bytes())
    with pytest.raises(InputError, match=r"fewer than 2 different images of dog \(1\)"):
        open_data(make_config(2), root, device=CPU)


def test_latents_far_from_the_scale_of_the_noise_are_a_warning(
    make_folder: Callable[..., Path], make_config: Callable[..., Any], autoencoders: Path, tmp_path: Path
) -> None:
    root = make_folder(side=32, cat=3)
    values = json.loads((autoencoders / "kl" / "config.json").read_text())
    shutil.copytree(autoencoders / "kl", tmp_path / "kl")

    def said_of(factor: float) -> str:
        said: list[str] = []
        (tmp_path / "kl" / "config.json").write_text(json.dumps({**values, "scaling_factor": factor}))
        open_data(make_config(1, **LATENT), root, autoencoder=tmp_path / "kl", device=CPU, report=said.append)
        return next(line for line in said if "standard deviation" in line)

    warning = said_of(0.001)
    assert warning.startswith("warning: latents have a standard deviation of 0.0")
    advised = 0.001 * float(warning.partition("multiply it by ")[2].rstrip(")"))
    assert said_of(advised).startswith("latents have a standard deviation of 1.00;")


def test_a_class_that_cannot_be_read_is_refused(
    make_folder: Callable[..., Path], make_config: Callable[..., Any]
) -> None:
    root = make_folder(cat=40, dog=2)
    (root / "dog/000.png").write_bytes(b"broken")
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InputError, match=r"fewer than 2 different images of dog \(1\)"):
            open_data(make_config(2), root, device=CPU)
