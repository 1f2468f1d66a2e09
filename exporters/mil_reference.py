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

    A package of a fixed batch runs once for every part of that size, the last one filled up. `InputError` for what
    cannot be read or is not known here.
    """
    loaded = load_function(path, function)
    if len(loaded.function.outputs) != 1:
        raise InputError(f"{path}: has outputs {', '.join(loaded.function.outputs)}, want one")

    def interpret(inputs: Arrays) -> NDArray[np.float32]:
        (output,) = loaded(inputs).values()
        return output.astype(np.float32)

    return interpret


def load_function(path: Path, function: str | None = None) -> LoadedFunction:
    """A function of a saved `.mlpackage` with any number of outputs; see `open_package`."""
    chosen = read_package(path).function(function)
    where = f"{path}, function {chosen.name!r}"
    _refuse_unknown(chosen.operations, where)
    constants: dict[str, Array] = {}
    steps = []
    for operation in chosen.operations:
        if constants.keys() >= _names(operation):
            constants |= _run_operation(operation, constants, chosen.opset)
        else:
            steps.append(operation)
    return LoadedFunction(chosen, constants, tuple(steps), where)


@dataclass(frozen=True)
class LoadedFunction:
    """A function whose constants are computed; `steps` are the operators that depend on inputs."""

    function: Function
    constants: Mapping[str, Array]
    steps: tuple[Operation, ...]
    where: str

    def __call__(self, inputs: Arrays) -> Outputs:
        """Outputs by name, each in the type that the program declares."""
        arrays = {name: self._input(name, inputs) for name in self._checked_names(inputs)}
        count = max(len(array) for array in arrays.values())
        parts = [self._part(arrays, count, start, stop, size) for start, stop, size in self._batches(count)]
        return {name: np.concatenate([part[name] for part in parts]) for name in self.function.outputs}

    def _checked_names(self, inputs: Arrays) -> Iterable[str]:
        if set(inputs) != set(self.function.inputs):
            wanted = ", ".join(self.function.inputs)
            raise InputError(f"{self.where}: got inputs {', '.join(inputs) or 'none'}, want {wanted}")
        return self.function.inputs

    def _input(self, name: str, inputs: Arrays) -> Array:
        array, declared = np.atleast_1d(inputs[name]), self.function.inputs[name]
        kind = {"f": "f", "i": "iu", "u": "iu", "b": "b"}[np.dtype(ELEMENT_TYPES[declared.dtype].storage).kind]
        if array.dtype.kind not in kind or array.ndim != len(declared.shape):
            raise InputError(f"{self.where}: {name} is {array.dtype} {list(array.shape)}, want {declared}")
        return to_carrier(array.astype(ELEMENT_TYPES[declared.dtype].storage), declared.dtype)

    def _batches(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, size): parts of a batch, each run at a size that every input may have."""
        sizes = [n for n in range(1, max(count, MAX_BATCH) + 1) if self._allows(n)]
        start = 0
        while start < count:
            fitting = [size for size in sizes if size <= min(count - start, MAX_BATCH)] or sizes[:1]
            if not fitting:
                raise InputError(f"{self.where}: takes no batch of up to {max(count, MAX_BATCH)}")
            yield start, min(start + fitting[-1], count), fitting[-1]
            start += fitting[-1]

    def _allows(self, batch: int) -> bool:
        sizes = self.function.sizes.values()
        return all(one.allow_first(batch) for one in sizes)

    def _part(self, arrays: Mapping[str, Array], count: int, start: int, stop: int, size: int) -> dict[str, Array]:
        values = {}
        for name, array in arrays.items():
            part = array[start:stop] if len(array) == count else array
            filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
            declared = self.function.inputs[name]
            if not declared.fits(filled.shape):
                raise InputError(f"{self.where}: {name} has shape {list(filled.shape)}, want {declared}")
            values[name] = filled
        results = self._run(values)
        return {name: _stored(results[name], self._dtype(name))[: stop - start] for name in self.function.outputs}

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

    def _dtype(self, name: str) -> str:
        types = {one: declared for operation in self.function.operations for one, declared in operation.outputs}
        return (types | dict(self.function.inputs))[name].dtype


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
    except (ValueError, IndexError) as error:  # NumPy's, of shapes that do not go together
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
