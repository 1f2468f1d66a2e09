"""A saved `.mlpackage` as frozen values: its functions, their operators and every constant. NumPy and protobuf alone.

Whatever the file has that is not understood is refused, not skipped: a program half understood would be run wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from kind_edge.bounded import is_safe_path, read_bytes, read_object
from kind_edge.errors import InputError, unknown
from kind_edge.exporters.mil_blob import BY_PROGRAM_CODE, ELEMENT_TYPES, BlobFile, ElementType, decode
from kind_edge.exporters.mil_schema import message_class

_ITEMS = Path("Data")
_ROOT_OF_BLOBS = "@model_path/"
_OPSETS = {f"CoreML{version}": version for version in range(5, 10)}
_MODEL_BYTES = 2**31
"""What Protocol Buffers allow in one message."""
_COMMENTS = {"name"}
"""Attributes of an operator that say nothing about what it computes."""


@dataclass(frozen=True)
class TensorType:
    """`dtype` is a name of `ELEMENT_TYPES`; a size of None is known at run time only."""

    dtype: str
    shape: tuple[int | None, ...]

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == len(self.shape) and all(a in (None, b) for a, b in zip(self.shape, shape, strict=True))

    def __str__(self) -> str:
        return f"{self.dtype} [{', '.join('?' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Constant:
    """A value as it is stored: in its own precision, text as a NumPy array of text. `from_blob`: it is a weight."""

    type: TensorType
    array: NDArray[Any]
    from_blob: bool = False


@dataclass(frozen=True)
class Operation:
    """One operator: names of earlier values, or constants, by parameter (several of them for `values` of a concat)."""

    kind: str
    name: str
    arguments: Mapping[str, tuple[str | Constant, ...]]
    outputs: tuple[tuple[str, TensorType], ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r}"


@dataclass(frozen=True)
class Sizes:
    """The sizes that an input may have, each axis by itself: (lowest, highest), or one of the listed shapes."""

    ranges: tuple[tuple[int, float], ...]
    listed: tuple[tuple[int, ...], ...] = ()

    def allow_first(self, size: int) -> bool:
        """Whether the first axis may have that size."""
        if self.listed:
            return any(shape[0] == size for shape in self.listed)
        return bool(self.ranges) and self.ranges[0][0] <= size <= self.ranges[0][1]


@dataclass(frozen=True)
class Function:
    """`opset`: 6 is iOS 16, 7 iOS 17, 8 iOS 18. `sizes`: of every input, as the model's interface allows them."""

    name: str
    opset: int
    inputs: Mapping[str, TensorType]
    sizes: Mapping[str, Sizes]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Package:
    path: Path
    functions: Mapping[str, Function]
    default: str

    def function(self, name: str | None = None) -> Function:
        """By name; the default one for None. An unknown name is a `UsageError` with the nearest known ones."""
        name = self.default if name is None else name
        if name not in self.functions:
            raise unknown("function", name, self.functions)
        return self.functions[name]


def read_package(path: Path) -> Package:
    """Parse a saved package. `InputError` for what is missing, damaged, or of a kind that is not understood."""
    model_path = _root_model(path)
    try:
        model = message_class("Model").FromString(read_bytes(model_path, _MODEL_BYTES, "the model"))
    except DecodeError as error:
        raise InputError(f"{model_path}: is not a Core ML model: {error}") from error
    if not model.HasField("mlProgram"):
        raise InputError(f"{model_path}: holds no ML program, which is the only kind of model that is run here")
    values = _Values(model_path.parent)
    description = model.description
    described = {described.name: described.input for described in description.functions}
    functions = {}
    for entry in model.mlProgram.functions:
        features = described.get(entry.key, description.input)
        functions[entry.key] = _function(entry.key, entry.value, features, values, str(model_path))
    default = description.defaultFunctionName or "main"
    if default not in functions:
        raise InputError(f"{model_path}: has no function {default!r}, only {', '.join(functions) or 'none'}")
    return Package(path, functions, default)


def _root_model(path: Path) -> Path:
    """The model file that the package's list of items names."""
    manifest = path / "Manifest.json"
    try:
        listed = read_object(manifest, "the list of items")
        item = str(listed["itemInfoEntries"][listed["rootModelIdentifier"]]["path"])
    except InputError as error:
        raise InputError(f"{path}: is no Core ML package ({error})") from error
    except (KeyError, TypeError) as error:
        raise InputError(f"{manifest}: names no model file ({error!r})") from error
    if not is_safe_path(item):
        raise InputError(f"{manifest}: the model file {item!r} is not inside the package")
    return path / _ITEMS / item


def _function(name: str, message: Any, features: Iterable[Any], values: _Values, where: str) -> Function:
    where = f"{where}, function {name!r}"
    if message.opset not in _OPSETS:
        raise InputError(f"{where}: opset {message.opset!r}, want one of {', '.join(_OPSETS)}")
    blocks = {entry.key: entry.value for entry in message.blocks}
    if message.opset not in blocks:
        raise InputError(f"{where}: has no block for {message.opset}, only {', '.join(blocks) or 'none'}")
    block = blocks[message.opset]
    inputs = {one.name: _tensor_type(one.type, f"{where}, input {one.name!r}") for one in message.inputs}
    sizes = {feature.name: _sizes(feature) for feature in features}
    if set(sizes) != set(inputs):
        raise InputError(f"{where}: takes {', '.join(sorted(inputs))}, but its interface says {', '.join(sizes)}")
    operations = tuple(_operation(operation, values, where) for operation in block.operations)
    return Function(name, _OPSETS[message.opset], inputs, sizes, operations, tuple(block.outputs))


def _operation(message: Any, values: _Values, where: str) -> Operation:
    name = message.outputs[0].name if message.outputs else "without outputs"
    where = f"{where}, {message.type} {name!r}"
    if message.blocks:
        raise InputError(f"{where}: has a block of its own, and control flow is not run here")
    arguments: dict[str, tuple[str | Constant, ...]] = {
        entry.key: tuple(
            values.read(one.value, f"{where}, {entry.key}") if one.HasField("value") else one.name
            for one in entry.value.arguments
        )
        for entry in message.inputs
    }
    for entry in message.attributes:  # of const, and of the decompressors up to iOS 17, the operands lie here
        if entry.key not in _COMMENTS:
            arguments[entry.key] = (values.read(entry.value, f"{where}, {entry.key}"),)
    outputs = tuple((one.name, _tensor_type(one.type, where)) for one in message.outputs)
    return Operation(message.type, name, arguments, outputs)


def _tensor_type(message: Any, where: str) -> TensorType:
    if not message.HasField("tensorType"):
        raise InputError(f"{where}: is no tensor, and lists, tuples and states are not run here")
    tensor = message.tensorType
    if tensor.dataType not in BY_PROGRAM_CODE:
        raise InputError(f"{where}: element type {tensor.dataType} is not known here")
    sizes = tuple(one.constant.size if one.HasField("constant") else None for one in tensor.dimensions)
    if len(sizes) != tensor.rank:
        raise InputError(f"{where}: rank {tensor.rank}, but {len(sizes)} sizes")
    return TensorType(BY_PROGRAM_CODE[tensor.dataType].name, sizes)


def _sizes(feature: Any) -> Sizes:
    array = feature.type.multiArrayType
    if array.HasField("enumeratedShapes"):
        return Sizes((), tuple(tuple(shape.shape) for shape in array.enumeratedShapes.shapes))
    if array.HasField("shapeRange"):
        ranges = array.shapeRange.sizeRanges
        return Sizes(tuple((one.lowerBound, math.inf if one.upperBound < 0 else one.upperBound) for one in ranges))
    return Sizes(tuple((size, size) for size in array.shape))


class _Values:
    """Reads constants; weight files are opened once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._blobs = folder, dict[str, BlobFile]()

    def read(self, message: Any, where: str) -> Constant:
        kind = _tensor_type(message.type, where)
        element = ELEMENT_TYPES[kind.dtype]
        if None in kind.shape:
            raise InputError(f"{where}: a constant of unknown size")
        shape = tuple(int(size) for size in kind.shape if size is not None)
        if message.HasField("blobFileValue"):
            blob = self._blob(message.blobFileValue.fileName, where)
            array = blob.read(message.blobFileValue.offset, element, math.prod(shape))
            return Constant(kind, array.reshape(shape), from_blob=True)
        array = _immediate(message, element, math.prod(shape), where)
        if array.size != math.prod(shape):
            raise InputError(f"{where}: {array.size} values, want {kind}")
        return Constant(kind, array.reshape(shape))

    def _blob(self, name: str, where: str) -> BlobFile:
        inside = name.removeprefix(_ROOT_OF_BLOBS)
        if inside == name or not is_safe_path(inside):
            raise InputError(f"{where}: its weights are in {name!r}, which is not inside the package")
        if name not in self._blobs:
            self._blobs[name] = BlobFile(self._folder / inside)
        return self._blobs[name]


def _immediate(message: Any, element: ElementType, count: int, where: str) -> NDArray[Any]:
    """A value inside the program: numbers as they are, or bytes as a weight file has them."""
    if not message.HasField("immediateValue") or not message.immediateValue.HasField("tensor"):
        raise InputError(f"{where}: is no tensor, and lists, tuples and dictionaries are not read here")
    tensor = message.immediateValue.tensor
    if tensor.HasField("bytes"):
        return decode(tensor.bytes.values, element, count, where)
    for kind in ("floats", "ints", "bools", "strings", "longInts"):
        if tensor.HasField(kind):
            values = list(getattr(tensor, kind).values)
            if (kind == "strings") != (element.name == "string"):
                raise InputError(f"{where}: {kind} for {element.name}")
            return np.array(values) if kind == "strings" else np.array(values).astype(element.storage)
    return np.zeros(0, element.storage)
