"""The sampler in the graph: diffusers' schedulers with the same denoiser, guidance included, in one call."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from kind_edge.deploy.graph_facts import graph_facts
from kind_edge.deploy.sampler_table import SamplerTable, sampler_table
from kind_edge.exporters.onnx_decoder import tiled
from kind_edge.exporters.onnx_sampler import to_sampler
from kind_edge.model.sampling import guided, sample
from kind_edge.model.tiles import tiles_of
from kind_edge.registry import exporter

SAMPLERS = [("euler", "flow"), ("heun", "flow"), ("ddim", "epsilon"), ("dpmsolver++", "epsilon")]
BIASES = np.array([0.5, -0.3, 0.1], np.float32)  # two classes, and none
NULL, SHAPE = 2, (1, 4, 5)
SIZE = {"flow": 1.0, "epsilon": 0.005}
"""Of what is added to the sample: the first steps of DDIM magnify it 150-fold."""


def network(x: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor, size: float) -> torch.Tensor:
    """Smooth, and different at every timestep, pixel and class."""
    t = timestep.view(-1, 1, 1, 1) / 1000
    bias = torch.from_numpy(BIASES)[classes].view(-1, 1, 1, 1)
    return x + size * (torch.sin(x + 5 * t) * (1.2 - t) + bias)


def denoiser(
    table: SamplerTable, baked: bool, size: float = 1.0, shape: tuple[int, int, int] = SHAPE
) -> onnx.ModelProto:
    """`network` as a graph with a learned variance behind, at timesteps (or at their rows, baked)."""
    step = ("step_index", TensorProto.INT32) if baked else ("timestep", TensorProto.FLOAT)
    constants = {
        "times": table.timestep.astype(np.float32).reshape(-1, 1, 1, 1) / 1000,
        "thousandth": np.array(1e-3, np.float32),
        "column": np.array([-1, 1, 1, 1]),
        "biases": BIASES.reshape(-1, 1, 1, 1),
        **{name: np.array(value, np.float32) for name, value in {"s": 5, "m": 1.2, "size": size}.items()},
    }
    time = [helper.make_node("Gather", ["times", "step_index"], ["t"])]
    if not baked:
        time = [
            helper.make_node("Reshape", ["timestep", "column"], ["noise"]),  # a name that the sampler has, too
            helper.make_node("Mul", ["noise", "thousandth"], ["t"]),
        ]
    chain = [
        ("Mul", ["t", "s"], "a"), ("Add", ["sample", "a"], "b"), ("Sin", ["b"], "c"), ("Sub", ["m", "t"], "d"),
        ("Mul", ["c", "d"], "e"), ("Gather", ["biases", "class_index"], "f"), ("Add", ["e", "f"], "g"),
        ("Mul", ["g", "size"], "h"), ("Add", ["sample", "h"], "mean"), ("Neg", ["mean"], "variance"),
    ]  # fmt: skip
    nodes = [*time, *(helper.make_node(kind, inputs, [output]) for kind, inputs, output in chain)]
    nodes.append(helper.make_node("Concat", ["mean", "variance"], ["prediction"], axis=1))
    inputs = [("sample", TensorProto.FLOAT, ["batch", *shape]), (*step, ["batch"])]
    inputs.append(("class_index", TensorProto.INT64, ["batch"]))
    infos = [helper.make_tensor_value_info(*each) for each in inputs]
    output = helper.make_tensor_value_info("prediction", TensorProto.FLOAT, ["batch", 2, *shape[1:]])
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "denoiser", infos, [output], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize(("kind", "objective"), SAMPLERS)
def test_one_call_takes_the_steps_of_the_scheduler(
    kind: str, objective: str, guidance: float | None, baked: bool, tmp_path: Path
) -> None:
    steps, path = 7, tmp_path / "sampler.onnx"
    table = sampler_table(kind, objective, steps)
    model = to_sampler(denoiser(table, baked, SIZE[objective]), table, None if guidance is None else NULL)
    onnx.checker.check_model(model, full_check=True)
    onnx.save_model(model, path)
    run = exporter("onnx").open(path)
    for batch in (1, 3):
        noise = torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(batch))
        classes = torch.arange(batch) % 2
        denoise = guided(partial(network, size=SIZE[objective]), guidance or 1.0, NULL)
        wanted = ((sample(denoise, noise, classes, objective, steps, kind) + 1) / 2).clamp(0, 1)
        given = {"noise": noise.numpy(), "class_index": classes.numpy()}
        got = run(given if guidance is None else given | {"guidance": np.array(guidance, np.float32)})
        assert np.abs(got - wanted.numpy()).max() < 1e-4
        assert got.std() > 0.1  # neither black nor white alone
    assert graph_facts(path).has_subgraphs


def upscaler(height: int, width: int) -> onnx.ModelProto:
    """A decoder of one channel to three, each latent to 2 x 2 pixels, whose inner names all start with its own."""
    gains = np.array([0.1, -0.2, 0.3], np.float32).reshape(3, 1, 1, 1)
    constants = {"gains": gains, "bias": np.full(3, 0.5, np.float32), "scales": np.array([1, 1, 2, 2], np.float32)}
    nodes = [
        helper.make_node("Conv", ["latent", "decoder.gains", "decoder.bias"], ["decoder.mixed"]),
        helper.make_node("Resize", ["decoder.mixed", "", "decoder.scales"], ["image"], mode="nearest"),
    ]
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("latent", (1, height, width)), ("image", (3, 2 * height, 2 * width)))
    ]
    initializers = [numpy_helper.from_array(value, f"decoder.{name}") for name, value in constants.items()]
    graph = helper.make_graph(nodes, "decoder", infos[:1], infos[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize(("kind", "objective"), SAMPLERS)
def test_latents_are_decoded_in_the_same_call(kind: str, objective: str, tiles: int, tmp_path: Path) -> None:
    steps, side, path = 5, 6, tmp_path / "sampler.onnx"
    table = sampler_table(kind, objective, steps)
    of_latents = denoiser(table, True, SIZE[objective], (1, side, side))
    layout = tiles_of(side, tiles, 2)
    decoder = tiled(upscaler(layout.size, layout.size), layout, side)
    model = to_sampler(of_latents, table, NULL, decoder)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    noise = torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    denoise = guided(partial(network, size=SIZE[objective]), 1.5, NULL)
    latents = sample(denoise, noise, torch.tensor([0, 1]), objective, steps, kind)
    gains = torch.tensor([0.1, -0.2, 0.3]).view(1, 3, 1, 1)
    wanted = (latents * gains + 0.5).repeat_interleave(2, 2).repeat_interleave(2, 3)
    given = {"noise": noise.numpy(), "class_index": np.array([0, 1]), "guidance": np.array(1.5, np.float32)}
    assert np.abs(exporter("onnx").open(path)(given) - wanted.numpy()).max() < 1e-4


def test_denoiser_and_decoder_are_left_as_they_were() -> None:
    table = sampler_table("euler", "flow", 2)
    model, decoder = denoiser(table, baked=True), upscaler(*SHAPE[1:])
    before = [each.SerializeToString() for each in (model, decoder)]
    first, second = to_sampler(model, table, NULL, decoder), to_sampler(model, table, NULL, decoder)
    assert [each.SerializeToString() for each in (model, decoder)] == before
    assert first.SerializeToString() == second.SerializeToString()
