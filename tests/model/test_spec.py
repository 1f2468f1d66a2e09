"""A spec is parsed once and strictly: what it says of the model is right, and nonsense is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kind_edge.errors import InputError, UsageError
from kind_edge.model.spec import ModelSpec, Ranks, named_spec

VALID: dict[str, Any] = {
    "image_size": 8, "channels": 1, "patch_size": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 3,
    "learngene_rank": 4, "tailor_rank": 2,
}  # fmt: skip


def test_round_trip_through_json() -> None:
    spec = ModelSpec(**VALID, matrix_ranks={"blocks.1.mlp.fc2": Ranks(3, 1)})
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.ranks("blocks.1.mlp.fc2").active == 4
    assert spec.ranks("blocks.0.mlp.fc2") == (4, 2)


def test_dropped_branches_leave_the_rest_in_its_place() -> None:
    whole = ModelSpec(**VALID, matrix_ranks={"blocks.1.mlp.fc2": Ranks(3, 1), "blocks.0.attn.o": Ranks(1, 1)})
    spec = whole.without_branches(["blocks.1.mlp", "blocks.0.attn"])
    assert "dropped_branches" not in whole.to_dict()
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.dropped_branches == ("blocks.0.attn", "blocks.1.mlp")
    assert spec.branches() == ("blocks.0.mlp", "blocks.1.attn")
    assert spec.branches("attn") == ("blocks.1.attn",)
    names = [shape.name for shape in spec.matrices()]
    assert names == [
        *(f"blocks.0.mlp.{part}" for part in ("fc1", "fc2")),
        *(f"blocks.1.attn.{part}" for part in "qkvo"),
    ]
    assert spec.matrix_ranks == {}
    assert spec.dense().branches() == whole.branches()


def test_matrices_are_the_six_of_every_block() -> None:
    shapes = list(ModelSpec(**VALID).matrices())
    names = [
        f"blocks.{i}.{part}" for i in (0, 1) for part in ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc1", "mlp.fc2"]
    ]
    assert [shape.name for shape in shapes] == names
    assert {shape[1:] for shape in shapes} == {(16, 16), (64, 16), (16, 64)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wdith": 16}, ("wdith", "width")),
        ({"width": 0}, ("width", "0")),
        ({"width": 18}, ("18", "multiple")),
        ({"depth": True}, ("depth", "True")),
        ({"tailor_rank": -1}, ("tailor_rank", "-1")),
        ({"image_size": 9}, ("patch_size", "2", "9")),
        ({"objective": "score"}, ("score", "epsilon", "flow")),
        ({"learned_sigma": True}, ("learned_sigma", "epsilon")),
        ({"matrix_ranks": {"blocks.0.attn.x": [1, 1]}}, ("blocks.0.attn.x", "blocks.0.attn.")),
        ({"matrix_ranks": {"blocks.0.attn.q": 3}}, ("blocks.0.attn.q", "3")),
        ({"matrix_ranks": {"blocks.0.attn.q": [3, -1]}}, ("blocks.0.attn.q", "-1")),
        ({"matrix_ranks": 5}, ("matrix_ranks", "5")),
        ({"mlp_ratio": "4"}, ("mlp_ratio", "'4'")),
        ({"mlp_ratio": 0}, ("mlp_ratio", "0")),
        ({"factored": "yes"}, ("factored", "yes")),
        ({"timestep_frequency_shift": 2}, ("timestep_frequency_shift", "2", "diffusers")),
        ({"mlp_norm_eps": 0}, ("mlp_norm_eps", "0")),
        ({"dropped_branches": "blocks.0.attn"}, ("dropped_branches", "blocks.0.attn")),
        ({"dropped_branches": ["blocks.2.attn"]}, ("dropped_branches", "blocks.2.attn", "blocks.1.attn")),
        ({"dropped_branches": ["blocks.1.attn", "blocks.0.mlp"]}, ("dropped_branches", "order")),
        ({"dropped_branches": ["blocks.0.mlp"], "matrix_ranks": {"blocks.0.mlp.fc1": [1, 1]}}, ("blocks.0.mlp.fc1",)),
    ],
)
def test_nonsense_is_refused_by_name(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        ModelSpec.from_dict({**VALID, **changes}, "config.json: model")
    for word in ("config.json: model", *words):
        assert word in str(caught.value)


def test_a_missing_key_is_named() -> None:
    values = {key: value for key, value in VALID.items() if key != "heads"}
    with pytest.raises(InputError, match=r"here: missing heads"):
        ModelSpec.from_dict(values, "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learngene_rank": 17}, "learngene_rank: got 17, want at most 16: blocks.0.attn.q is 16 x 16"),
        ({"tailor_rank": 17}, "tailor_rank: got 17, want at most 16"),
        ({"matrix_ranks": {"blocks.1.mlp.fc2": Ranks(2, 17)}}, r"fc2'\], tailor_rank: .* is 16 x 64"),
    ],
)
def test_ranks_beyond_the_matrix_are_not_trained(changes: dict[str, Any], message: str) -> None:
    full = {**VALID, "learngene_rank": 16, "tailor_rank": 16}
    ModelSpec(**full).check_trainable_ranks()  # an import may give learngene and tailor all there is
    ModelSpec(**{**full, **changes, "factored": False}).check_trainable_ranks()
    with pytest.raises(InputError, match=message):
        ModelSpec(**{**full, **changes}).check_trainable_ranks()


def test_the_dense_model_of_the_same_shape() -> None:
    dense = ModelSpec(**VALID, matrix_ranks={"blocks.0.attn.q": Ranks(1, 1)}).dense()
    assert not dense.factored
    assert (dense.width, dense.depth, dense.num_classes, dict(dense.matrix_ranks)) == (16, 2, 3, {})


@pytest.mark.parametrize("arch", ["DiT-B", "DiT-B/3", "dit-b/2", "DiT-M/2"])
def test_unknown_architectures_are_refused_with_the_nearest(arch: str) -> None:
    with pytest.raises(UsageError, match="DiT-"):
        named_spec(arch, 10)
    with pytest.raises(UsageError, match="--num-classes"):
        named_spec("DiT-B/2", 0)
