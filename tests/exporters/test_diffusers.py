"""The DiTPipeline folder: it loads, predicts what the gated model predicts, draws the same images, or is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.deploy import pipeline
from kind_edge.deploy.bundle import zip_bundle
from kind_edge.deploy.manifest import ModelEntry, TensorInfo
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.parity import FileParity
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.reference import make_reference
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.deploy.verify import verify_model
from kind_edge.errors import InputError, UsageError
from kind_edge.exporters.diffusers_parts import passthrough_autoencoder
from kind_edge.model.checkpoint import Checkpoint, load_checkpoint
from kind_edge.model.convert import import_model
from kind_edge.model.sampling import sample
from kind_edge.model.spec import branch_of
from kind_edge.registry import exporter

MakeCheckpoint = Callable[..., Checkpoint]
LABELLED = {"label_embedding": True, "learned_sigma": True, "objective": "epsilon", "channels": 4}
WEIGHTS = "diffusers/transformer/diffusion_pytorch_model.safetensors"


def plain_model(
    checkpoint: Checkpoint,
    form: str,
    classes: tuple[str, ...],
    steps: int = 6,
    sampler: str | None = None,
    dropped: tuple[str, ...] = (),
) -> PlainDiT:
    """The model at the checkpoint's full ranks, but without these branches, and at the steps of a sampler."""
    spec = checkpoint.spec
    sampler = sampler or {"flow": "euler", "epsilon": "dpmsolver++"}[spec.objective]
    matrices = {}
    for matrix in spec.matrices():
        learngene, tailor = spec.ranks(matrix.name)
        ranks = {"learngene_rank": learngene, "tailor_rank": tailor}
        if form != "switch":
            ranks = {"rank": learngene + tailor * len(classes)}
        matrices[matrix.name] = MatrixPlan("factored", "fp32", **ranks)
        if branch_of(matrix.name) in dropped:
            matrices[matrix.name] = MatrixPlan("dropped", "fp32", **dict.fromkeys(ranks, 0))
    unknown = {field.name: None for field in dataclasses.fields(Plan)}
    plan = Plan(**{
        **unknown, "checkpoint_sha256": "", "form": form, "classes": classes, "matrices": matrices, "sampler": sampler,
        "modulation": "network" if spec.label_embedding else "baked", "steps": steps, "guidance": 2.0,
    })  # fmt: skip
    timesteps = torch.from_numpy(sampler_table(sampler, spec.objective, steps).timestep)
    return fold(truncate(checkpoint, plan, None), plan, timesteps)


def export(model: PlainDiT, folder: Path) -> ModelEntry:
    (file,) = exporter("diffusers").export(model, folder, ("fp32",))

    def infos(kind: str) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in file.entry[kind])

    return ModelEntry(file.path, "denoiser", file.precision, infos("inputs"), infos("outputs"))


def parity(model: PlainDiT, folder: Path, entry: ModelEntry) -> FileParity:
    """The written file against the gated forward, over classes, the null class and five of the plan's steps."""
    origin = model.origin
    reference = make_reference(origin.truncated, origin.plan.form, origin.timesteps, None)
    return verify_model(folder, entry, reference, origin.plan.classes)


@pytest.mark.parametrize(
    ("form", "classes", "overrides"),
    [
        ("single", ("coat",), {}),
        ("union", ("coat", "bag"), {}),
        ("single", ("coat",), LABELLED),
        ("union", ("coat", "bag"), LABELLED),
        ("switch", ("coat", "bag"), {**LABELLED, "tailor_rank": 0}),
    ],
)
def test_the_folder_keeps_the_gate(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, form: str, classes: tuple[str, ...], overrides: dict[str, Any]
) -> None:
    model = plain_model(make_checkpoint(**overrides), form, classes)
    entry = export(model, tmp_path)
    checked = parity(model, tmp_path, entry)
    assert checked.failures == ()
    assert len(checked.points) == (15 if form == "switch" else 5)
    readme = (tmp_path / "diffusers/README.md").read_text()
    assert ("guidance_scale=2.0" in readme) == (form == "switch")
    assert ("vae=" in readme) == ("channels" in overrides and model.spec.pixels_per_latent != 1)


@pytest.mark.parametrize("overrides", [{}, LABELLED])
def test_dropped_branches_are_zeros_there(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    dropped = ("blocks.0.mlp", "blocks.1.attn", "blocks.2.attn", "blocks.2.mlp")
    model = plain_model(make_checkpoint(depth=3, **overrides), "single", ("coat",), dropped=dropped)
    assert parity(model, tmp_path, export(model, tmp_path)).failures == ()


def test_a_damaged_folder_is_not_taken_for_a_model(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    model = plain_model(make_checkpoint(), "single", ("coat",))
    entry = export(model, tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    save_file({**weights, "proj_out_2.bias": weights["proj_out_2.bias"] + 1e-3}, tmp_path / WEIGHTS)
    assert "want 100 dB" in parity(model, tmp_path, entry).failures[0]
    save_file({name: t for name, t in weights.items() if name != "proj_out_2.bias"}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=r"proj_out_2\.bias"):
        parity(model, tmp_path, entry)
    (tmp_path / WEIGHTS).write_bytes(b"\0" * 8)
    with pytest.raises(InputError, match="cannot load"):
        parity(model, tmp_path, entry)


def test_from_diffusers_and_back(make_dit: Callable[..., Any], tmp_path: Path) -> None:
    """Import at full rank, merge, export: the same prediction for every class and the null class, at any timestep."""
    source = make_dit()
    source.save_pretrained(tmp_path / "dit")
    checkpoint = load_checkpoint(import_model(tmp_path / "dit", tmp_path / "kind", 16, 0, ("a", "b", "c")).folder)
    export(plain_model(checkpoint, "switch", ("c", "a")), tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path / "diffusers", vae=None)
    assert loaded.labels == {"c": 0, "a": 1}
    x, t = torch.randn(7, 4, 8, 8), torch.tensor([0.0, 1.0, 37.0, 400.0, 500.0, 998.0, 999.0])
    for label, there in ((2, 0), (0, 1), (3, 1000)):
        with torch.no_grad():
            wanted = source(x, t, torch.full((7,), label)).sample
            got = loaded.transformer(x, timestep=t, class_labels=torch.full((7,), there)).sample
        assert float((wanted - got).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("sampler", ["euler", "dpmsolver++", "ddim"])
def test_the_pipeline_draws_our_images(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """From the same noise, through diffusers' own loop and guidance; compared where the autoencoder takes over."""
    steps, noise = 6, torch.randn(2, 3, 8, 8)
    shape = {"channels": 3, "tailor_rank": 0, "objective": "flow" if sampler == "euler" else "epsilon"}
    model = plain_model(make_checkpoint(**shape), "switch", ("bag", "coat"), steps, sampler)
    export(model, tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path / "diffusers")
    loaded.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda **_: noise)
    drawn: list[torch.Tensor] = []
    decode = loaded.vae.decode
    monkeypatch.setattr(loaded.vae, "decode", lambda latents: drawn.append(latents) or decode(latents))
    assert len(loaded([0, 1], guidance_scale=2.0, num_inference_steps=steps, output_type="np").images) == 2
    gated = model.origin.truncated.model()
    wanted = sample(gated, noise, torch.tensor([0, 1]), model.spec.objective, steps, sampler)
    error = float((drawn[0] - wanted).norm() / wanted.norm())
    # diffusers' flow sigmas start at 0.999 where ours start at 1, and its timesteps are whole numbers.
    assert error < (5e-3 if sampler == "euler" else 1e-4), wanted.abs().max()


def test_the_autoencoder_of_pixel_models_changes_nothing_to_be_seen() -> None:
    autoencoder = passthrough_autoencoder(3, 12)
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 2.5 - 1.25
    with torch.no_grad():
        decoded = autoencoder.decode(images).sample
        encoded = autoencoder.encode(images).latent_dist.sample()
    assert float((decoded - images).abs().max()) < 1e-4
    assert float((encoded - images).abs().max()) < 1e-4


def test_what_a_dit_of_diffusers_cannot_be_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    tiny = make_checkpoint()
    moved = dataclasses.replace(tiny, tensors={**tiny.tensors, "pos_embed": tiny.tensors["pos_embed"] + 0.1})
    for checkpoint, form, steps, complaint in (
        (tiny, "switch", 6, "--form single --classes NAME"),
        (tiny, "single", 200, "fewer --steps"),
        (make_checkpoint(mlp_ratio=2.0), "single", 6, "MLP of 4 times"),
        (moved, "single", 6, "position table"),
    ):
        with pytest.raises(UsageError, match=complaint):
            export(plain_model(checkpoint, form, ("bag",), steps), tmp_path)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="fp32 only"):
        exporter("diffusers").export(plain_model(tiny, "single", ("bag",)), tmp_path, ())


@pytest.mark.slow
def test_the_whole_way_from_a_dit_to_a_smaller_dit(make_dit: Callable[..., Any], tmp_path: Path) -> None:
    """Import, plan for a device, cut, export both formats: one bundle whose every file keeps its gate."""
    make_dit(norm_eps=1e-2).save_pretrained(tmp_path / "dit")  # an epsilon that every format has to have
    import_model(tmp_path / "dit", tmp_path / "kind", 16, 0, ("a", "b", "c"))
    asked: dict[str, Any] = {"profile": "raspberry-pi-5", "precision": "fp32", "steps": 4, "max_flops": "90%"}
    bundle = pipeline.export(tmp_path / "kind", **asked, output=tmp_path / "b", formats=["diffusers"])
    assert bundle.parity.keys() == {"onnx/denoiser.onnx", "diffusers/transformer"}
    assert bundle.latency.keys() == {"onnx/denoiser.onnx"}
    assert bundle.plan.predicted_loss_increase > 0
    modes = {path.stat().st_mode for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert len(modes) == 1
    assert pipeline.verify(zip_bundle(tmp_path / "b"), tmp_path / "kind").passed
