"""DiT weights under other names: facebookresearch's state dict and diffusers' `DiTTransformer2DModel`.

The common ground is our own dense model (`ModelSpec.factored` false): every layout is translated to its tensor names.
What differs beside names: facebookresearch stacks q, k and v; diffusers gives every block a copy of the timestep and
label embedders; both order a token's values (P, P, ch) where ours are (ch, P, P).
Symbols: D width, L blocks, C classes, P patch side, N tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kind_edge.errors import InputError, UsageError
from kind_edge.model.dit import sincos_position_table
from kind_edge.model.spec import ModelSpec, standard_heads

_FACEBOOK = {
    "patch_embed": "x_embedder.proj",
    "t_embed.fc1": "t_embedder.mlp.0",
    "t_embed.fc2": "t_embedder.mlp.2",
    "final.adaln": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}
_FACEBOOK_BLOCK = {"adaln": "adaLN_modulation.1", "attn.o": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}

_DIFFUSERS = {"patch_embed": "pos_embed.proj", "final.adaln": "proj_out_1", "final.linear": "proj_out_2"}
_DIFFUSERS_BLOCK = {
    "adaln": "norm1.linear",
    "attn.q": "attn1.to_q",
    "attn.k": "attn1.to_k",
    "attn.v": "attn1.to_v",
    "attn.o": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_DIFFUSERS_EMBEDDERS = {
    "t_embed.fc1.weight": "timestep_embedder.linear_1.weight",
    "t_embed.fc1.bias": "timestep_embedder.linear_1.bias",
    "t_embed.fc2.weight": "timestep_embedder.linear_2.weight",
    "t_embed.fc2.bias": "timestep_embedder.linear_2.bias",
    "y_embed.weight": "class_embedder.embedding_table.weight",
}
_DIFFUSERS_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "norm_type": ("ada_norm_zero",),
    "activation_fn": ("gelu-approximate",),
    "norm_elementwise_affine": (False,),
    "attention_type": ("default",),
    "interpolation_scale": (1, 1.0),
}
"""Options of diffusers with the values that our model computes; any other value is refused."""
_DIFFUSERS_SHAPES = (
    "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "sample_size",
    "patch_size", "num_embeds_ada_norm", "attention_bias", "norm_eps",
)  # fmt: skip
_WITHOUT_EFFECT = ("dropout", "norm_num_groups", "upcast_attention")
"""What changes neither the function nor a shape; dropout acts in training alone."""


_OLD_CLASS = "Transformer2DModel"
_OLD_DEFAULTS = {"norm_type": "layer_norm", "activation_fn": "geglu", "norm_elementwise_affine": True}
"""What the published DiTs are called in their config.json, and what an option missing there means."""
DIFFUSERS_CLASSES = ("DiTTransformer2DModel", _OLD_CLASS)

_COMMON: dict[str, Any] = {"label_embedding": True, "objective": "epsilon", "factored": False}
_KINDS = ("weight", "bias")


class DenseDiT(NamedTuple):
    """A DiT in our own names: `spec.factored` is false, `tensors` are float32."""

    spec: ModelSpec
    tensors: dict[str, Tensor]


class _Source:
    """Foreign tensors, each to be taken once; what is missing or left over is refused by its own name."""

    def __init__(self, tensors: Mapping[str, Tensor], where: str) -> None:
        self.left, self.where = dict(tensors), where

    def shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        if name not in self.left:
            raise InputError(f"{self.where}: tensor {name} is missing, so this is not a whole DiT of that layout")
        shape = tuple(self.left[name].shape)
        if len(shape) != dimensions or 0 in shape:
            raise InputError(f"{self.where}: tensor {name} has shape {shape}, want {dimensions} dimensions")
        return shape

    def take(self, name: str, *shape: int) -> Tensor:
        """Float32 [shape]; `InputError` for another shape, NaN or infinity."""
        if (found := self.shape(name, len(shape))) != shape:
            raise InputError(f"{self.where}: tensor {name} has shape {found}, want {shape}")
        tensor = self.left.pop(name)
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{self.where}: tensor {name} ({tensor.dtype}) holds values that are not finite numbers")
        return tensor.float()

    def layer(
        self, ours: str, theirs: str, outputs: int, *inputs: int, bias: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Weight and bias; a layer without a bias gets one of zeros."""
        yield f"{ours}.weight", self.take(f"{theirs}.weight", outputs, *inputs)
        yield f"{ours}.bias", self.take(f"{theirs}.bias", outputs) if bias else torch.zeros(outputs)

    def finish(self) -> None:
        if self.left:
            names = sorted(self.left)
            more = f" (and {len(names) - 3} more)" if len(names) > 3 else ""
            raise InputError(
                f"{self.where}: {', '.join(names[:3])}{more}: no part of a DiT with adaLN-Zero; not supported"
            )


def _blocks(source: _Source, pattern: str) -> int:
    return 1 + max((int(match[1]) for name in source.left if (match := re.match(pattern, name))), default=-1)


def channels_first(values: Tensor, patch_size: int) -> Tensor:
    """The final layer's outputs [P*P*ch, ...] reordered to [ch*P*P, ...]."""
    return values.unflatten(0, (patch_size, patch_size, -1)).movedim(2, 0).flatten(0, 2).contiguous()


def channels_last(values: Tensor, patch_size: int) -> Tensor:
    """The inverse of `channels_first`."""
    return values.unflatten(0, (-1, patch_size, patch_size)).movedim(0, 2).flatten(0, 2).contiguous()


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Weight shapes of the layers that every layout has one by one, without their block."""
    width, hidden = spec.width, spec.hidden_width
    square = {f"attn.{part}": (width, width) for part in "qkvo"}
    return square | {
        "patch_embed": (width, spec.channels, spec.patch_size, spec.patch_size),
        "t_embed.fc1": (width, 256),
        "t_embed.fc2": (width, width),
        "adaln": (6 * width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
        "final.adaln": (2 * width, width),
        "final.linear": (spec.patch_values, width),
    }


def from_facebook(state: Mapping[str, Tensor], where: str, heads: int | None = None) -> DenseDiT:
    """A state dict of facebookresearch/DiT. The file does not say how many `heads` there are: needed at a width that no
    standard DiT has. `InputError` for what is missing, left over or of a wrong shape.
    """
    source = _Source(state, where)
    spec = _facebook_spec(source, heads)
    width, shapes = spec.width, _shapes(spec)
    tensors = {"pos_embed": source.take("pos_embed", 1, spec.tokens, width)[0]}
    tensors["y_embed.weight"] = source.take("y_embedder.embedding_table.weight", spec.num_classes + 1, width)
    for ours, theirs in _FACEBOOK.items():
        tensors |= source.layer(ours, theirs, *shapes[ours])
    for block in range(spec.depth):
        for ours, theirs in _FACEBOOK_BLOCK.items():
            tensors |= source.layer(f"blocks.{block}.{ours}", f"blocks.{block}.{theirs}", *shapes[ours])
        for kind, stacked in source.layer("", f"blocks.{block}.attn.qkv", 3 * width, width):
            tensors |= {f"blocks.{block}.attn.{part}{kind}": t for part, t in zip("qkv", stacked.chunk(3), strict=True)}
    source.finish()
    return _with_our_patch_order(spec, tensors)


def _facebook_spec(source: _Source, heads: int | None) -> ModelSpec:
    width, channels, patch_size, _ = source.shape("x_embedder.proj.weight", 4)
    tokens = source.shape("pos_embed", 3)[1]
    if math.isqrt(tokens) ** 2 != tokens:
        raise InputError(f"{source.where}: pos_embed is for {tokens} tokens; only square images are supported")
    heads = heads or standard_heads(width)
    if heads is None:
        raise UsageError(
            f"--heads is missing: the file has no number of attention heads, and no standard DiT is {width} wide"
        )
    values = source.shape("final_layer.linear.weight", 2)[0]
    read = {
        "image_size": math.isqrt(tokens) * patch_size, "channels": channels, "patch_size": patch_size, "width": width,
        "depth": _blocks(source, r"blocks\.(\d+)\."), "heads": heads,
        "num_classes": source.shape("y_embedder.embedding_table.weight", 2)[0] - 1,
        "mlp_ratio": source.shape("blocks.0.mlp.fc1.weight", 2)[0] / width,
        "learned_sigma": _learned_sigma(values / patch_size**2, channels, source.where),
        "pixels_per_latent": _pixels_per_latent(channels),
    }  # fmt: skip
    return ModelSpec.from_dict(_COMMON | read, source.where)


def _learned_sigma(output_channels: float, channels: int, where: str) -> bool:
    if output_channels not in (channels, 2 * channels):
        raise InputError(
            f"{where}: {output_channels:g} output channels for {channels} of input; want as many, or twice as many"
        )
    return output_channels == 2 * channels


def _pixels_per_latent(channels: int) -> int:
    """DiT works on the four channels of Stable Diffusion's latents; other numbers are pixels."""
    return 8 if channels == 4 else 1


def _with_our_patch_order(spec: ModelSpec, tensors: dict[str, Tensor]) -> DenseDiT:
    for name in ("final.linear.weight", "final.linear.bias"):
        tensors[name] = channels_first(tensors[name], spec.patch_size)
    return DenseDiT(spec, tensors)


def from_diffusers(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> DenseDiT:
    """A `DiTTransformer2DModel` by its config.json and its weights; `InputError` names whatever is not supported."""
    source = _Source(state, where)
    spec = _diffusers_spec(config, where)
    width, shapes = spec.width, _shapes(spec)
    tensors = {"pos_embed": sincos_position_table(spec.image_size // spec.patch_size, width)}
    for ours, theirs in _DIFFUSERS.items():
        tensors |= source.layer(ours, theirs, *shapes[ours])
    biased = config.get("attention_bias", config.get("_class_name") != _OLD_CLASS)
    for block in range(spec.depth):
        there = f"transformer_blocks.{block}"
        for ours, theirs in _DIFFUSERS_BLOCK.items():
            bias = biased or ours not in ("attn.q", "attn.k", "attn.v")
            tensors |= source.layer(f"blocks.{block}.{ours}", f"{there}.{theirs}", *shapes[ours], bias=bias)
        _take_embedders(source, f"{there}.norm1.emb", spec, tensors)
    source.left.pop("pos_embed.pos_embed", None)  # stored by old releases; newer ones compute it
    source.finish()
    return _with_our_patch_order(spec, tensors)


def _take_embedders(source: _Source, there: str, spec: ModelSpec, tensors: dict[str, Tensor]) -> None:
    """The block's copy of the timestep and label embedders, which must be the same in every block."""
    shapes = {**_shapes(spec), "y_embed": (spec.num_classes + 1, spec.width)}
    for ours, theirs in _DIFFUSERS_EMBEDDERS.items():
        layer, kind = ours.rsplit(".", 1)
        name = f"{there}.{theirs}"
        own = source.take(name, *(shapes[layer] if kind == "weight" else shapes[layer][:1]))
        if not torch.equal(tensors.setdefault(ours, own), own):
            raise InputError(
                f"{source.where}: {name} differs from the first block's; embedders of a block's own are not supported"
            )


def _diffusers_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    if config.get("_class_name") == _OLD_CLASS:
        config = {**_OLD_DEFAULTS, **config}
    for key, value in config.items():
        if key.startswith("_") or key in _DIFFUSERS_SHAPES or key in _WITHOUT_EFFECT or value is None or value is False:
            continue
        if value not in _DIFFUSERS_OPTIONS.get(key, ()):
            wanted = " or ".join(str(choice) for choice in _DIFFUSERS_OPTIONS.get(key, ("none",))[:1])
            raise InputError(f"{where}: {key} is {value!r}: not supported, want {wanted}")
    sizes: dict[str, Any] = {key: config.get(key) for key in _DIFFUSERS_SHAPES[:8]}
    sizes["out_channels"] = sizes["out_channels"] or sizes["in_channels"]
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{where}: {key} is {value!r}, want an integer of at least 1")
    heads, head_width, channels, out_channels, depth, image_size, patch_size, classes = sizes.values()
    read = {
        "image_size": image_size, "channels": channels, "patch_size": patch_size, "width": heads * head_width,
        "depth": depth, "heads": heads, "num_classes": classes,
        "learned_sigma": _learned_sigma(out_channels, channels, where),
        "pixels_per_latent": _pixels_per_latent(channels),
        "timestep_frequency_shift": 1, "mlp_norm_eps": config.get("norm_eps", 1e-5),
    }  # fmt: skip
    return ModelSpec.from_dict(_COMMON | read, where)


def to_diffusers(dense: DenseDiT, labels: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and weights of the `DiTTransformer2DModel` with the same function; `labels` [rows, D] is its label table.

    Requires a model with diffusers' timestep frequencies. `UsageError` for what that class has no place for.
    """
    spec, tensors = dense
    if spec.hidden_width != 4 * spec.width:
        raise UsageError(f"diffusers: its DiT has an MLP of 4 times the width; this one has {spec.mlp_ratio:g} times")
    table = sincos_position_table(spec.image_size // spec.patch_size, spec.width)
    if not torch.allclose(tensors["pos_embed"], table, atol=1e-5):
        raise UsageError("diffusers: its DiT computes the sine-cosine position table; this model has another one")
    config = {
        "num_attention_heads": spec.heads, "attention_head_dim": spec.head_width, "in_channels": spec.channels,
        "out_channels": spec.output_channels, "num_layers": spec.depth, "sample_size": spec.image_size,
        "patch_size": spec.patch_size, "num_embeds_ada_norm": len(labels) - 1, "norm_eps": spec.mlp_norm_eps,
    }  # fmt: skip
    named = {f"{theirs}.{kind}": tensors[f"{ours}.{kind}"] for ours, theirs in _DIFFUSERS.items() for kind in _KINDS}
    for kind in _KINDS:
        named[f"proj_out_2.{kind}"] = channels_last(named[f"proj_out_2.{kind}"], spec.patch_size)
    embedders = {theirs: {**tensors, "y_embed.weight": labels}[ours] for ours, theirs in _DIFFUSERS_EMBEDDERS.items()}
    for block in range(spec.depth):
        there = f"transformer_blocks.{block}"
        for ours, theirs in _DIFFUSERS_BLOCK.items():
            named |= {f"{there}.{theirs}.{kind}": tensors[f"blocks.{block}.{ours}.{kind}"] for kind in _KINDS}
        named |= {f"{there}.norm1.emb.{theirs}": tensor for theirs, tensor in embedders.items()}
    return config, named
