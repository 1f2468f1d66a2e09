"""Runs the ML program of a saved Core ML package in NumPy, on any computer: the reference of what a package computes.

It reads the files that will be shipped (model and weights), not the objects they were written from. Every value has the
precision that the program declares, each operator's result rounded once; where a device sums in another order, rounds
inside an operator or flushes the smallest fp16 values to zero, it differs from this by that much. What the program has
that is not understood, an operator, a parameter or a mode, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kind_edge.errors import InputError
from kind_edge.exporters.mil_blob import ELEMENT_TYPES
from kind_edge.exporters.mil_constexpr import CONSTEXPR
from kind_edge.exporters.mil_layout import LAYOUT
from kind_edge.exporters.mil_math import MATH
from kind_edge.exporters.mil_operator import Arguments, Array, Operator, to_carrier, to_declared
from kind_edge.exporters.mil_program import Constant, Function, Operation, read_package
from kind_edge.registry import Arrays, Interpreter

OPERATORS: Mapping[str, Operator] = {
    "const": Operator("val", lambda a: a["val"]),
    **LAYOUT,
    **MATH,
    **CONSTEXPR,
}
MAX_BATCH = 16
"""Of one run, where the package leaves a choice: what memory a run takes grows with it."""

Outputs = Mapping[str, NDArray[np.generic]]


def open_package(path: Path, function: str | None = None) -> Interpreter:
    """A function of a saved `.mlpackage` with one output: inputs by name, of any batch -> that output as float32.

    A package of a fixed batch runs once for every part of that size, the last one filled up; inputs that are not as
    long as the longest have no batch. `InputError` for what cannot be read or is not known here.
    """
    loaded = load_function(path, function)
    if len(loaded.function.outputs) != 1:
        raise InputError(f"{path}: has outputs {', '.join(loaded.function.outputs)}, want one")

    def interpret(inputs: Arrays) -> NDArray[np.float32]:
        arrays = {name: np.atleast_1d(array) for name, array in inputs.items()}
        count = max(map(len, arrays.values()), default=0)
        batched = {name for name, array in arrays.items() if len(array) == count}
        parts = []
        for start, size in _batches(loaded.function, batched, count, loaded.where):
            indices = np.minimum(np.arange(start, start + size), count - 1)  # the last one again, to fill up
            (part,) = loaded({n: array[indices] if n in batched else array for n, array in arrays.items()}).values()
            parts.append(part[: count - start])
        return np.concatenate(parts).astype(np.float32)

    return interpret


def _batches(function: Function, batched: set[str], count: int, where: str) -> Iterator[tuple[int, int]]:
    """(start, size) of parts, each of a size that all these inputs may have: the largest up to what is left."""
    sizes = [one for name, one in function.sizes.items() if name in batched]
    allowed = [n for n in range(1, max(count, MAX_BATCH) + 1) if all(one.allow_first(n) for one in sizes)]
    start = 0
    while start < count:
        fitting = [size for size in allowed if size <= min(count - start, MAX_BATCH)] or allowed[:1]
        if not fitting:
            raise InputError(f"{where}: takes no batch of up to {max(count, MAX_BATCH)}")
        yield start, fitting[-1]
        start += fitting[-1]


def load_function(path: Path, function: str | None = None) -> LoadedFunction:
    """A function of a saved `.mlpackage` with any number of outputs; see `open_package`."""
    chosen = read_package(path).function(function)
    where = f"{path}, function {chosen.name!r}"
    _refuse_unknown(chosen.operations, where)
    constants: dict[str, Array] = {}
    steps = []
    known = set(chosen.inputs)
    for operation in chosen.operations:
        if missing := _names(operation) - known:
            raise InputError(f"{where}: {operation} takes {', '.join(sorted(missing))}, which nothing before it gives")
        known |= {name for name, _ in operation.outputs}
        if constants.keys() >= _names(operation):
            constants |= _run_operation(operation, constants, chosen.opset)
        else:
            steps.append(operation)
    if missing := set(chosen.outputs) - known:
        raise InputError(f"{where}: nothing gives the output {', '.join(sorted(missing))}")
    return LoadedFunction(chosen, constants, tuple(steps), where)


@dataclass(frozen=True)
class LoadedFunction:
    """A function whose constants are computed; `steps` are the operators that depend on inputs."""

    function: Function
    constants: Mapping[str, Array]
    steps: tuple[Operation, ...]
    where: str

    def __call__(self, inputs: Arrays) -> Outputs:
        """One run; outputs by name, each in the type that the program declares."""
        if set(inputs) != set(self.function.inputs):
            wanted = ", ".join(self.function.inputs)
            raise InputError(f"{self.where}: got inputs {', '.join(inputs) or 'none'}, want {wanted}")
        results = self._run({name: self._input(name, inputs[name]) for name in self.function.inputs})
        types = {one: declared for operation in self.function.operations for one, declared in operation.outputs}
        types |= self.function.inputs
        return {name: _stored(results[name], types[name].dtype) for name in self.function.outputs}

    def _input(self, name: str, array: NDArray[np.generic]) -> Array:
        """As a carrier; numbers of another type are taken if they are the same in the declared one, or floats."""
        declared = self.function.inputs[name]
        kinds = {"f": "f", "i": "iu", "u": "iu", "b": "b"}[np.dtype(ELEMENT_TYPES[declared.dtype].storage).kind]
        with np.errstate(over="ignore"):
            stored = _stored(array, declared.dtype)
        lost = kinds != "f" and not np.array_equal(stored, array)
        if lost or array.dtype.kind not in kinds or not declared.fits(array.shape):
            raise InputError(f"{self.where}: {name} is {array.dtype} {list(array.shape)}, want {declared}")
        return to_carrier(stored, declared.dtype)

    def _run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Values are dropped after their last use, but for the outputs."""
        values = {**self.constants, **inputs}
        last_use = {name: at for at, operation in enumerate(self.steps) for name in _names(operation)}
        for at, operation in enumerate(self.steps):
            values |= _run_operation(operation, values, self.function.opset)
            for name in _names(operation) - set(self.function.outputs):
                if last_use[name] == at:
                    del values[name]
        return values


def _names(operation: Operation) -> set[str]:
    """Of the values that it takes."""
    return {one for argument in operation.arguments.values() for one in argument if isinstance(one, str)}


def _stored(array: Array, dtype: str) -> Array:
    return array.astype(ELEMENT_TYPES[dtype].storage)


def _run_operation(operation: Operation, values: Mapping[str, Array], opset: int) -> dict[str, Array]:
    """Outputs by name, as carriers of the declared types."""
    operands = {
        parameter: tuple(
            to_carrier(one.array, one.type.dtype) if isinstance(one, Constant) else values[one] for one in argument
        )
        for parameter, argument in operation.arguments.items()
    }
    try:
        with np.errstate(all="ignore"):  # what overflows becomes infinite, as on a device; callers look at outputs
            result = OPERATORS[operation.kind].run(Arguments(operation, operands, opset))
            results = result if isinstance(result, tuple) else (result,)
            if len(results) != len(operation.outputs):
                raise InputError(f"{operation}: {len(results)} results, the program declares {len(operation.outputs)}")
            outputs = zip(operation.outputs, results, strict=True)
            return {name: to_declared(array, declared, operation) for (name, declared), array in outputs}
    except (ValueError, IndexError, TypeError, ArithmeticError, MemoryError) as error:  # NumPy's, of operands unfit
        shapes = {name: [list(array.shape) for array in arrays] for name, arrays in operands.items()}
        raise InputError(f"{operation}: {error} (operands {shapes})") from error


def _refuse_unknown(operations: Iterable[Operation], where: str) -> None:
    """All of them at once: who adds operators wants the whole list."""
    missing = sorted({operation.kind for operation in operations} - set(OPERATORS))
    if missing:
        raise InputError(f"{where}: operators that are not known here: {', '.join(missing)}")
    for operation in operations:
        if complaint := OPERATORS[operation.kind].complaint(operation):
            raise InputError(f"{where}: {operation}: {complaint}")


def package_weights(path: Path, function: str | None = None) -> Mapping[str, NDArray[np.generic]]:
    """A function's weights as they are once the package is loaded, by the name of their value in the program.

    These are its constants of floating point, scalars left out, in their own type (fp16 bit for bit), and what is
    compressed decompressed; palettes and scales are not among them.
    """
    loaded = load_function(path, function)
    operations = [one for one in loaded.function.operations if one.kind.startswith(("const", "constexpr_"))]
    decompressors = [one for one in operations if one.kind != "const"]
    operands = {name for one in decompressors for name in _names(one)}
    weights = {}
    for operation in operations:
        name, declared = operation.outputs[0]
        if name not in operands and declared.dtype in ("fp16", "fp32") and declared.shape:
            weights[name] = _stored(loaded.constants[name], declared.dtype)
    return weights
