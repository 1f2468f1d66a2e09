"""The messages of a Core ML model file that an ML program consists of, as Protocol Buffers classes.

Field numbers as in Apple's Model.proto, FeatureTypes.proto and MIL.proto (BSD-3-Clause); what is not listed here is
skipped when a file is read. protobuf alone is needed: Core ML Tools takes seconds to import, and torch with it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_Fields = dict[str, tuple[int, str]]

_SCHEMA: dict[str, _Fields] = {
    "Model": {"specificationVersion": (1, "int32"), "description": (2, "ModelDescription"),
              "mlProgram": (502, "Program")},
    "ModelDescription": {"input": (1, "*FeatureDescription"), "output": (10, "*FeatureDescription"),
                         "functions": (20, "*FunctionDescription"), "defaultFunctionName": (21, "string")},
    "FunctionDescription": {"name": (1, "string"), "input": (2, "*FeatureDescription"),
                            "output": (3, "*FeatureDescription")},
    "FeatureDescription": {"name": (1, "string"), "type": (3, "FeatureType")},
    "FeatureType": {"multiArrayType": (5, "ArrayFeatureType")},
    "ArrayFeatureType": {"shape": (1, "*int64"), "dataType": (2, "int32"), "enumeratedShapes": (21, "EnumeratedShapes"),
                         "shapeRange": (31, "ShapeRange")},
    "EnumeratedShapes": {"shapes": (1, "*Shape")},
    "Shape": {"shape": (1, "*int64")},
    "ShapeRange": {"sizeRanges": (1, "*SizeRange")},
    "SizeRange": {"lowerBound": (1, "uint64"), "upperBound": (2, "int64")},
    "Program": {"version": (1, "int64"), "functions": (2, "*FunctionEntry")},
    "FunctionEntry": {"key": (1, "string"), "value": (2, "Function")},
    "Function": {"inputs": (1, "*NamedValueType"), "opset": (2, "string"), "blocks": (3, "*BlockEntry")},
    "BlockEntry": {"key": (1, "string"), "value": (2, "Block")},
    "Block": {"inputs": (1, "*NamedValueType"), "outputs": (2, "*string"), "operations": (3, "*Operation")},
    "Operation": {"type": (1, "string"), "inputs": (2, "*ArgumentEntry"), "outputs": (3, "*NamedValueType"),
                  "blocks": (4, "*Block"), "attributes": (5, "*ValueEntry")},
    "ArgumentEntry": {"key": (1, "string"), "value": (2, "Argument")},
    "ValueEntry": {"key": (1, "string"), "value": (2, "Value")},
    "Argument": {"arguments": (1, "*Binding")},
    "Binding": {"name": (1, "string"), "value": (2, "Value")},
    "NamedValueType": {"name": (1, "string"), "type": (2, "ValueType")},
    "ValueType": {"tensorType": (1, "TensorType")},
    "TensorType": {"dataType": (1, "int32"), "rank": (2, "int64"), "dimensions": (3, "*Dimension")},
    "Dimension": {"constant": (1, "ConstantDimension"), "unknown": (2, "UnknownDimension")},
    "ConstantDimension": {"size": (1, "uint64")},
    "UnknownDimension": {"variadic": (1, "bool")},
    "Value": {"type": (2, "ValueType"), "immediateValue": (3, "ImmediateValue"), "blobFileValue": (5, "BlobFileValue")},
    "ImmediateValue": {"tensor": (1, "TensorValue")},
    "BlobFileValue": {"fileName": (1, "string"), "offset": (2, "uint64")},
    "TensorValue": {"floats": (1, "Floats"), "ints": (2, "Ints"), "bools": (3, "Bools"), "strings": (4, "Strings"),
                    "longInts": (5, "LongInts"), "bytes": (7, "Bytes")},
    "Floats": {"values": (1, "*float")},
    "Ints": {"values": (1, "*int32")},
    "Bools": {"values": (1, "*bool")},
    "Strings": {"values": (1, "*string")},
    "LongInts": {"values": (1, "*int64")},
    "Bytes": {"values": (1, "bytes")},
}  # fmt: skip
"""Message -> field -> (number, type); a star marks a repeated field. A map is a repeated entry of key and value."""

_PACKAGE = "kind_edge.coreml"


@cache
def message_class(name: str) -> Any:
    """The class of a message of the table. Its pool is its own: Core ML Tools may be loaded beside it."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


@cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="kind_edge_coreml.proto", package=_PACKAGE, syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field_name, (number, kind) in fields.items():
            field = message.field.add(name=field_name, number=number, label=kinds.LABEL_OPTIONAL)
            if kind.startswith("*"):
                kind, field.label = kind[1:], kinds.LABEL_REPEATED
            if kind in _SCHEMA:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                field.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool
