"""Import: a foreign DiT becomes a KIND checkpoint that computes the same, from either layout, or is refused by name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint, load_checkpoint
from kind_edge.model.convert import Imported, import_model

WIDTH, CLASSES, DEPTH = 16, 3, 2
TIMESTEPS = (0.0, 1.0, 37.0, 500.0, 999.0)
MakeDiT = Callable[..., DiTTransformer2DModel]
Imports = Callable[..., Imported]


def facebook_names(model: DiTTransformer2DModel) -> dict[str, Tensor]:
    """The same weights as facebookresearch/DiT's own model names and stacks them."""
    theirs = model.state_dict()
    state = {"pos_embed": model.pos_embed.pos_embed}

    def layer(new: str, *old: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{new}.{kind}"] = torch.cat([theirs[f"{name}.{kind}"] for name in old])

    embedders = "transformer_blocks.0.norm1.emb"
    layer("x_embedder.proj", "pos_embed.proj")
    layer("t_embedder.mlp.0", f"{embedders}.timestep_embedder.linear_1")
    layer("t_embedder.mlp.2", f"{embedders}.timestep_embedder.linear_2")
    state["y_embedder.embedding_table.weight"] = theirs[f"{embedders}.class_embedder.embedding_table.weight"]
    for i in range(DEPTH):
        old, new = f"transformer_blocks.{i}", f"blocks.{i}"
        layer(f"{new}.attn.qkv", *(f"{old}.attn1.to_{part}" for part in "qkv"))
        layer(f"{new}.attn.proj", f"{old}.attn1.to_out.0")
        layer(f"{new}.mlp.fc1", f"{old}.ff.net.0.proj")
        layer(f"{new}.mlp.fc2", f"{old}.ff.net.2")
        layer(f"{new}.adaLN_modulation.1", f"{old}.norm1.linear")
    layer("final_layer.adaLN_modulation.1", "proj_out_1")
    layer("final_layer.linear", "proj_out_2")
    return state


def as_facebook_computes(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """diffusers' model with the two details in which the original differs."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return model


def worst_error(reference: DiTTransformer2DModel, checkpoint: Checkpoint) -> float:
    """Largest relative error over classes, the null class and timesteps."""
    model, worst = checkpoint.model(), 0.0
    for label in range(checkpoint.spec.num_classes + 1):
        x = torch.randn(len(TIMESTEPS), 4, 8, 8, generator=torch.Generator().manual_seed(label))
        t, classes = torch.tensor(TIMESTEPS), torch.full((len(TIMESTEPS),), label)
        with torch.no_grad():
            wanted = reference(x, t, classes).sample
            got = model(x, t, classes)
        worst = max(worst, *((a - b).norm() / a.norm() for a, b in zip(wanted, got, strict=True)))
    return float(worst)


@pytest.fixture
def imports(tmp_path: Path) -> Imports:
    def run(source: Path, learngene: int = WIDTH, tailor: int = 2, **options: Any) -> Imported:
        return import_model(source, tmp_path / "out", learngene, tailor, **options)

    return run


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-2])
@pytest.mark.parametrize("attention_bias", [True, False])
def test_a_diffusers_dit_computes_the_same(
    imports: Imports, make_dit: MakeDiT, tmp_path: Path, norm_eps: float, attention_bias: bool
) -> None:
    model = make_dit(norm_eps=norm_eps, attention_bias=attention_bias, out_channels=4 if attention_bias else 8)
    model.save_pretrained(tmp_path / "dit")
    done = imports(tmp_path / "dit")
    assert worst_error(model, load_checkpoint(done.folder)) < 1e-5
    assert (done.learngene_energy, done.active_energy) == (1.0, 1.0)
    assert done.class_names == ("class-0", "class-1", "class-2")


@pytest.mark.parametrize("wrapped", ["bare", "model", "ema"])
def test_a_facebook_dit_computes_the_same(imports: Imports, make_dit: MakeDiT, tmp_path: Path, wrapped: str) -> None:
    model = make_dit()
    state: dict[str, Any] = facebook_names(model)
    if wrapped != "bare":  # as DiT's train.py saves it; where there is an average, the other weights are not taken
        state = {wrapped: state, "args": argparse.Namespace(model="DiT-S/2"), "opt": {}}
        state |= {} if wrapped == "model" else {"model": {"x_embedder.proj.weight": torch.zeros(1)}}
    torch.save(state, tmp_path / "dit.pt")
    done = imports(tmp_path / "dit.pt", heads=2, class_names=("a", "b", "c"))
    checkpoint = load_checkpoint(done.folder)
    assert worst_error(as_facebook_computes(model), checkpoint) < 1e-5
    assert checkpoint.class_names == ("a", "b", "c")
    assert checkpoint.spec.learned_sigma
    # The other convention is not close, so the test above can fail.
    assert worst_error(make_dit(), checkpoint) > 1e-3


def test_every_active_matrix_is_the_best_of_its_rank(imports: Imports, make_dit: MakeDiT, tmp_path: Path) -> None:
    model = make_dit()
    model.save_pretrained(tmp_path / "dit")
    done = imports(tmp_path / "dit", learngene=6, tailor=3)
    checkpoint = load_checkpoint(done.folder)
    original = model.state_dict()["transformer_blocks.1.ff.net.0.proj.weight"].double()
    s = torch.linalg.svdvals(original)
    layer = checkpoint.model().blocks[1].mlp.fc1
    for tailor in layer.tailors.product():
        error = original - layer.learngene.product() - tailor
        assert float(error.norm()) == pytest.approx(float(s[9:].norm()), rel=1e-5)
    assert 0 < done.learngene_energy < done.active_energy < 1
    assert bool((layer.tailors.s > 0).all())


def test_tailors_beyond_the_last_component_change_nothing_and_can_learn(
    imports: Imports, make_dit: MakeDiT, tmp_path: Path
) -> None:
    make_dit().save_pretrained(tmp_path / "dit")
    layer = load_checkpoint(imports(tmp_path / "dit", WIDTH - 1, 3).folder).model().blocks[0].attn.q
    assert layer.tailors.s.count_nonzero(1).tolist() == [1] * CLASSES
    fresh = layer.tailors.U[:, :, 1:]
    assert torch.allclose(fresh.norm(dim=1), torch.ones(CLASSES, 2))
    assert len(fresh.flatten(1).unique(dim=0)) == CLASSES


def test_a_pipeline_brings_its_class_names(imports: Imports, make_dit: MakeDiT, tmp_path: Path) -> None:
    make_dit().save_pretrained(tmp_path / "pipe" / "transformer")
    index = {"_class_name": "DiTPipeline", "id2label": {"0": "tench, Tinca", "1": "crane", "2": "crane, machine"}}
    (tmp_path / "pipe/model_index.json").write_text(json.dumps(index))
    assert imports(tmp_path / "pipe").class_names == ("tench", "crane 1", "crane 2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_type", "ada_norm_single"),
        ("activation_fn", "geglu"),
        ("norm_elementwise_affine", True),
        ("cross_attention_dim", 768),
        ("use_linear_projection", True),
        ("out_channels", 5),
        ("num_layers", "2"),
        ("norm_eps", -1.0),
        ("_class_name", "PixArtTransformer2DModel"),
    ],
)
def test_options_that_are_not_ours_are_refused_by_name(
    imports: Imports, make_dit: MakeDiT, tmp_path: Path, key: str, value: object
) -> None:
    make_dit().save_pretrained(tmp_path / "dit")
    config = tmp_path / "dit/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(InputError, match=str(value) if key in ("_class_name", "out_channels") else key):
        imports(tmp_path / "dit")
    assert not (tmp_path / "out").exists()


def test_blocks_with_embedders_of_their_own_are_refused(imports: Imports, make_dit: MakeDiT, tmp_path: Path) -> None:
    model = make_dit()
    model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_2.bias += 1e-3
    model.save_pretrained(tmp_path / "dit")
    with pytest.raises(InputError, match=r"transformer_blocks\.1.*linear_2\.bias differs"):
        imports(tmp_path / "dit")


def test_another_noise_schedule_is_refused(imports: Imports, make_dit: MakeDiT, tmp_path: Path) -> None:
    make_dit().save_pretrained(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe/model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    (tmp_path / "pipe/scheduler").mkdir()
    (tmp_path / "pipe/scheduler/scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    with pytest.raises(InputError, match="prediction_type is 'v_prediction'"):
        imports(tmp_path / "pipe")


def test_tensors_that_are_missing_left_over_misshapen_or_not_finite(
    imports: Imports, make_dit: MakeDiT, tmp_path: Path
) -> None:
    whole = facebook_names(make_dit())
    without = {name: t for name, t in whole.items() if name != "blocks.1.attn.qkv.bias"}
    for state, complaint in (
        (without, r"blocks\.1\.attn\.qkv\.bias is missing"),
        ({**whole, "blocks.0.attn.q_norm.weight": torch.ones(8)}, r"q_norm\.weight: no part of"),
        ({**whole, "final_layer.linear.bias": torch.ones(3)}, r"has shape \(3,\), want \(32,\)"),
        ({**whole, "blocks.0.mlp.fc2.bias": torch.full((WIDTH,), torch.nan)}, "not finite"),
        ({**whole, "pos_embed": torch.zeros(1, 15, WIDTH)}, "15 tokens"),
        (nn.Linear(2, 2).state_dict(), r"x_embedder\.proj\.weight is missing"),
        ({"model": [1, 2]}, "'model' is no tensor"),
        ([1, 2], "holds list"),
    ):
        torch.save(state, tmp_path / "dit.pt")
        with pytest.raises(InputError, match=complaint):
            imports(tmp_path / "dit.pt", heads=2)


def test_ranks_heads_and_names_that_do_not_fit(imports: Imports, make_dit: MakeDiT, tmp_path: Path) -> None:
    torch.save(facebook_names(make_dit()), tmp_path / "dit.pt")
    for options, complaint in (
        ({}, "--heads is missing"),
        ({"heads": 2, "learngene": WIDTH + 1}, "want 1 to 16"),
        ({"heads": 2, "tailor": -1}, "--tailor-rank"),
        ({"heads": 2, "class_names": ("a", "b", "c", "d")}, "has 3 classes"),
        ({"heads": 2, "class_names": ("a", "a", "b")}, "2 of them different"),
    ):
        with pytest.raises(UsageError, match=complaint):
            imports(tmp_path / "dit.pt", **options)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        imports(tmp_path / "dit.pt", heads=2)
