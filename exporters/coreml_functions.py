"""Class packs as functions of one package (iOS18): one function per set of classes, all on the same weights.

Tailors lie in the weight file once, for all classes. A function differs from the whole model in one small constant, the
numbers of its own classes, so that a further function costs its program and no weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.errors import KindEdgeError
from kind_edge.exporters.coreml_choices import MAIN
from kind_edge.exporters.coreml_package import PROGRAM
from kind_edge.exporters.coreml_tools import quiet, require_coremltools


def add_functions(package: Path, sets: Mapping[str, Sequence[int]], folder: Path) -> Path:
    """A package in `folder` with the function of `package` as `main` and one more for every set of classes.

    Requires: a single function converted with `mapped`. Ensures: every weight is stored once.
    """
    ct = require_coremltools()
    with quiet():
        described = ct.utils.MultiFunctionDescriptor()
        described.add_function(str(package), src_function_name=MAIN, target_function_name=MAIN)
        for name, numbers in sets.items():
            copy = folder / f"{name}.mlpackage"
            shutil.copytree(package, copy)
            spec = ct.utils.load_spec(str(copy))
            _renumber(spec, np.asarray(numbers))
            (copy / "Data" / PROGRAM).write_bytes(spec.SerializeToString(deterministic=True))
            described.add_function(str(copy), src_function_name=MAIN, target_function_name=name)
        described.default_function_name = MAIN
        joined = folder / "joined.mlpackage"
        ct.utils.save_multifunction(described, str(joined))
    return joined


def _renumber(spec: Any, numbers: np.ndarray[Any, Any]) -> None:
    """Put these numbers into the constant `class_map`, in the type that it has."""
    from coremltools.converters.mil.backend.mil.helper import create_tensor_value, types_to_proto_primitive
    from coremltools.converters.mil.mil.types import numpy_type_to_builtin_type

    program = spec.mlProgram.functions[MAIN]
    found = [
        op
        for op in program.block_specializations[program.opset].operations
        if op.type == "const" and "class_map" in op.outputs[0].name and op.outputs[0].type.tensorType.rank == 1
    ]
    if len(found) != 1:
        raise KindEdgeError(f"the package has {len(found)} constants called class_map, want one")
    (constant,) = found
    integers = (np.int32, np.int16, np.uint16, np.int8, np.uint8)
    kinds = {types_to_proto_primitive(numpy_type_to_builtin_type(kind)): kind for kind in integers}
    values = numbers.astype(kinds[constant.outputs[0].type.tensorType.dataType])
    constant.attributes["val"].CopyFrom(create_tensor_value(values))
    constant.outputs[0].type.tensorType.dimensions[0].constant.size = len(values)
