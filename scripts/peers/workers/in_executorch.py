"""ExecuTorch with the XNNPACK delegate: fp32, and dynamic int8 (per channel) by PyTorch's quantizer for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from worker import Engine, Opened, serve


def load() -> str:
    from importlib.metadata import version

    import executorch.runtime  # noqa: F401

    return f"executorch {version('executorch')}"


def make(source: Path, target: Path, precision: str) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    for batch in (1, 2):
        program = torch.export.load(source / f"dense.b{batch}.pt2")
        inputs, module = program.example_inputs[0], _contiguous(program.module())
        exported = torch.export.export(_quantized(module, inputs) if precision == "int8" else module, inputs)
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        (target / f"b{batch}.pte").write_bytes(lowered.to_executorch().buffer)


def _contiguous(module: Any) -> Any:
    """With a plain copy before the last shuffle: executorch 1.5.1 refuses, at run time, the one between two layouts."""
    import torch

    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.pixel_shuffle.default:
            values, plain = node.args[0], {"memory_format": torch.contiguous_format}
            with module.graph.inserting_before(node):
                copy = module.graph.call_function(torch.ops.aten.clone.default, (values,), plain)
            node.replace_input_with(values, copy)
    module.recompile()
    return module


def _quantized(module: Any, inputs: Any) -> Any:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    prepared = prepare_pt2e(module, quantizer)
    prepared(*inputs)
    return convert_pt2e(prepared)


def open_model(target: Path, precision: str, batch: int, threads: int) -> Opened:
    """ExecuTorch takes a thread for every core; its Python runtime cannot be told another number."""
    import torch
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(target / f"b{batch}.pte")
    method = program.load_method("forward")
    shape = tuple(method.metadata.input_tensor_meta(0).sizes()[1:])

    def predict(sample: Any, timestep: Any, class_index: Any) -> Any:
        return method.execute([torch.from_numpy(each) for each in (sample, timestep, class_index)])[0].numpy()

    return Opened(predict, shape)


if __name__ == "__main__":
    serve(Engine(load, make, open_model))
