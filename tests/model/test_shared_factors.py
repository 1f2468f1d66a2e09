"""Learngenes on U and V that all blocks have in common: the same function as with copies, one gradient, one order."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kind_edge.errors import InputError
from kind_edge.model.calibration import Calibration, calibrate_on_images
from kind_edge.model.checkpoint import Checkpoint, check_tensors, load_checkpoint, save_checkpoint
from kind_edge.model.dit import DiT, initialise
from kind_edge.model.gated_linear import ClassGate, GatedLinear
from kind_edge.model.names import weight_type
from kind_edge.model.resize import METHODS, resized, target_spec
from kind_edge.model.spec import ModelSpec, Ranks
from kind_edge.model.truncation import fold_matrix, reordered

MakeCheckpoint = Callable[..., Checkpoint]
SHAPE = {"depth": 3, "shared_factors": True}


def with_copies(checkpoint: Checkpoint) -> Checkpoint:
    """The ordinary model with the same factors, a copy of U and V in every block."""
    spec = dataclasses.replace(checkpoint.spec, shared_factors=False)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("shared.")}
    for shape in spec.matrices():
        for part in "UV":
            copied = checkpoint.tensors[checkpoint.spec.factor_name(shape.name, part)]
            tensors[spec.factor_name(shape.name, part)] = copied.clone()
    return Checkpoint(spec, checkpoint.class_names, tensors, checkpoint.provenance)


def inputs(spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(10, spec.channels, spec.image_size, spec.image_size, generator=generator)
    return sample, torch.rand(10, generator=generator) * 1000, torch.arange(10) % (spec.num_classes + 1)


def test_an_ordinary_spec_is_written_as_ever(make_checkpoint: MakeCheckpoint) -> None:
    ordinary = make_checkpoint().spec
    assert "shared_factors" not in ordinary.to_dict()
    shared = dataclasses.replace(ordinary, shared_factors=True)
    assert ModelSpec.from_dict(shared.to_dict()) == shared != ordinary
    assert not shared.dense().shared_factors


def test_the_file_holds_factors_once(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(**SHAPE)
    save_checkpoint(tmp_path, checkpoint)
    loaded = load_checkpoint(tmp_path)
    held = {re.sub(r"blocks\.\d", "blocks.l", name) for name in loaded.tensors if "attn.q" in name}
    own = {f"blocks.l.attn.q.{part}" for part in ("bias", "learngene.s", "tailors.U", "tailors.s", "tailors.V")}
    assert held == own | {"shared.attn.q.U", "shared.attn.q.V"}
    rank, width, hidden = checkpoint.spec.learngene_rank, checkpoint.spec.width, checkpoint.spec.hidden_width
    once = rank * (8 * width + 2 * (width + hidden))  # four square matrices, two to and from the hidden layer
    copies, shared = (sum(t.numel() for t in c.tensors.values()) for c in (with_copies(checkpoint), checkpoint))
    assert copies - shared == (checkpoint.spec.depth - 1) * once


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_function_is_that_of_copies_and_the_gradient_their_sum(
    share: float, make_checkpoint: MakeCheckpoint
) -> None:
    checkpoint = make_checkpoint(**SHAPE)
    copies = with_copies(checkpoint)
    sample, timestep, classes = inputs(checkpoint.spec)
    gate = dataclasses.replace(ClassGate.of(classes, checkpoint.spec.num_classes), learngene_share=share)
    gradients = []
    for each in (checkpoint, copies):
        model = each.model().requires_grad_(True)
        out = model(sample, timestep, gate)
        out.square().mean().backward()
        gradients.append((out, {name: parameter.grad for name, parameter in model.named_parameters()}))
    (got, shared), (wanted, own) = gradients
    torch.testing.assert_close(got, wanted)
    for shape in checkpoint.spec.weight_types().values():
        blocks = [m.name for m in checkpoint.spec.matrices() if weight_type(m.name) == weight_type(shape.name)]
        for part in "UV":
            summed = sum(own[copies.spec.factor_name(name, part)] for name in blocks)
            torch.testing.assert_close(shared[checkpoint.spec.factor_name(shape.name, part)], summed)
    assert all(torch.equal(shared[name], own[name]) for name in shared.keys() & own.keys() if name.endswith("bias"))


def test_a_fresh_model_has_the_scale_of_an_ordinary_one_and_blocks_that_differ() -> None:
    spec = ModelSpec(8, 1, 2, 64, 4, 2, 3, learngene_rank=24, tailor_rank=4, shared_factors=True)
    model = initialise(DiT(spec), 0)
    for kind in ("attn.q", "mlp.fc1"):
        layers = [model.get_submodule(f"blocks.{block}.{kind}") for block in range(spec.depth)]
        assert all(isinstance(layer, GatedLinear) for layer in layers)
        n, m = layers[0].shape.outputs, layers[0].shape.inputs
        products = torch.stack([layer.learngene.product() for layer in layers])
        active = products + torch.stack([layer.tailors.product()[0] for layer in layers])
        assert active.square().sum((1, 2)).sub(n * m * 2 / (n + m)).abs().max() < 0.15 * n * m * 2 / (n + m)
        flat = torch.nn.functional.normalize(products.flatten(1))
        assert (flat @ flat.T - torch.eye(spec.depth)).abs().max() < 0.75


@pytest.fixture
def calibrated(make_checkpoint: MakeCheckpoint) -> tuple[Checkpoint, Calibration]:
    checkpoint = make_checkpoint(**SHAPE)
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return checkpoint, calibrate_on_images(checkpoint.model(), images, torch.arange(16) % 4)


def test_components_are_put_in_one_order_for_all_blocks(calibrated: tuple[Checkpoint, Calibration]) -> None:
    drawn, calibration = calibrated
    turned = {n: t.flip(-1) if n.startswith("shared.") or ".learngene." in n else t for n, t in drawn.tensors.items()}
    checkpoint = dataclasses.replace(drawn, tensors=turned)  # the least important ones first
    ordered = reordered(checkpoint, calibration)
    sample, timestep, classes = inputs(checkpoint.spec)
    before, after = (each.model()(sample, timestep, classes) for each in (checkpoint, ordered))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    kept = {}
    for name, each in (("turned", checkpoint), ("drawn", drawn), ("ordered", ordered)):
        folded = [fold_matrix(each, shape.name, [0], "switch", calibration) for shape in each.spec.matrices()]
        kept[name] = sum(float(f.shared.energy[:3].sum() / f.shared.energy.sum()) for f in folded)
    assert kept["ordered"] > kept["drawn"] > 1.5 * kept["turned"]


def test_a_cut_keeps_leading_components_and_blocks_alike(calibrated: tuple[Checkpoint, Calibration]) -> None:
    checkpoint, calibration = calibrated
    cuts = [fold_matrix(checkpoint, f"blocks.{i}.mlp.fc1", [1], "switch", calibration).shared.cut(4) for i in range(3)]
    for i, part in enumerate(cuts):
        assert torch.equal(part.U, checkpoint.tensors["shared.mlp.fc1.U"][:, :4].double())
        assert torch.equal(part.V, checkpoint.tensors["shared.mlp.fc1.V"][:, :4].double())
        assert torch.equal(part.s, checkpoint.tensors[f"blocks.{i}.mlp.fc1.learngene.s"][:4].double())


def test_what_cannot_be_shared_is_refused(make_checkpoint: MakeCheckpoint) -> None:
    spec = make_checkpoint(**SHAPE).spec
    with pytest.raises(InputError, match="a dense model has no factors to share"):
        dataclasses.replace(spec, factored=False)
    with pytest.raises(InputError, match=r"blocks.1.attn.q has learngene rank 5, .*one rank per weight type"):
        dataclasses.replace(spec, matrix_ranks={"blocks.1.attn.q": Ranks(5, 2)})
    assert dataclasses.replace(spec, matrix_ranks={f"blocks.{i}.attn.q": Ranks(5, i) for i in range(3)})
    with pytest.raises(InputError, match="shared_factors: got 1, want true or false"):
        dataclasses.replace(spec, shared_factors=1)


@pytest.mark.parametrize(("method", "depth"), [("front", 2), *((method, 7) for method in METHODS)])
def test_any_depth_keeps_what_blocks_have_in_common(method: str, depth: int, make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(**SHAPE)
    spec = target_spec(checkpoint.spec, depth=depth)
    deeper = resized(checkpoint, spec, method)
    check_tensors(spec, {name: tuple(tensor.shape) for name, tensor in deeper.tensors.items()}, "resized")
    assert spec == dataclasses.replace(checkpoint.spec, depth=depth)
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("shared."):
            assert torch.equal(deeper.tensors[name], tensor), name
    sample, timestep, classes = inputs(spec)
    assert torch.isfinite(deeper.model()(sample, timestep, classes)).all()


def test_s_goes_smoothly_through_the_depth(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(**{**SHAPE, "depth": 4})
    tensors = dict(checkpoint.tensors)
    for block in range(4):
        tensors[f"blocks.{block}.attn.v.learngene.s"] = torch.full((6,), 1 + block / 3)
    deeper = resized(dataclasses.replace(checkpoint, tensors=tensors), target_spec(checkpoint.spec, depth=8), "front")
    through = torch.stack([deeper.tensors[f"blocks.{block}.attn.v.learngene.s"][0] for block in range(8)])
    assert (through.diff() > 0).all()
    assert abs(through.mean() - 1.5) < 0.02


def test_another_width_resizes_the_factors_and_never_invents_components(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(**{**SHAPE, "heads": 4})
    for width, rank in ((12, 5), (20, 6)):
        spec = target_spec(checkpoint.spec, width=width)
        assert (spec.learngene_rank, spec.shared_factors) == (rank, True)
        other = resized(checkpoint, spec, "front")
        check_tensors(spec, {name: tuple(tensor.shape) for name, tensor in other.tensors.items()}, "resized")
    with pytest.raises(InputError, match=r"learngene_rank: got 7, want 1 to 6 \(the components there are\)"):
        target_spec(checkpoint.spec, width=20, learngene_rank=7)
