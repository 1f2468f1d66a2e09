"""Any depth, any width: what the methods promise of a stack, and what is left of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import idctn

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import Checkpoint, check_tensors
from kind_edge.model.gated_linear import ClassGate
from kind_edge.model.resize import METHOD_NAMES, METHODS, resized, target_spec
from kind_edge.model.resize_axes import Axis, Kind, resize_kind
from kind_edge.model.resize_bot import bot
from kind_edge.model.resize_front import front
from kind_edge.model.spec import ModelSpec, Ranks

SIZES = st.tuples(*(st.integers(1, 9),) * 3)
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
STUDY = ModelSpec(28, 1, 4, 64, 4, 4, 10, learngene_rank=24, tailor_rank=4)


def white(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def band_limited(shape: tuple[int, int, int], band: tuple[int, int, int]) -> np.ndarray:
    """A stack whose spectrum ends at `band`."""
    spectrum = np.zeros(shape)
    spectrum[tuple(map(slice, band))] = white(band)
    return idctn(spectrum, norm="ortho")


@EVERY
@settings(max_examples=20)
@given(old=SIZES, new=SIZES, seed=st.integers(0, 99))
def test_every_method_is_linear_and_exact_at_equal_size(method: Any, old: Any, new: Any, seed: int) -> None:
    a, b = white(old, seed), white(old, seed + 100)
    assert np.array_equal(method(a, old), a)
    assert method(a, new).shape == new
    np.testing.assert_allclose(method(2 * a - b, new), 2 * method(a, new) - method(b, new), atol=1e-9)


@settings(max_examples=20)
@given(small=SIZES, factor=st.tuples(*(st.integers(1, 4),) * 3))
def test_front_brings_a_band_limited_stack_back(small: Any, factor: Any) -> None:
    large = tuple(s * f for s, f in zip(small, factor, strict=True))
    stack = band_limited(large, small)
    np.testing.assert_allclose(front(front(stack, small), large), stack, atol=1e-9)


@settings(max_examples=20)
@given(small=SIZES, more=st.tuples(*(st.integers(0, 8),) * 3))
@pytest.mark.parametrize("method", [front, bot])
def test_smaller_undoes_larger(method: Any, small: Any, more: Any) -> None:
    large = tuple(s + m for s, m in zip(small, more, strict=True))
    stack = white(small)
    np.testing.assert_allclose(method(method(stack, large), small), stack, atol=1e-9)


@pytest.mark.parametrize(("old", "new"), [(48, 96), (96, 48), (64, 80)])
def test_smooth_weights_do_to_smooth_inputs_what_they_did(old: int, new: int) -> None:
    """The scale of FRONT: outputs keep their amplitude, as functions of the place."""

    def response(stack: np.ndarray) -> np.ndarray:
        places = (np.arange(stack.shape[2]) + 0.5) / stack.shape[2]
        return stack[0] @ (0.5 + np.cos(3 * np.pi * places))

    stack = band_limited((1, old, old), (1, 6, 6))
    was, now = response(stack), response(front(stack, (1, new, new)))
    assert np.square(now).mean() == pytest.approx(np.square(was).mean(), rel=0.02)


@EVERY
@pytest.mark.parametrize("new", [(3, 32, 32), (6, 24, 64), (3, 64, 24)])
def test_a_smaller_layer_keeps_the_variance_of_its_outputs(method: Any, new: tuple[int, int, int]) -> None:
    stack = white((6, 64, 64))
    kind = Kind("blocks.{}.mlp.fc1.weight", Axis(64, new[1]), Axis(64, new[2]))
    now = np.stack(resize_kind(method, kind, list(stack), new[0]))
    assert now.shape == new
    assert np.square(now).sum(2).mean() == pytest.approx(np.square(stack).sum(2).mean(), rel=0.1)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [((None, 32), (4, 32, 2, 12, 2)), ((2, None), (2, 64, 4, 24, 4)), ((3, 48), (3, 48, 3, 18, 3)),
     ((5, 80), (5, 80, 5, 30, 5))],
)  # fmt: skip
def test_heads_and_ranks_go_with_the_width(sizes: Any, wanted: tuple[int, ...]) -> None:
    spec = target_spec(STUDY, *sizes)
    assert (spec.depth, spec.width, spec.heads, spec.learngene_rank, spec.tailor_rank) == wanted


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"width": 60}, ("width: got 60", "steps of 16", "nearest: 48, 64")),
        ({"width": 8}, ("width: got 8", "16 to 256", "nearest: 16")),
        ({"depth": 0}, ("depth: got 0", "nearest: 1")),
        ({"depth": 17}, ("depth: got 17", "1 to 16", "4 times", "nearest: 16")),
        ({"width": 32, "learngene_rank": 40}, ("learngene_rank: got 40", "1 to 32", "nearest is 32")),
        ({"tailor_rank": -1}, ("tailor_rank: got -1", "nearest is 0")),
    ],
)
def test_impossible_sizes_are_refused_with_the_nearest(asked: dict[str, int], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        target_spec(STUDY, **asked)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.fixture(scope="module")
def tiny(make_checkpoint: Callable[..., Checkpoint]) -> Checkpoint:
    return make_checkpoint(width=32, depth=3, heads=4, num_classes=2, learngene_rank=12, tailor_rank=4, nested=True)


def predictions(checkpoint: Checkpoint) -> torch.Tensor:
    stream = torch.Generator().manual_seed(1)
    shape = checkpoint.spec.channels, checkpoint.spec.image_size, checkpoint.spec.image_size
    x, timestep = torch.randn(12, *shape, generator=stream), torch.rand(12, generator=stream) * 1000
    return checkpoint.model()(x, timestep, torch.arange(12) % (checkpoint.spec.num_classes + 1))


@pytest.mark.parametrize("name", ["front", "fit"])
def test_at_its_own_size_a_model_stays_what_it_is(name: str, tiny: Checkpoint) -> None:
    same = resized(tiny, target_spec(tiny.spec), name)
    assert same.spec == tiny.spec
    torch.testing.assert_close(predictions(same), predictions(tiny), atol=1e-4, rtol=1e-4)
    for shape in tiny.spec.matrices():  # nested: the most important component first
        u, s, v = (same.tensors[f"{shape.name}.learngene.{part}"] for part in "UsV")
        assert (s >= 0).all()
        torch.testing.assert_close(v.norm(dim=0), torch.ones(12))
        torch.testing.assert_close(u.T @ u, torch.eye(12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", METHOD_NAMES)
@pytest.mark.parametrize(
    ("dense", "sizes"), [(False, (2, 16)), (False, (5, 40)), (True, (3, 24)), (True, (6, 48))],
    ids=["KIND-smaller", "KIND-larger", "dense-smaller", "dense-larger"],
)  # fmt: skip
def test_every_size_is_a_whole_model(
    name: str, dense: bool, sizes: tuple[int, int], tiny: Checkpoint, make_checkpoint: Callable[..., Checkpoint]
) -> None:
    source = tiny
    if dense:
        source = make_checkpoint(width=32, depth=3, heads=4, num_classes=2, factored=False, label_embedding=True,
            learned_sigma=True, objective="epsilon", learngene_rank=0, tailor_rank=0)  # fmt: skip
    done = resized(source, target_spec(source.spec, *sizes), name)
    check_tensors(done.spec, {n: tuple(t.shape) for n, t in done.tensors.items()}, name)
    assert (done.spec.depth, done.spec.width, done.spec.nested) == (*sizes, not dense)
    assert torch.isfinite(predictions(done)).all()
    assert done.provenance["resized"]["to"]["width"] == sizes[1]
    assert done.provenance["recommended"] == source.provenance["recommended"]


def test_twins_compute_what_one_did(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the width by Haar's inverse is the same function: up to the noise that tells twins apart."""
    target = target_spec(tiny.spec, width=64)
    noisy = predictions(resized(tiny, target, "bot"))
    monkeypatch.setattr("kind_edge.model.resize.TWIN_NOISE", 0.0)
    torch.testing.assert_close(predictions(resized(tiny, target, "bot")), predictions(tiny), atol=1e-3, rtol=1e-3)
    assert 0 < (noisy - predictions(tiny)).square().mean() < 0.01 * predictions(tiny).square().mean()


def test_a_tailor_goes_on_being_its_class_s(tiny: Checkpoint) -> None:
    """Class 1's tailor alone is doubled: of the resized model, class 0 and the null branch stay."""
    tensors = dict(tiny.tensors)
    for shape in tiny.spec.matrices():
        tensors[f"{shape.name}.tailors.s"] = tensors[f"{shape.name}.tailors.s"].clone()
        tensors[f"{shape.name}.tailors.s"][1] *= 2
    target = target_spec(tiny.spec, 2, 24, learngene_rank=24, tailor_rank=24)
    one, other = (resized(c, target, "front") for c in (tiny, dataclasses.replace(tiny, tensors=tensors)))
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    gate = ClassGate.of(torch.tensor([0, 2, 2, 2, 1]), 2)
    timestep = torch.full((5,), 500.0)
    change = (one.model()(x, timestep, gate) - other.model()(x, timestep, gate)).square().flatten(1).mean(1)
    assert (change[:4] < 1e-6).all()
    assert change[4] > 1e-3


def test_what_cannot_be_resized(tiny: Checkpoint, make_checkpoint: Callable[..., Checkpoint]) -> None:
    with pytest.raises(UsageError, match="unknown method 'frnt'; did you mean: front"):
        resized(tiny, tiny.spec, "frnt")
    with pytest.raises(InputError, match="more than its sizes"):
        resized(tiny, dataclasses.replace(tiny.spec, num_classes=3), "front")
    few_steps = make_checkpoint(step_counts=(1, 2), inside_guidance=1.5)
    with pytest.raises(UsageError, match="distil again"):
        resized(few_steps, target_spec(few_steps.spec, 4), "front")
    cut = dataclasses.replace(tiny, spec=dataclasses.replace(tiny.spec, matrix_ranks={"blocks.0.attn.q": Ranks(3, 1)}))
    assert target_spec(cut.spec, 2).matrix_ranks == {}
