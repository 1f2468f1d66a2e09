"""From a plain model to an ONNX graph that holds nothing but the model: opset 23, dynamic batch, weights inside."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from kind_edge.budget.denoiser_graph import (
    Affine,
    BakedModulation,
    Denoiser,
    Linear,
    ModulationNetwork,
    write,
)
from kind_edge.budget.onnx_writer import OPSET, Floats
from kind_edge.deploy import plain

__all__ = ["OPSET", "inputs_and_outputs", "to_onnx"]


def to_onnx(model: plain.PlainDiT, fused_attention: bool = True) -> onnx.ModelProto:
    """The graph of a plain model; names, shapes and types as in the bundle contract; weights inside the file."""
    proto: onnx.ModelProto = write(_denoiser(model), fused_attention)
    return proto


def _denoiser(model: plain.PlainDiT) -> Denoiser:
    spec = model.spec
    linears = {name: _linear(layer) for name, layer in model.named_modules() if isinstance(layer, plain.PlainLinear)}
    return Denoiser(
        image_size=spec.image_size,
        channels=spec.channels,
        patch_size=spec.patch_size,
        output_channels=spec.output_channels,
        width=spec.width,
        heads=spec.heads,
        blocks=tuple(spec.block_branches(block) for block in range(spec.depth)),
        linears=linears,
        patches=Affine(_array(model.patch_embed.weight), _array(_bias(model.patch_embed))),
        positions=_array(model.pos_embed),
        modulation=_modulation(model),
        final=_affine(model.final),
        switches=model.switches,
        kept_classes=spec.num_classes,
        null_branch=not spec.distilled,
        mlp_norm_eps=spec.mlp_norm_eps,
    )


def _linear(layer: plain.PlainLinear) -> Linear:
    shared: tuple[Floats, ...] = ()
    common: dict[str, Any] = {}
    if isinstance(layer.shared, plain.Dense):
        shared = (_array(layer.shared.weight),)
    elif isinstance(layer.shared, plain.ScaledThin):
        weights = layer.shared.common
        shared = (_array(weights.v), _array(weights.u))
        common = {"common": weights.name, "scale": _array(layer.shared.scale)}
    elif isinstance(layer.shared, plain.Thin):
        shared = (_array(layer.shared.v), _array(layer.shared.u))
    if layer.tailors is None:
        return Linear(shared, _array(layer.bias), **common)
    return Linear(shared, _array(layer.bias), _array(layer.tailors.v.mT), _array(layer.tailors.u), **common)


def _modulation(model: plain.PlainDiT) -> BakedModulation | ModulationNetwork:
    """With 1 added to every scale: to its values in a table, to its bias in a network."""
    added, given = _ones_of_scales(model), model.modulation
    if isinstance(given, plain.ModulationTable):
        return BakedModulation(_array(given.table.float() + added, given.table.dtype))
    assert isinstance(given, plain.ModulationNetwork)
    embed = given.t_embed
    second, labels = _affine(embed.fc2), None
    if given.y_embed is not None:
        if model.switches:
            labels = _array(given.y_embed.weight)
        else:  # one label for all, kept where the null label was
            second = second._replace(bias=second.bias + _array(given.y_embed.weight[-1]))
    layers = [_affine(layer) for layer in given.adaln]
    adaln = Affine(
        np.concatenate([layer.weight for layer in layers], 1),
        np.concatenate([layer.bias for layer in layers]) + _array(added),
    )
    return ModulationNetwork(_array(embed.frequencies), _affine(embed.fc1), second, adaln, labels)


def _ones_of_scales(model: plain.PlainDiT) -> Tensor:
    """1 where a modulation row holds a scale, else 0: shift, scale and gate of each branch, shift and scale at last."""
    branches = len(model.spec.branches())
    return torch.tensor([0.0, 1.0, 0.0] * branches + [0.0, 1.0]).repeat_interleave(model.spec.width)


def _affine(layer: nn.Linear) -> Affine:
    return Affine(_array(layer.weight.mT), _array(_bias(layer)))


def _bias(layer: nn.Linear | nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _array(values: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    return values.detach().to(dtype).contiguous().numpy()


def inputs_and_outputs(proto: onnx.ModelProto) -> dict[str, Any]:
    """The manifest's description of inputs and outputs, read from the graph itself."""

    def describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
        tensor = value.type.tensor_type
        dtype = str(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        return {"name": value.name, "dtype": dtype, "shape": [d.dim_param or d.dim_value for d in tensor.shape.dim]}

    return {"inputs": [describe(v) for v in proto.graph.input], "outputs": [describe(v) for v in proto.graph.output]}
