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
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    # Without it a clone between two layouts is refused at run time: executorch 1.5.1, "out_dim_order[i]".
    config = EdgeCompileConfig(_skip_dim_order=True)
    for batch in (1, 2):
        program = torch.export.load(source / f"dense.b{batch}.pt2")
        if precision == "int8":
            program = _quantized(program)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=config)
        (target / f"b{batch}.pte").write_bytes(lowered.to_executorch().buffer)


def _quantized(program: Any) -> Any:
    import torch
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True))
    inputs = program.example_inputs[0]
    prepared = prepare_pt2e(program.module(), quantizer)
    prepared(*inputs)
    return torch.export.export(convert_pt2e(prepared), inputs)


def open_model(target: Path, precision: str, batch: int, threads: int) -> Opened:
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
