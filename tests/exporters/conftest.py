"""Small ML programs for tests, written by Core ML Tools and saved as packages."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kind_edge.deploy

Array = NDArray[Any]
SaveProgram = Callable[[Path, Callable[..., Mapping[str, Any]], Mapping[str, Array], int], Path]


def save_ml_program(
    folder: Path, body: Callable[..., Mapping[str, Any]], inputs: Mapping[str, Array], ios: int
) -> Path:
    """A package of one function: `body` takes the inputs by name and returns outputs by name.

    Operators are written as they stand: no pass of the converter changes them.
    """
    import coremltools as ct  # takes seconds, and most test processes never need it
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.mil import Function, Program, types

    kinds = {np.dtype(np.float32): types.fp32, np.dtype(np.float16): types.fp16, np.dtype(np.int32): types.int32}
    target = getattr(ct.target, f"iOS{ios}")
    specs = {name: Builder.placeholder(array.shape, kinds[array.dtype]) for name, array in inputs.items()}
    with Function(specs, opset_version=target) as function:
        outputs = body(**function.inputs)
        function.set_outputs([Builder.identity(x=value, name=name) for name, value in outputs.items()])
    program = Program()
    program.add_function("main", function)
    model = ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=target, skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY, compute_precision=ct.precision.FLOAT32,
    )  # fmt: skip
    path = folder / "Program.mlpackage"
    model.save(str(path))
    return path


@pytest.fixture(scope="session")
def save_program() -> SaveProgram:
    return save_ml_program


@pytest.fixture(scope="session")
def mac_program() -> ModuleType:
    """The stand-alone program that checks packages on a Mac."""
    path = Path(kind_edge.deploy.__file__).parent / "templates/coreml/verify_on_mac.py"
    spec = importlib.util.spec_from_file_location("verify_on_mac", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module
