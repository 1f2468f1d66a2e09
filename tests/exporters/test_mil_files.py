"""The files of a package: read as Core ML Tools write them, and refused where they are damaged or not understood."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from kind_edge.errors import InputError
from kind_edge.exporters import mil_schema
from kind_edge.exporters.mil_blob import ELEMENT_TYPES, BlobFile
from kind_edge.exporters.mil_reference import load_function

Array = NDArray[Any]
MODEL, WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights/weight.bin"
X = {"x": np.ones((2, 3, 8), np.float32)}


def small(x: Any) -> dict[str, Any]:
    from coremltools.converters.mil import Builder as mb

    weight = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    return {"y": mb.gelu(x=mb.softmax(x=mb.linear(x=x, weight=weight), axis=-1), mode="TANH_APPROXIMATION")}


@pytest.fixture(scope="module")
def saved(save_program: Callable[..., Path], made_once: Callable[..., Path]) -> Path:
    """A program with one weight. Only to be read."""
    folder = made_once("mil-files", lambda folder: save_program(folder, small, X, 16))
    return next(folder.glob("*.mlpackage"))


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


BLOBS = {name: element for name, element in ELEMENT_TYPES.items() if element.blob_code is not None}


@given(st.lists(st.tuples(st.sampled_from(sorted(BLOBS)), st.integers(1, 70), st.integers(0, 99)), max_size=6))
def test_blobs_read_as_core_ml_tools_write_and_read_them(blobs: list[tuple[str, int, int]]) -> None:
    from coremltools.libmilstoragepython import _BlobStorageReader, _BlobStorageWriter

    def limits(bits: int, signed: bool) -> tuple[int, int]:
        return (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)

    with TemporaryDirectory() as folder:
        path = Path(folder) / "weight.bin"
        writer, written = _BlobStorageWriter(str(path)), []
        for name, count, seed in blobs:
            element, rng = BLOBS[name], np.random.default_rng(seed)
            call = {"fp32": "float"}.get(name, name)
            if name in ("fp16", "fp32"):
                array = rng.standard_normal(count).astype(element.storage)
            else:
                array = rng.integers(*limits(element.bits, name.startswith("int")), count).astype(element.storage)
            offset = getattr(writer, f"write_{call}_data")(array.view(np.uint16) if name == "fp16" else array)
            written.append((element, array, offset, call))
        del writer
        if not blobs:
            return
        theirs, ours = _BlobStorageReader(str(path)), BlobFile(path)
        assert ours.count == len(blobs)
        for element, array, offset, call in written:
            got = ours.read(offset, element, len(array))
            assert (got.dtype, got.tobytes()) == (array.dtype, array.tobytes()), element
            assert np.asarray(getattr(theirs, f"read_{call}_data")(offset)).tobytes() == array.tobytes(), element


def test_the_schema_is_that_of_core_ml_tools() -> None:
    from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2

    def all_of(messages: Any) -> dict[str, Any]:
        found = {}
        for message in messages:
            found |= {message.name: message, **all_of(message.nested_types)}
        return found

    theirs = {}
    for file in (FeatureTypes_pb2, MIL_pb2, Model_pb2):
        theirs |= all_of(file.DESCRIPTOR.message_types_by_name.values())
    renamed = {"FunctionEntry": "FunctionsEntry", "BlockEntry": "BlockSpecializationsEntry",
               "ArgumentEntry": "InputsEntry", "ValueEntry": "AttributesEntry"}  # fmt: skip
    renamed |= {f"{kind}s": f"Repeated{kind}s" for kind in ("Float", "Int", "Bool", "String", "LongInt", "Byte")}
    for name in mil_schema._SCHEMA:
        ours = mil_schema.message_class(name).DESCRIPTOR
        for field in ours.fields:
            label = "block_specializations" if (name, field.name) == ("Function", "blocks") else field.name
            other = theirs[renamed.get(name, name)].fields_by_name[label]
            kinds = {field.type, other.type} - {other.TYPE_ENUM, other.TYPE_INT32}  # which are written alike
            assert (field.number, field.is_repeated) == (other.number, other.is_repeated), (name, label)
            assert len(kinds) < 2, (name, label)


def edit(package: Path, change: Callable[[Any], None]) -> None:
    """Write the model anew after `change` of its message."""
    model = mil_schema.message_class("Model").FromString((package / MODEL).read_bytes())
    change(model)
    (package / MODEL).write_bytes(model.SerializeToString())


def operation(model: Any, kind: str) -> Any:
    operations = model.mlProgram.functions[0].value.blocks[0].value.operations
    return next(one for one in operations if one.type == kind)


def set_type(model: Any) -> None:
    operation(model, "softmax").type = "sparsemax"


def set_parameter(model: Any) -> None:
    operation(model, "softmax").inputs[0].key = "temperature"


def set_mode(model: Any) -> None:
    for one in model.mlProgram.functions[0].value.blocks[0].value.operations:
        for attribute in one.attributes:
            for text in attribute.value.immediateValue.tensor.strings.values:
                if text == "TANH_APPROXIMATION":
                    attribute.value.immediateValue.tensor.strings.values[:] = ["COARSE"]


def set_input(model: Any) -> None:
    operation(model, "gelu").inputs[0].value.arguments[0].name = "nowhere"


def set_shape(model: Any) -> None:
    operation(model, "softmax").outputs[0].type.tensorType.dimensions[0].constant.size = 9


def set_blob(model: Any) -> None:
    for one in model.mlProgram.functions[0].value.blocks[0].value.operations:
        for attribute in one.attributes:
            if attribute.value.HasField("blobFileValue"):
                attribute.value.blobFileValue.fileName = "@model_path/../../../../outside.bin"


def set_opset(model: Any) -> None:
    model.mlProgram.functions[0].value.opset = "CoreML99"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (set_type, "not known here: sparsemax"),
        (set_parameter, r"softmax .*parameter temperature is not known here"),
        (set_mode, r"gelu .*mode 'COARSE' is not known here"),
        (set_input, r"gelu .* takes nowhere"),
        (set_shape, r"softmax .*the result is float32 \[2, 3, 16\], the program declares fp32 \[9, 3, 16\]"),
        (set_blob, "not inside the package"),
        (set_opset, "CoreML99"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(copied: Path, change: Any, complaint: str) -> None:
    assert load_function(copied)(X)["y"].shape == (2, 3, 16)
    edit(copied, change)
    with pytest.raises(InputError, match=complaint):
        load_function(copied)(X)


def put(at: int, number: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:at] + number.to_bytes(4, "little") + content[at + 4 :]


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda content: content[:-8], "cut short"),
        (lambda content: content[:40], "no weight file"),
        (lambda content: b"", "no weight file"),
        (put(4, 1), "version 1, want 2"),
        (put(64, 7), "no blob begins there"),
        (put(68, 1), "holds fp16, the program says fp32"),
        (put(72, 64), "64 bytes, want 128 elements"),
        (put(80, 4096), "cut short"),
    ],
)
def test_damaged_weights_are_refused(copied: Path, damage: Callable[[bytes], bytes], complaint: str) -> None:
    (copied / WEIGHTS).write_bytes(damage((copied / WEIGHTS).read_bytes()))
    with pytest.raises(InputError, match=complaint):
        load_function(copied)


def test_what_is_no_package_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: is no Core ML package"):
        load_function(tmp_path / "nowhere")
    manifest = json.loads((copied / "Manifest.json").read_text())
    for entry in manifest["itemInfoEntries"].values():
        entry["path"] = "../../elsewhere"
    (copied / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="not inside the package"):
        load_function(copied)
    (copied / "Manifest.json").write_text("{}")
    with pytest.raises(InputError, match="names no model file"):
        load_function(copied)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 255))
@example(0.14, 0)
def test_a_changed_byte_of_the_model_is_an_input_error_or_no_matter(saved: Path, where: float, byte: int) -> None:
    content = (saved / MODEL).read_bytes()
    at = int(where * len(content))
    with TemporaryDirectory() as folder:
        for file in ("Manifest.json", WEIGHTS):
            (Path(folder) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(folder) / file).symlink_to(saved / file)
        (Path(folder) / MODEL).write_bytes(content[:at] + bytes([byte]) + content[at + 1 :])
        with contextlib.suppress(InputError):
            load_function(Path(folder))


def test_inputs_are_checked(saved: Path) -> None:
    run = load_function(saved)
    for inputs, complaint in (
        ({}, "got inputs none, want x"),
        ({"z": X["x"]}, "got inputs z, want x"),
        ({"x": X["x"].astype(np.int32)}, r"x is int32 \[2, 3, 8\], want fp32"),
        ({"x": X["x"][:1]}, r"x is float32 \[1, 3, 8\], want fp32 \[2, 3, 8\]"),
    ):
        with pytest.raises(InputError, match=complaint):
            run(inputs)
