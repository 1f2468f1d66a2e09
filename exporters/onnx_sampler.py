"""The whole sampling loop as one ONNX graph: noise, class and guidance in, an image out. One call for an app.

The denoiser becomes the body of an ONNX Loop over the rows of the sampler's table, whose coefficients are initializers:

    d_i = p_i x_i + q_i prediction_i,    x_{i+1} = a_i x_i + b_i d_i + c_i d_{i-1}

Guidance is one batch of 2B, class rows first. The decoder of a latent model follows the loop. Weights stay in the outer
graph, where ONNX Runtime packs them once;
sizes (int64) lie in the body, where shape inference finds them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.sampler_table import SamplerTable

_COLUMNS = ("p", "q", "a", "b", "c")


def to_sampler(
    denoiser: onnx.ModelProto, table: SamplerTable, null_index: int | None, decoder: onnx.ModelProto | None = None
) -> onnx.ModelProto:
    """The sampler of a denoiser, with the decoder of its latents if it makes such; neither is changed.

    `null_index`: the class whose prediction guidance starts from; None for a model that is not guided, whose sampler
    has no input `guidance`. Inputs as in the bundle contract: noise float32 [B, ch, H, W], class_index int64 [B] where
    the denoiser has it, guidance float32 []. Output image float32 [B, ch, H, W] in [0, 1], as the decoder gives it.
    """
    source, given = denoiser.graph, {value.name: value for value in denoiser.graph.input}
    guided, switches = null_index is not None, "class_index" in given
    shape = [dimension.dim_value for dimension in given["sample"].type.tensor_type.shape.dim][1:]
    constants: dict[str, NDArray[Any]] = {
        "sampler.coefficients": np.stack([getattr(table, name) for name in _COLUMNS], 1).astype(np.float32),
        "sampler.timesteps": table.timestep.astype(np.float32),
        "sampler.rows": np.array(len(table.timestep), np.int64),
        "sampler.branches": np.array([2 if guided else 1], np.int64),
        "sampler.each": np.array([1], np.int32 if "step_index" in given else np.float32),
        "sampler.null": np.array([null_index or 0], np.int64),
        "sampler.channels": np.array([shape[0]], np.int64),
        "sampler.first": np.array([0], np.int64),
        "sampler.axis": np.array([1], np.int64),
        "sampler.half": np.array(0.5, np.float32),
        "sampler.zero": np.array(0, np.float32),
        "sampler.one": np.array(1, np.float32),
    }
    body = helper.make_graph(
        list(_body(source, guided)),
        "step",
        [_tensor("row", TensorProto.INT64, []), _tensor("going", TensorProto.BOOL, []), *_carried(shape, "")],
        [_tensor("still", TensorProto.BOOL, []), *_carried(shape, "'")],
        [tensor for tensor in source.initializer if tensor.data_type == TensorProto.INT64],
    )
    inputs = [_tensor("noise", TensorProto.FLOAT, ["batch", *shape])]
    inputs += [_tensor("class_index", TensorProto.INT64, ["batch"])] if switches else []
    inputs += [_tensor("guidance", TensorProto.FLOAT, [])] if guided else []
    graph = helper.make_graph(
        [*_around(body, guided, switches), *_ending(decoder)],
        "sampler",
        inputs,
        [_tensor("image", TensorProto.FLOAT, ["batch", *shape])] if decoder is None else decoder.graph.output,
        [
            *(tensor for tensor in source.initializer if tensor.data_type != TensorProto.INT64),
            *_used(constants, guided, given),
            *(decoder.graph.initializer if decoder is not None else []),
        ],
    )
    return helper.make_model(
        graph, opset_imports=denoiser.opset_import, ir_version=denoiser.ir_version, producer_name=denoiser.producer_name
    )


def _around(body: onnx.GraphProto, guided: bool, switches: bool) -> Iterator[onnx.NodeProto]:
    """What runs once before the image: the sizes, the classes of all branches, the loop."""
    node = helper.make_node
    yield node("Shape", ["noise"], ["sampler.batch"], end=1)
    yield node("Mul", ["sampler.batch", "sampler.branches"], ["sampler.size"])
    yield node("Expand", ["sampler.each", "sampler.size"], ["sampler.ones"])  # one per row of the denoiser's batch
    if switches and guided:
        yield node("Expand", ["sampler.null", "sampler.batch"], ["sampler.nulls"])
        yield node("Concat", ["class_index", "sampler.nulls"], ["sampler.classes"], axis=0)
    yield node("Mul", ["noise", "sampler.zero"], ["sampler.still"])  # there is no direction before the first
    state = ["noise", "sampler.still"]
    yield node("Loop", ["sampler.rows", "", *state], ["sampler.final", "sampler.last"], body=body)


def _ending(decoder: onnx.ModelProto | None) -> Iterator[onnx.NodeProto]:
    """From the loop's last sample to an image in [0, 1]; a decoder's inner names all start with its own."""
    node = helper.make_node
    if decoder is not None:
        yield node("Identity", ["sampler.final"], ["latent"])
        yield from decoder.graph.node
        return
    yield node("Mul", ["sampler.final", "sampler.half"], ["sampler.scaled"])
    yield node("Add", ["sampler.scaled", "sampler.half"], ["sampler.shifted"])
    yield node("Clip", ["sampler.shifted", "sampler.zero", "sampler.one"], ["image"])


def _body(source: onnx.GraphProto, guided: bool) -> Iterator[onnx.NodeProto]:
    """One row of the table: `x` and `direction` to `x'` and `direction'`."""
    node = helper.make_node
    yield node("Gather", ["sampler.coefficients", "row"], ["coefficients"])
    yield node("Split", ["coefficients"], list(_COLUMNS), axis=0, num_outputs=len(_COLUMNS))
    yield node("Concat", ["x", "x"], ["sample"], axis=0) if guided else node("Identity", ["x"], ["sample"])
    if any(value.name == "step_index" for value in source.input):
        yield node("Cast", ["row"], ["step"], to=TensorProto.INT32)
        yield node("Mul", ["step", "sampler.ones"], ["step_index"])
    else:
        yield node("Gather", ["sampler.timesteps", "row"], ["step"])
        yield node("Mul", ["step", "sampler.ones"], ["timestep"])
    yield from _renamed(source, "sampler.classes" if guided else "class_index")
    yield node("Slice", ["prediction", "sampler.first", "sampler.channels", "sampler.axis"], ["wanted"])
    if guided:
        yield node("Split", ["wanted"], ["of_class", "of_null"], axis=0, num_outputs=2)
        yield node("Sub", ["of_class", "of_null"], ["apart"])
        yield node("Mul", ["apart", "guidance"], ["pushed"])
        yield node("Add", ["of_null", "pushed"], ["guided"])
    yield from _sum("direction'", {"p": "x", "q": "guided" if guided else "wanted"})
    yield from _sum("x'", {"a": "x", "b": "direction'", "c": "direction"})
    yield node("Identity", ["going"], ["still"])


def _sum(output: str, terms: dict[str, str]) -> Iterator[onnx.NodeProto]:
    """output = sum of coefficient x value."""
    scaled = []
    for coefficient, value in terms.items():
        scaled.append(f"{output}.{coefficient}")
        yield helper.make_node("Mul", [value, coefficient], [scaled[-1]])
    yield helper.make_node("Sum", scaled, [output])


def _renamed(source: onnx.GraphProto, classes: str) -> Iterator[onnx.NodeProto]:
    """The denoiser's nodes, whose inner names cannot meet those of the loop; `class_index` is the name given."""
    kept = {tensor.name for tensor in source.initializer} | {value.name for value in [*source.input, *source.output]}
    kept.add("")  # an optional input that is left out

    def name(old: str) -> str:
        if old == "class_index":
            return classes
        return old if old in kept else f"denoiser.{old}"

    for original in source.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        node.input[:], node.output[:] = [name(old) for old in original.input], [name(old) for old in original.output]
        yield node


def _used(
    constants: dict[str, NDArray[Any]], guided: bool, given: dict[str, onnx.ValueInfoProto]
) -> list[onnx.TensorProto]:
    unused = {"sampler.timesteps"} if "step_index" in given else set()
    unused |= set() if guided else {"sampler.null"}
    return [numpy_helper.from_array(value, name) for name, value in constants.items() if name not in unused]


def _carried(shape: list[int], mark: str) -> list[onnx.ValueInfoProto]:
    return [_tensor(f"{name}{mark}", TensorProto.FLOAT, ["batch", *shape]) for name in ("x", "direction")]


def _tensor(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)
