"""From a module to an ML program: torch.export, then coremltools, fp16 but for what fp16 cannot hold."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from kind_edge.budget.coreml_weights import Target
from kind_edge.errors import UsageError
from kind_edge.exporters.coreml_choices import LARGEST_BATCH
from kind_edge.exporters.coreml_graph import Denoiser, Sampler
from kind_edge.exporters.coreml_tools import quiet, require_coremltools


@dataclass(frozen=True)
class Interface:
    """Inputs by name, each with its type and its shape without the batch, and the one output, float32."""

    inputs: Mapping[str, tuple[str, tuple[int, ...]]]
    output: str
    output_shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest has it."""
        inputs = [
            {"name": name, "dtype": dtype, "shape": ["batch", *shape]} for name, (dtype, shape) in self.inputs.items()
        ]
        output = {"name": self.output, "dtype": "float32", "shape": ["batch", *self.output_shape]}
        return {"inputs": inputs, "outputs": [output]}

    def zeros(self, batch: int) -> dict[str, torch.Tensor]:
        """Inputs to trace with, each its own: one tensor given twice would become one input used twice."""
        return {
            name: torch.zeros((batch, *shape), dtype=getattr(torch, dtype))
            for name, (dtype, shape) in self.inputs.items()
        }


def interface_of(module: Denoiser | Sampler) -> Interface:
    """In the order of `module.forward`."""
    sampler = isinstance(module, Sampler)
    spec = module.denoiser.spec if isinstance(module, Sampler) else module.spec
    image = (spec.channels, spec.image_size, spec.image_size)
    known = {"sample": ("float32", image), "noise": ("float32", image), "timestep": ("float32", ())}
    inputs = {name: known.get(name, ("int32", ())) for name in module.input_names}
    return Interface(
        inputs, "image" if sampler else "prediction", image if sampler else (spec.output_channels, *image[1:])
    )


def convert(
    module: torch.nn.Module,
    interface: Interface,
    target: Target,
    sizes: tuple[int, ...] | None,
    wide: Collection[str] = (),
) -> Any:
    """An `MLModel` with fp16 weights and arithmetic; inputs and outputs stay float32 and int32.

    `sizes` as of `batches`. Operators of the kinds `wide` stay in fp32. `UsageError` names the module and the operator
    that Core ML has no place for.
    """
    ct = require_coremltools()
    import numpy as np

    inputs = interface.zeros(2 if sizes is None or len(sizes) > 1 else sizes[0])
    dynamic = sizes is None or len(sizes) > 1
    size = torch.export.Dim("batch", min=1, max=LARGEST_BATCH if sizes is None else max(2, *sizes))

    def shape(rest: tuple[int, ...]) -> Any:
        if sizes is None:
            return ct.Shape((ct.RangeDim(1, LARGEST_BATCH, default=1), *rest))
        if len(sizes) == 1:
            return (sizes[0], *rest)
        return ct.EnumeratedShapes([(n, *rest) for n in sizes], default=(sizes[0], *rest))

    with quiet(), torch.no_grad():
        program = torch.export.export(
            module.eval().requires_grad_(False),
            tuple(inputs.values()),
            dynamic_shapes=tuple({0: size} for _ in inputs) if dynamic else None,
        ).run_decompositions({})
        try:
            return ct.convert(
                program,
                inputs=[
                    ct.TensorType(name, shape(rest), np.dtype(dtype).type)
                    for name, (dtype, rest) in interface.inputs.items()
                ],
                outputs=[ct.TensorType(interface.output, dtype=np.float32)],
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, target),
                compute_precision=ct.transform.FP16ComputePrecision(
                    op_selector=lambda op: op.op_type not in wide and not _leads_to_angle(op)
                ),
                skip_model_load=True,
            )
        except (NotImplementedError, RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"--formats coreml --coreml-target {target}: {_blame(program, error)}") from error


def _leads_to_angle(op: Any) -> bool:
    """Sines and cosines of the timestep, and what makes their angles: up to 1000 with steps far below 1, which fp16
    does not have."""
    if op.op_type in ("cos", "sin"):
        return True
    following = [child for output in op.outputs for child in output.child_ops]
    return op.op_type != "const" and bool(following) and all(_leads_to_angle(child) for child in following)


def _blame(program: Any, error: Exception) -> str:
    """Which operator of which module could not be converted, as far as the converter's words say."""
    text = " ".join(str(error).split())
    for name in re.findall(r"'([\w.:]+)'|node (\w+)|op (\w+)", text):
        operator = next(filter(None, name))
        for node in program.graph_module.graph.nodes:
            if node.op == "call_function" and operator.split("::")[-1].split(".")[0] in str(node.target):
                stack = list(node.meta.get("nn_module_stack", {}).values())
                return (
                    f"module {stack[-1][0] or 'the model'!r}, operator {operator}: Core ML has no place for it: {text}"
                )
    return f"coremltools cannot convert the model: {text}"
