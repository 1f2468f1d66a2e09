"""Bundles of latent models: they decode, count what that costs, and refuse an autoencoder that does not fit."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from kind_edge.budget.decoder import decoder_cost
from kind_edge.budget.plan import Plan
from kind_edge.budget.planner import make_plan
from kind_edge.budget.profile import load_profile
from kind_edge.deploy import pipeline
from kind_edge.deploy.decoder import decoder_costs, decoder_facts, planned_decoder
from kind_edge.deploy.manifest import read_manifest
from kind_edge.deploy.parity import IMAGE_GATES_DB, psnr_db
from kind_edge.deploy.reference import make_images
from kind_edge.deploy.replay import check_planned, check_replay
from kind_edge.deploy.request import as_replayed, make_request, make_source, open_model
from kind_edge.deploy.runtime import load_bundle
from kind_edge.deploy.verify import load_reference, verify_models
from kind_edge.errors import InputError, NoPlanError, UsageError
from kind_edge.exporters.onnx_decoder import to_fp16
from kind_edge.model.autoencoder import Autoencoder, open_autoencoder
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.model.spec import ModelSpec
from kind_edge.registry import exporter

MadeOnce = Callable[[str, Callable[[Path], object]], Path]
LATENT: dict[str, Any] = {"channels": 4, "pixels_per_latent": 8, "objective": "epsilon", "tailor_rank": 1}
DEVICE = "raspberry-pi-5"
INT8, DECODER, DECODER_INT8 = "onnx/denoiser.int8.onnx", "onnx/decoder.onnx", "onnx/decoder.int8-weights.onnx"
SAMPLER = "onnx/sampler.onnx"


@pytest.fixture(scope="module")
def latent_folder(made_once: MadeOnce, make_checkpoint_folder: Callable[..., Path]) -> Path:
    return made_once("latent", lambda folder: make_checkpoint_folder(folder, **LATENT))


@pytest.fixture(scope="module")
def made(latent_folder: Path, autoencoders: Path, made_once: MadeOnce) -> Path:
    """One class in int8 with the decoder of AutoencoderKL, and as a pipeline of diffusers."""

    def make(folder: Path) -> None:
        asked: dict[str, Any] = {
            "profile": DEVICE,
            "classes": ["bag"],
            "form": "single",
            "precision": "int8",
            "steps": 2,
        }
        bundle = pipeline.export(
            latent_folder, **asked, autoencoder=autoencoders / "kl", formats=["diffusers"], output=folder / "b"
        )
        (folder / "export.json").write_text(json.dumps(bundle.to_dict()))

    return made_once("latent-bundle", make)


@pytest.mark.slow
def test_a_bundle_of_latents_draws_pictures(made: Path) -> None:
    bundle, printed = made / "b", json.loads((made / "export.json").read_text())
    manifest = read_manifest(bundle)
    assert (manifest.image.channels, manifest.image.height) == (3, 64)
    assert manifest.latent is not None
    assert (manifest.latent.channels, manifest.latent.width) == (4, 8)
    assert manifest.models[DECODER].inputs[0].shape == ("batch", 4, 8, 8)
    assert manifest.raw["decoder"]["autoencoder"] == "AutoencoderKL"
    assert printed["parity"][DECODER] >= 80 > printed["parity"][DECODER_INT8] >= 30
    assert {DECODER, DECODER_INT8, SAMPLER, INT8} <= printed["latency_ms"].keys() & printed["predicted_here_ms"].keys()
    assert (bundle / "preview.png").is_file()
    readme = (bundle / "README.md").read_text()
    assert f"`{DECODER_INT8}` (AutoencoderKL)" in readme
    assert "[n, 3, 64, 64]" in readme

    loop, once = load_bundle(bundle, threads=1), load_bundle(bundle, model=SAMPLER, threads=1)
    assert (loop.model.path, loop.decoder is not None, once.decoder) == (INT8, True, None)
    pictures = loop.generate(n=2, seed=3)
    assert (pictures.shape, pictures.dtype) == ((2, 64, 64, 3), np.uint8)
    assert np.abs(pictures.astype(int) - once.generate(n=2, seed=3)).max() <= 1
    assert pictures.std() > 5
    assert np.array_equal(pictures[1], loop.generate(n=3, seed=3)[1])


@pytest.mark.slow
def test_the_app_s_files_are_what_the_plan_counted(made: Path) -> None:
    bundle, plan = made / "b", json.loads((made / "b" / "plan.json").read_text())
    loaded = sum((bundle / file).stat().st_size for file in (INT8, DECODER_INT8))
    nodes = sum(len(onnx.load_model(bundle / file).graph.node) for file in (INT8, DECODER_INT8))
    assert abs(plan["weight_bytes"] - loaded) < 150 * nodes  # of a tiny model, most of the bytes
    assert plan["decoder"]["precision"] == "int8-weights"
    assert plan["decoder"]["tiles"] == 1
    assert plan["time"]["decoder_s"] > 0


@pytest.mark.slow
def test_a_decoder_that_draws_otherwise_is_found(made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "b", tmp_path / "b")
    manifest, reference = read_manifest(folder), load_reference(folder)
    model = onnx.load_model(folder / DECODER)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("decoder.conv_out.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1e-3), bias.name))
    onnx.save(model, folder / DECODER)
    failures = verify_models(folder, manifest, reference).failures
    assert [failure.split(":")[0] for failure in failures] == [DECODER]
    without = {name: array for name, array in reference.items() if name != "latent"}
    assert any(
        "holds no images to compare a decoder's with" in f for f in verify_models(folder, manifest, without).failures
    )


@pytest.mark.slow
def test_the_same_decoder_in_fp16(made: Path, tmp_path: Path) -> None:
    """What adds up groups and rows stays in fp32, so that pictures keep their gate; inputs and outputs are float32."""
    reference, model = load_reference(made / "b"), to_fp16(onnx.load_model(made / "b" / DECODER))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, tmp_path / "half.onnx")
    got = exporter("onnx").open(tmp_path / "half.onnx")({"latent": reference["latent"]})
    assert IMAGE_GATES_DB["fp16"] < psnr_db(reference["image"], got) < IMAGE_GATES_DB["fp32"]
    assert (tmp_path / "half.onnx").stat().st_size < (made / "b" / DECODER).stat().st_size


@pytest.mark.slow
def test_the_pipeline_of_diffusers_is_whole(
    made: Path, autoencoders: Path, latent_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads without more, and draws from the same noise what the bundle draws: scale and shift are in its `vae`."""
    from diffusers import DiTPipeline

    loaded = DiTPipeline.from_pretrained(made / "b" / "diffusers")
    loaded.set_progress_bar_config(disable=True)
    reference = load_reference(made / "b")
    monkeypatch.setattr(
        "diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: torch.from_numpy(reference["noise"].copy())
    )
    drawn = loaded([0], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert np.abs(drawn.transpose(0, 3, 1, 2) - reference["image"]).max() < 2e-3
    spec = open_model(latent_folder).checkpoint.spec
    ours, latents = open_autoencoder(autoencoders / "kl", spec, {}), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        theirs = (loaded.vae.decode(latents / loaded.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert float((ours.decode(latents) - theirs).abs().max()) < 1e-5


def test_a_replayed_plan_wants_its_own_decoder(latent_folder: Path, autoencoders: Path) -> None:
    with_kl, with_tiny = (open_model(latent_folder, autoencoder=autoencoders / kind) for kind in ("kl", "tiny"))
    device = load_profile(DEVICE)
    plan = make_plan(make_source(with_kl), make_request(with_kl.checkpoint, device, steps=2))
    assert as_replayed(plan, make_source(with_kl), device) == plan
    check_planned(plan, with_kl.autoencoder)
    with pytest.raises(UsageError, match="counts the decoder of another one"):
        check_planned(plan, with_tiny.autoencoder)
    with pytest.raises(UsageError, match="give that too, with --autoencoder"):
        check_planned(plan, None)
    unknown = dataclasses.replace(plan, decoder={})
    with pytest.raises(UsageError, match="no decoder that is known"):
        check_planned(unknown, with_kl.autoencoder)
    odd = dataclasses.replace(plan, decoder={**plan.decoder, "tiles": 3})
    with pytest.raises(InputError, match="decodes in 3 tiles"):
        check_replay(odd, with_kl, DEVICE, {})
    with pytest.raises(InputError, match=r"decoder: got .*, want autoencoder_sha256, precision, tiles"):
        Plan.from_dict({**plan.to_dict(), "decoder": {"tiles": 1}}, "plan.json")
    assert Plan.from_dict(plan.to_dict(), "plan.json") == plan


def test_tiles_where_memory_forbids_the_whole(
    latent_folder: Path, autoencoders: Path, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    """The plan takes them only then, pays for them in time, and the reference is drawn through them."""
    model = open_model(latent_folder, autoencoder=autoencoders / "kl")
    assert model.autoencoder is not None
    source, device = make_source(model), load_profile(DEVICE)
    whole = dataclasses.replace(source.decoders[0], activation_bytes_peak=64 * 2**20)
    pieces = dataclasses.replace(whole, activation_bytes_peak=8 * 2**20, flops=2 * whole.flops, tiles=2, whole=whole)
    source = dataclasses.replace(source, decoders=(whole, pieces))

    def planned(**limits: str) -> Any:
        return make_plan(source, make_request(model.checkpoint, device, classes=["bag"], steps=2, **limits))

    free, tight = planned(), planned(max_memory="100MiB")
    assert (free.decoder["tiles"], tight.decoder["tiles"]) == (1, 2)
    assert tight.peak_memory_bytes < 100 * 2**20 < free.peak_memory_bytes
    assert tight.time["decoder_s"] == pytest.approx(2 * free.time["decoder_s"])
    assert tight.dense == free.dense
    assert planned_decoder(source.decoders, tight) is pieces
    with pytest.raises(NoPlanError):
        planned(max_memory="20MiB")
    images = make_images(make_checkpoint(**LATENT), tight, model.autoencoder)
    assert images["image"].shape == (3, 3, 64, 64)
    facts = decoder_facts(model.autoencoder, tight, images["latent"])
    assert facts["tile_latents"] == 5
    assert facts["tiled_psnr_db"] < 80


def test_stable_diffusion_s_decoder_costs_what_is_assumed(autoencoders: Path) -> None:
    import diffusers

    spec = ModelSpec(32, 4, patch_size=2, width=4, depth=1, heads=1, num_classes=1, factored=False, pixels_per_latent=8)
    with torch.device("meta"):
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        )  # fmt: skip
    known = Autoencoder(Path(), "AutoencoderKL", "ab", dict(model.config), spec.image_size, 8)
    whole, *tiled = decoder_costs(known)
    assumed = decoder_cost(spec)
    assert whole.params == pytest.approx(assumed.params, rel=1e-3)  # normalisations are not in what is assumed
    assert whole.flops == pytest.approx(assumed.flops, rel=1e-3)
    assert whole.activation_bytes_peak == assumed.activation_bytes_peak
    assert whole.weight_bytes("int8") < 0.27 * whole.weight_bytes("fp32")
    assert [cost.tiles for cost in tiled] == [2, 4]
    assert all(cost.flops > whole.flops and cost.whole == whole for cost in tiled)
    peaks = [cost.activation_bytes_peak for cost in (whole, *tiled)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[1] < 0.4 * peaks[0]


def test_an_autoencoder_that_does_not_fit_is_refused_at_once(autoencoders: Path, tmp_path: Path) -> None:
    spec = ModelSpec(8, 4, patch_size=2, width=4, depth=1, heads=1, num_classes=1, factored=False, pixels_per_latent=8)
    trained = {"data": {"autoencoder": {"kind": "AutoencoderKL", "scaling_factor": 0.18215}}}

    def refused(error: type[Exception], folder: Path, spec: ModelSpec = spec, **provenance: Any) -> str:
        with pytest.raises(error) as caught:
            open_autoencoder(folder, spec, provenance)
        return str(caught.value)

    kl, tiny = autoencoders / "kl", autoencoders / "tiny"
    assert "works on pixels" in refused(UsageError, kl, dataclasses.replace(spec, pixels_per_latent=1))
    assert "4 channels, the model makes 16" in refused(UsageError, kl, dataclasses.replace(spec, channels=16))
    assert "scaling_factor is 0.5, the model was trained on latents with 0.18215" in refused(UsageError, kl, **trained)
    assert open_autoencoder(tiny, spec, trained).kind == "AutoencoderTiny"  # another kind has its own scale
    values = json.loads((kl / "config.json").read_text())
    shutil.copytree(kl, tmp_path / "kl")
    short = {name: value[:3] if isinstance(value, list) else value for name, value in values.items()}
    (tmp_path / "kl" / "config.json").write_text(json.dumps(short))
    assert "makes 3 x 32 x 32 of the model's 8 x 8 latents" in refused(UsageError, tmp_path / "kl")
    (tmp_path / "kl" / "config.json").write_text(json.dumps({**values, "norm_num_groups": 3}))
    assert "config.json makes no AutoencoderKL" in refused(InputError, tmp_path / "kl")
    assert "no autoencoder of diffusers" in refused(InputError, tmp_path)
