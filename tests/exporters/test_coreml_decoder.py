"""Decoders in Core ML: whole, or one tile at a time, as the app and the program for Macs put them together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kind_edge.budget.coreml import _decoder_bytes
from kind_edge.deploy import verify
from kind_edge.deploy.decoder import decoder_costs
from kind_edge.deploy.manifest import ImageSize, ModelEntry, TensorInfo
from kind_edge.deploy.parity import COREML_GATES_DB
from kind_edge.errors import InputError
from kind_edge.exporters.coreml_compress import compress
from kind_edge.exporters.coreml_export import CoreMLExporter
from kind_edge.exporters.coreml_package import Description, package_bytes, save_package
from kind_edge.model.autoencoder import Autoencoder, open_autoencoder
from kind_edge.model.spec import ModelSpec
from kind_edge.model.tiles import in_tiles, tiles_of

DECODER = "coreml/Decoder.mlpackage"
SPEC = ModelSpec(8, 4, patch_size=2, width=4, depth=1, heads=1, num_classes=1, factored=False, pixels_per_latent=8)


def made(autoencoder: Autoencoder, weights: Any, tiles: int, folder: Path) -> ModelEntry:
    """The package, and what a manifest says of it."""
    origin = SimpleNamespace(autoencoder=autoencoder, plan=SimpleNamespace(decoder={"tiles": tiles}))
    model: Any = SimpleNamespace(spec=SPEC, origin=origin)
    decoder = CoreMLExporter()._decoder(model)
    assert decoder is not None
    (folder / "coreml").mkdir()
    save_package(compress(decoder.program, weights, "iOS18"), folder / DECODER, Description("", "", "", "", {}))
    told = decoder.interface.to_dict()
    inputs, outputs = (
        tuple(TensorInfo(each["name"], each["dtype"], tuple(each["shape"])) for each in told[kind])
        for kind in ("inputs", "outputs")
    )
    return ModelEntry(DECODER, "decoder", weights, inputs, outputs)


@pytest.mark.parametrize(("kind", "weights", "tiles"), [("kl", "fp16", 2), ("tiny", "int8", 1)])
def test_decoders_keep_their_gate(kind: str, weights: Any, tiles: int, autoencoders: Path, tmp_path: Path) -> None:
    autoencoder = open_autoencoder(autoencoders / kind, SPEC, {})
    entry = made(autoencoder, weights, tiles, tmp_path)
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    image = autoencoder.decode(latent, tiles).numpy()
    reference = {
        "noise": latent.numpy(), "latent": latent.numpy(), "image": image, "image_class": np.zeros(2, np.int64)
    }  # fmt: skip
    manifest: Any = SimpleNamespace(
        classes=("bag",), image=ImageSize(3, 64, 64), latent=ImageSize(4, 8, 8), raw={"decoder": {"tiles": tiles}}
    )
    checked = verify.verify_images(tmp_path, entry, reference, manifest)
    assert checked.failures == ()
    assert checked.gate_db == COREML_GATES_DB[weights]
    size = 5 if tiles == 2 else 8
    assert entry.inputs[0].shape == ("batch", 4, size, size)
    cost = decoder_costs(autoencoder)[0]
    assert package_bytes(tmp_path / DECODER) == pytest.approx(_decoder_bytes(cost, weights), rel=0.35)  # all is program

    manifest.raw = {"decoder": {"tiles": 3 - tiles}}
    found = verify.verify_images(tmp_path, entry, reference, manifest).failures
    assert any("input latent is float32" in failure for failure in found)
    manifest.raw = {"decoder": {"tiles": 0}}
    with pytest.raises(InputError, match=r"decoder.tiles: got 0, want 1 to 8"):
        verify.verify_images(tmp_path, entry, reference, manifest)


@pytest.mark.parametrize(("side", "count"), [(8, 2), (32, 4), (17, 2)])
def test_a_mac_puts_tiles_together_alike(side: int, count: int, mac_program: Any) -> None:
    """The stand-alone program has the same arithmetic in its own words."""

    def decode(latent: Any) -> Any:
        return np.tanh(latent[:, :1].repeat(2, 2).repeat(2, 3) + latent.mean(dtype=np.float32)).astype(np.float32)

    latents = np.random.default_rng(0).standard_normal((2, 4, side, side)).astype(np.float32)
    wanted = np.concatenate([in_tiles(decode, one[None], tiles_of(side, count, 2)) for one in latents])
    case = mac_program.Case(
        DECODER, None, "image", "psnr", 40.0, {"latent": latents}, wanted, ({"class": "bag"},) * 2, count
    )
    opened = mac_program.Opened(1, lambda inputs: {"image": decode(inputs["latent"])})
    np.testing.assert_allclose(mac_program.run_tiles(case, opened), wanted, atol=1e-6)
    assert set(mac_program.time_ms(case, opened, 1)) == {"p50", "p90"}
