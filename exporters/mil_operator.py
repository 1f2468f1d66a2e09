"""What an operator of an ML program is here: its parameters, and a function of NumPy arrays.

Values travel in *carriers*: fp16 and fp32 as float32 (an fp16 value is one that fp16 has), integers of 16 bits and more
as int64, smaller ones as stored, bool as bool. An operator computes in its carriers, so products of fp16 values are
accumulated in fp32, as matrix units do; its result is then rounded once to the type that the program declares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from kind_edge.errors import InputError
from kind_edge.exporters.mil_blob import ELEMENT_TYPES
from kind_edge.exporters.mil_program import Operation, TensorType

Array = NDArray[Any]
_FLOATS = {"fp16", "fp32"}
_WIDE_INTEGERS = {
    "int16": (-(1 << 15), (1 << 15) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
    "int64": (-(1 << 63), (1 << 63) - 1),
    "uint16": (0, (1 << 16) - 1),
    "uint32": (0, (1 << 32) - 1),
}
"""Lowest and highest value."""


_FP16_SUBNORMAL, _FP16_OVERFLOW = np.float32(2**-14), np.float32(65520)
_DROPPED_BITS = 13
"""Of float32's fraction, which fp16 does not have."""
_KEPT_BITS = np.uint32(0xFFFFFFFF ^ ((1 << _DROPPED_BITS) - 1))


class Arguments:
    """The operands of one operator, as carriers, by parameter."""

    def __init__(self, operation: Operation, values: Mapping[str, tuple[Array, ...]], opset: int) -> None:
        self.operation, self.opset, self._values = operation, opset, values

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Array:
        found = self._values[name]
        if len(found) != 1:
            self.refuse(f"{len(found)} values for {name}, want one")
        return found[0]

    def many(self, name: str) -> tuple[Array, ...]:
        return self._values[name]

    @overload
    def get(self, name: str) -> Array | None: ...
    @overload
    def get(self, name: str, default: float) -> Array: ...
    def get(self, name: str, default: float | None = None) -> Array | None:
        if name in self._values:
            return self[name]
        return None if default is None else np.array(default)

    def ints(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        if name not in self._values and default is not None:
            return list(default)
        return [int(value) for value in self[name].ravel()]

    def integer(self, name: str, default: int | None = None) -> int:
        return default if default is not None and name not in self._values else int(self[name].item())

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self[name]) if name in self._values else default

    def text(self, name: str, default: str | None = None) -> str:
        return default if default is not None and name not in self._values else str(self[name].item())

    @property
    def declared(self) -> TensorType:
        """The type of the (first) output."""
        return self.operation.outputs[0][1]

    def refuse(self, complaint: str) -> NoReturn:
        raise InputError(f"{self.operation}: {complaint}")


@dataclass(frozen=True)
class Operator:
    """`parameters`: names, with a question mark after those that may be absent. `run` returns one array, or a tuple of
    one for every output."""

    parameters: str
    run: Callable[[Arguments], Array | tuple[Array, ...]]

    def complaint(self, operation: Operation) -> str | None:
        """What is wrong with the parameters of an operation of this kind."""
        required = {name for name in self.parameters.split() if not name.endswith("?")}
        known = {name.rstrip("?") for name in self.parameters.split()}
        given = set(operation.arguments)
        if given - known:
            return f"parameter {', '.join(sorted(given - known))} is not known here"
        return f"parameter {', '.join(sorted(required - given))} is missing" if required - given else None


def to_carrier(array: Array, dtype: str) -> Array:
    """A stored constant, or an input, as operators want it."""
    if dtype in _FLOATS:
        return array.astype(np.float32)
    return array.astype(np.int64) if dtype in _WIDE_INTEGERS else array


def to_declared(result: Array, declared: TensorType, operation: Operation) -> Array:
    """An operator's result, rounded to the type that the program declares; `InputError` if it cannot be of it."""
    dtype = declared.dtype
    kinds = "f" if dtype in _FLOATS else "i" if dtype in _WIDE_INTEGERS else np.dtype(ELEMENT_TYPES[dtype].storage).kind
    if not declared.fits(result.shape) or result.dtype.kind != kinds:
        got = f"{result.dtype} {list(result.shape)}"
        raise InputError(f"{operation}: the result is {got}, the program declares {declared}")
    if dtype == "fp16":
        return round_to_fp16(result)
    if dtype == "fp32":
        return result.astype(np.float32, copy=False)
    if dtype in _WIDE_INTEGERS and result.size:
        lowest, highest = _WIDE_INTEGERS[dtype]
        if result.min() < lowest or result.max() > highest:
            raise InputError(f"{operation}: {result.min()} to {result.max()} do not fit {dtype}")
    return result


def round_to_fp16(values: Array) -> Array:
    """float32 values to the nearest that fp16 has, ties to even; too large ones become infinite."""
    values = values.astype(np.float32, copy=False)
    size = np.abs(values)
    if not values.ndim or not values.size or not size.max() < _FP16_OVERFLOW:  # if one is not a number, too
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = bits >> _DROPPED_BITS  # converting there and back takes five times as long as doing it on the bits
    rounded &= 1
    rounded += (1 << _DROPPED_BITS - 1) - 1
    rounded += bits
    rounded &= _KEPT_BITS
    result: Array = rounded.view(np.float32)
    if size.min() < _FP16_SUBNORMAL:
        small = size < _FP16_SUBNORMAL
        result[small] = values[small].astype(np.float16)
    return result
