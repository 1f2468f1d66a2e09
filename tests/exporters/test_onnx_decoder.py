"""The decoder as a graph: what diffusers decodes, in every precision, whole or in tiles without seams."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.parity import IMAGE_GATES_DB, psnr_db
from kind_edge.exporters.onnx_decoder import PREFIX, tiled, to_fp16, to_onnx_decoder, weights_in_int8
from kind_edge.model.autoencoder import Autoencoder, decode_tiled, open_autoencoder
from kind_edge.model.spec import ModelSpec
from kind_edge.model.tiles import tiles_of
from kind_edge.registry import exporter

STORED = {"fp32": lambda model: model, "fp16": to_fp16, "int8-weights": weights_in_int8}
SPEC = ModelSpec(4, 4, patch_size=2, width=4, depth=1, heads=1, num_classes=1, factored=False, pixels_per_latent=8)


@pytest.fixture(scope="module")
def autoencoder(autoencoders: Path) -> Autoencoder:
    return open_autoencoder(autoencoders / "tiny", SPEC, {})


@pytest.fixture(scope="module")
def plain(autoencoder: Autoencoder) -> onnx.ModelProto:
    return to_onnx_decoder(autoencoder, SPEC.image_size)


def run(model: onnx.ModelProto, latents: np.ndarray[Any, Any], folder: Path) -> np.ndarray[Any, Any]:
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / "decoder.onnx")
    return exporter("onnx").open(folder / "decoder.onnx")({"latent": latents})


@pytest.mark.parametrize("precision", STORED)
def test_it_decodes_what_diffusers_decodes(
    plain: onnx.ModelProto, autoencoders: Path, tmp_path: Path, precision: str
) -> None:
    import diffusers

    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.AutoencoderTiny.from_pretrained(autoencoders / "tiny")
    with torch.no_grad():
        wanted = (theirs.decode(latents).sample / 2 + 0.5).clamp(0, 1).numpy()
    before = plain.SerializeToString()
    model = STORED[precision](plain)
    got = run(model, latents.numpy(), tmp_path)
    assert psnr_db(wanted, got) > IMAGE_GATES_DB[precision]
    assert plain.SerializeToString() == before
    names = [tensor.name for tensor in model.graph.initializer] + [name for n in model.graph.node for name in n.output]
    assert all(name.startswith(PREFIX) for name in names if name != "image")
    sizes = [len(each.SerializeToString()) for each in (model, plain)]
    assert sizes[0] < sizes[1] or precision == "fp32"


def test_a_kernel_s_scale_counts(plain: onnx.ModelProto, tmp_path: Path) -> None:
    """The gate can fail: one convolution of wrong scale is enough."""
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)
    model = weights_in_int8(plain)
    right = run(model, latents, tmp_path)
    scale = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".scale")][-1]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
    assert right.std() > 0.05
    assert psnr_db(right, run(model, latents, tmp_path)) < IMAGE_GATES_DB["int8-weights"]


@given(side=st.integers(1, 70), count=st.integers(1, 5))
def test_tiles_cover_every_pixel_once(side: int, count: int) -> None:
    tiles = tiles_of(side, count, 8)
    assert (tiles.starts[0], tiles.starts[-1] + tiles.size) == (0, side)
    total = np.zeros(8 * side)
    for start, weights in zip(tiles.starts, tiles.weights, strict=True):
        total[8 * start : 8 * (start + tiles.size)] += weights
        assert (weights >= 0).all()
    if count <= side // 2:  # smaller ones would overlap with more than their neighbours
        assert np.abs(total - 1).max() < 1e-6


def local_decoder(size: int) -> onnx.ModelProto:
    """Each latent decides its own 8 x 8 pixels, so that seams and misplaced tiles show at once."""
    mixed = np.random.default_rng(1).uniform(0, 0.2, (3, 4, 1, 1)).astype(np.float32)
    constants = {"mix": mixed, "scales": np.array([1, 1, 8, 8], np.float32), "shape": np.array([0, 3, size, size])}
    nodes = [
        helper.make_node("Conv", ["latent", "decoder.mix"], ["decoder.mixed"]),
        helper.make_node("Reshape", ["decoder.mixed", "decoder.shape"], ["decoder.shaped"]),
        helper.make_node("Resize", ["decoder.shaped", "", "decoder.scales"], ["image"], mode="nearest"),
    ]
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("latent", TensorProto.FLOAT, ["batch", 4, size, size])],
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8 * size, 8 * size])],
        [numpy_helper.from_array(value, PREFIX + name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("precision", ["fp32", "int8-weights"])
def test_tiles_of_a_local_decoder_make_the_whole(tmp_path: Path, precision: str) -> None:
    side, latents = 13, np.random.default_rng(0).uniform(0, 1, (2, 4, 13, 13)).astype(np.float32)
    whole = run(STORED[precision](local_decoder(side)), latents, tmp_path)
    for count in (2, 3):
        tiles = tiles_of(side, count, 8)
        got = run(tiled(STORED[precision](local_decoder(tiles.size)), tiles, side), latents, tmp_path)
        assert np.abs(got - whole).max() < 1e-6
        assert got.std() > 0.05


def test_the_graph_s_tiles_are_pytorch_s(autoencoder: Autoencoder, plain: onnx.ModelProto, tmp_path: Path) -> None:
    """Of a decoder that sees beyond its tile, both blend the same."""
    tiles = tiles_of(7, 2, 8)
    assert tiles.size == SPEC.image_size
    latent = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = decode_tiled(autoencoder.decoder, latent, tiles).numpy()
        whole = autoencoder.decoder(latent).numpy()
    assert psnr_db(wanted, run(tiled(plain, tiles, 7), latent.numpy(), tmp_path)) > IMAGE_GATES_DB["fp32"]
    assert psnr_db(wanted, whole) < IMAGE_GATES_DB["fp32"]  # tiles do know less
