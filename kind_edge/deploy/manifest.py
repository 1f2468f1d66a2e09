"""What a bundle says about itself: `manifest.json`, parsed once into frozen values. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kind_edge.bounded import is_safe_path, parse_json, read_bytes
from kind_edge.budget.precision import decoder_path, decoder_precision
from kind_edge.errors import InputError, UsageError, nearest

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 64 * 2**20

T = TypeVar("T")
_WANTED = {str: "text", int: "an integer", float: "a number", dict: "an object", list: "a list"}


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of a model file; a dimension is a number, or the name of a dynamic one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ModelEntry:
    """One model file of the bundle; `path` is relative to the bundle, with forward slashes.

    `fp32_matrices`: block matrices that the plan keeps in fp32 although the file is int8. `table_precision`: of the
    table of modulation, where it is not that of the file. `wide_operators`: matrices or kinds of operators with more
    bits than the precision says, as rounding them was measured to cost most.
    `functions`: by name the classes, in their own order, of further functions that the file holds.
    """

    path: str
    role: str
    precision: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    fp32_matrices: tuple[str, ...] = ()
    table_precision: str | None = None
    wide_operators: tuple[str, ...] = ()
    functions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def fixed_batch(self) -> int | None:
        """The batch of a static file; None where it is free."""
        first = self.inputs[0].shape[0] if self.inputs and self.inputs[0].shape else None
        return first if isinstance(first, int) else None

    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)


@dataclass(frozen=True)
class SamplerTables:
    """One row per network evaluation: d_i = p x + q prediction; x' = a x + b d_i + c d_{i-1}, with d_{-1} = 0."""

    timestep: tuple[float, ...]
    p: tuple[float, ...]
    q: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[float, ...]
    c: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.timestep)


@dataclass(frozen=True)
class Sampler:
    """How noise becomes an image; `null_index` is the class index of the unconditional branch, if the model has one.

    `guidance` is what the loop does. A distilled model has guidance in its prediction, of strength `inside_guidance`,
    and works with this number of steps alone.
    """

    kind: str
    steps: int
    guidance: float
    null_index: int | None
    tables: SamplerTables
    prediction_channels: int
    inside_guidance: float | None = None

    @property
    def guided(self) -> bool:
        """Whether every row of the tables costs two evaluations: class and null."""
        return self.null_index is not None and self.guidance != 1.0


@dataclass(frozen=True)
class ImageSize:
    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class FileEntry:
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A validated manifest; `raw` is all of it as read (plan, verification, latency, tools, licence, source).

    `image` is what is drawn; `latent` what the loop works on, where a decoder stands between (None: the image itself).
    `threads`: how many are quickest for so small a model; None: as many as there are cores.
    """

    name: str
    classes: tuple[str, ...]
    image: ImageSize
    models: Mapping[str, ModelEntry]
    default_model: str
    sampler: Sampler
    files: Mapping[str, FileEntry]
    raw: Mapping[str, Any]
    threads: int | None = None
    latent: ImageSize | None = None

    def decoder_for(self, model: ModelEntry) -> ModelEntry | None:
        """What ONNX Runtime turns the model's latents into pixels with; None where there is nothing to decode."""
        if self.latent is None or model.role != "denoiser":
            return None
        wanted = decoder_path(decoder_precision(model.precision))
        return self.models.get(wanted) or self.models.get(decoder_path("fp32"))

    @property
    def switches(self) -> bool:
        """Whether a class index picks the class."""
        return any("class_index" in model.input_names() for model in self.models.values())

    def require_classes(self, where: str) -> None:
        """`UsageError` for the core of class packs, which draws nothing by itself."""
        if not self.classes:
            raise UsageError(f"{where}: a core without classes; add some: kind-edge pack add {where} FILE...")

    def entry_of(self, file: str) -> ModelEntry:
        """Of a model file, or of the file that a function ("coreml/Denoiser.mlpackage#shoes") is in."""
        return self.models[file.partition("#")[0]]

    @classmethod
    def from_dict(cls, values: Any, where: str = MANIFEST_NAME) -> Manifest:
        """Parse; a wrong version, a missing key or a wrong type is an `InputError` that names the key."""
        root = _Section(_of_type(values, dict, where), where)
        version = root.take("schema_version", int)
        if version != SCHEMA_VERSION:
            raise InputError(
                f"{where}: schema_version {version}, but this kind-edge reads {SCHEMA_VERSION}; "
                + ("update kind-edge" if version > SCHEMA_VERSION else "export the bundle again")
            )
        models = root.section("models")
        files = root.section("files")
        manifest = cls(
            name=root.take("name", str),
            classes=root.items("classes", str),
            image=_image(root.section("image")),
            models={path: _model(models.section(path), path) for path in models.values},
            default_model=root.take("default_model", str),
            sampler=_sampler(root.section("sampler")),
            files={path: _file(files.section(path)) for path in files.values},
            raw=root.values,
            threads=root.optional("threads", int),
            latent=_image(root.section("latent")) if "latent" in root.values else None,
        )
        _check(manifest, where)
        return manifest

    @classmethod
    def from_bytes(cls, content: bytes, where: str = MANIFEST_NAME) -> Manifest:
        return cls.from_dict(parse_json(content, where), where)


def manifest_bytes(folder: Path) -> bytes:
    """What is in `manifest.json` of a bundle that is a folder; `InputError` if there is none, or one too long."""
    try:
        return read_bytes(folder / MANIFEST_NAME, MAX_MANIFEST_BYTES, MANIFEST_NAME)
    except InputError as error:
        raise InputError(f"{folder}: not a kind-edge bundle: {error}") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle that is a folder; `InputError` if there is none or it is not one."""
    return Manifest.from_bytes(manifest_bytes(folder), str(folder / MANIFEST_NAME))


class _Section:
    """An object of the manifest with the way to it, so that every refusal says where."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def take(self, key: str, kind: type[T]) -> T:
        if key not in self.values:
            raise InputError(f"{self.where}: missing key {key!r}; the nearest there is: {nearest(key, self.values)}")
        return _of_type(self.values[key], kind, f"{self.where}: {key}")

    def optional(self, key: str, kind: type[T]) -> T | None:
        return None if self.values.get(key) is None else self.take(key, kind)

    def section(self, key: str) -> _Section:
        return _Section(self.take(key, dict), f"{self.where}: {key}")

    def items(self, key: str, kind: type[T]) -> tuple[T, ...]:
        return tuple(_of_type(item, kind, f"{self.where}: {key}[{i}]") for i, item in enumerate(self.take(key, list)))

    def sections(self, key: str, parse: Callable[[_Section], T]) -> tuple[T, ...]:
        return tuple(
            parse(_Section(_of_type(item, dict, f"{self.where}: {key}[{i}]"), f"{self.where}: {key}[{i}]"))
            for i, item in enumerate(self.take(key, list))
        )


def _of_type(value: Any, kind: type[T], where: str) -> T:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{where}: got {value!r:.60}, want {_WANTED.get(kind, kind.__name__)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: got {value}, want a finite number")
    return value


def _image(section: _Section) -> ImageSize:
    return ImageSize(section.take("channels", int), section.take("height", int), section.take("width", int))


def _file(section: _Section) -> FileEntry:
    return FileEntry(section.take("bytes", int), section.take("sha256", str))


def _model(section: _Section, path: str) -> ModelEntry:
    return ModelEntry(
        path=path,
        role=section.take("role", str),
        precision=section.take("precision", str),
        inputs=section.sections("inputs", _tensor),
        outputs=section.sections("outputs", _tensor),
        fp32_matrices=section.items("fp32_matrices", str) if "fp32_matrices" in section.values else (),
        table_precision=section.take("table_precision", str) if "table_precision" in section.values else None,
        wide_operators=section.items("wide_operators", str) if "wide_operators" in section.values else (),
        functions=_functions(section.section("functions")) if "functions" in section.values else {},
    )


def _functions(section: _Section) -> dict[str, tuple[str, ...]]:
    return {name: section.items(name, str) for name in section.values}


def _tensor(section: _Section) -> TensorInfo:
    shape = section.take("shape", list)
    if any(isinstance(size, bool) or not isinstance(size, int | str) for size in shape):
        raise InputError(f"{section.where}: shape: got {shape!r}, want integers and names")
    return TensorInfo(section.take("name", str), section.take("dtype", str), tuple(shape))


def _sampler(section: _Section) -> Sampler:
    rows = section.section("tables")
    tables = SamplerTables(*(rows.items(column, float) for column in SamplerTables.__dataclass_fields__))
    lengths = {column: len(getattr(tables, column)) for column in SamplerTables.__dataclass_fields__}
    if len(set(lengths.values())) != 1 or not len(tables):
        raise InputError(
            f"{rows.where}: lengths {lengths}; want one row per evaluation, the same number in every table"
        )
    return Sampler(
        kind=section.take("kind", str),
        steps=section.take("steps", int),
        guidance=section.take("guidance", float),
        null_index=section.optional("null_index", int),
        tables=tables,
        prediction_channels=section.take("prediction_channels", int),
        inside_guidance=section.optional("inside_guidance", float),
    )


def _check(manifest: Manifest, where: str) -> None:
    """What no single key can say."""
    # The core of class packs is a bundle without classes.
    if (not manifest.classes and "packs" not in manifest.raw) or len(set(manifest.classes)) != len(manifest.classes):
        raise InputError(f"{where}: classes: got {list(manifest.classes)}, want at least one, each once")
    if manifest.default_model not in manifest.models:
        raise InputError(f"{where}: default_model {manifest.default_model!r} is not one of {sorted(manifest.models)}")
    for path in manifest.files:
        if not is_safe_path(path) or path == MANIFEST_NAME:
            raise InputError(f"{where}: files: {path!r} is not a plain relative path inside the bundle")
    for path, model in manifest.models.items():
        if strange := {name for classes in model.functions.values() for name in classes} - set(manifest.classes):
            raise InputError(f"{where}: models: {path}: functions: {sorted(strange)} are no classes of the bundle")
        # A Core ML package is a folder: its files stand below the path.
        if path not in manifest.files and not any(name.startswith(f"{path}/") for name in manifest.files):
            raise InputError(f"{where}: models: {path!r} is not among the files")
    if manifest.latent is not None and decoder_path("fp32") not in manifest.models:
        raise InputError(f"{where}: latent: there is no {decoder_path('fp32')} among the models to decode it")
    null_index = manifest.sampler.null_index
    if null_index is not None and null_index != len(manifest.classes):
        raise InputError(
            f"{where}: sampler: null_index {null_index}; want the number of classes, {len(manifest.classes)}"
        )
    if manifest.sampler.inside_guidance is not None and manifest.sampler.guided:
        raise InputError(f"{where}: sampler: guidance is inside the model, so there is no null_index to guide with")
