"""A class pack: one class's rows, and what the gated model says of it, in one safetensors file.

    8 bytes       n, little-endian
    n bytes       the header, JSON: name -> dtype, shape, data_offsets; and __metadata__
    the data      every row by the name of its table, the reference by the names `verify/...`
    32 bytes      the last tensor, `sha256`: the SHA-256 of all that stands before it

Written and read here rather than by the library: the runtime has numpy alone, and the order of the file is ours.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.bounded import parse_json, read_bytes
from kind_edge.deploy.packs import Core
from kind_edge.errors import InputError

PACK_SUFFIX = ".safetensors"
PACK_SCHEMA = "2"
DIGEST, DIGEST_BYTES = "sha256", 32
REFERENCE = "verify/"
POINTS = ("sample", "step_index", "timestep", "prediction")
IMAGES = ("noise", "image", "latent")
"""Of whole images; latents only where a decoder makes images of them."""
_TOLD = ("checkpoint_sha256", "model_license", "model_author", "training_data")
"""Where a class comes from, named as in the metadata of ONNX files; what is not known is left out."""
_KEYS = ("kind_edge_pack", "core", "class", *_TOLD[:2])
_DTYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64}
"""Of reference arrays; rows are bytes."""
_MAX_HEADER_BYTES = 100_000_000
_MAX_PACK_BYTES = 2**30


@dataclass(frozen=True)
class ClassPack:
    """One class. `rows` by table; `reference` arrays of the class alone; `told`: where it comes from."""

    class_name: str
    core_sha256: str
    told: Mapping[str, str]
    rows: Mapping[str, bytes]
    reference: Mapping[str, NDArray[Any]]
    sha256: str = ""

    @property
    def row_bytes(self) -> int:
        return sum(map(len, self.rows.values()))


def pack_names(classes: Iterable[str]) -> dict[str, str]:
    """A file name for every class that any system can hold: "T-shirt/top" -> "T-shirt-top.safetensors"."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for name in classes:
        stem = plain = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "class"
        number = 1
        while stem.lower() in taken:
            number += 1
            stem = f"{plain}-{number}"
        taken.add(stem.lower())
        names[name] = f"{stem}{PACK_SUFFIX}"
    return names


def pack_bytes(pack: ClassPack, core: Core) -> bytes:
    """The file; the same pack gives the same bytes. Tables lie in the core's order, the reference behind them."""
    header: dict[str, Any] = {"__metadata__": _metadata(pack)}
    data: list[bytes] = []
    at = 0

    def put(name: str, dtype: str, shape: Iterable[int], content: bytes) -> None:
        nonlocal at
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(content)]}
        data.append(content)
        at += len(content)

    for name, table in core.tables.items():
        put(name, table.dtype, table.shape, pack.rows[name])
    for name in (*POINTS, *IMAGES):
        if name in pack.reference:
            array = pack.reference[name]
            dtype = next(key for key, kind in _DTYPES.items() if kind == array.dtype)
            put(REFERENCE + name, dtype, array.shape, np.ascontiguousarray(array).tobytes())
    put(DIGEST, "U8", [DIGEST_BYTES], b"\0" * DIGEST_BYTES)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    text += b" " * (-len(text) % 8)
    whole = b"".join([len(text).to_bytes(8, "little"), text, *data[:-1]])
    return whole + hashlib.sha256(whole).digest()


def _metadata(pack: ClassPack) -> dict[str, str]:
    """Texts alone, as safetensors has it."""
    return {
        "kind_edge_pack": PACK_SCHEMA,
        "core": pack.core_sha256,
        "class": pack.class_name,
        **pack.told,
    }


def read_pack(path: Path | str) -> ClassPack:
    """Read and check a pack file; `InputError` that says what is wrong with it."""
    content = read_bytes(path, _MAX_PACK_BYTES, "the pack")
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > min(len(content) - 8, _MAX_HEADER_BYTES) or content[8:9] != b"{":
        raise InputError(f"{path}: not a class pack, or cut short; want a .safetensors file of kind-edge export")
    header = parse_json(content[8 : 8 + size], f"{path}: header")
    told = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(told, dict) or not all(isinstance(told.get(key), str) for key in _KEYS):
        raise InputError(f"{path}: a safetensors file, but no class pack; want one from packs/ of a bundle")
    if told["kind_edge_pack"] != PACK_SCHEMA:
        raise InputError(
            f"{path}: pack of version {told['kind_edge_pack']}, this kind-edge reads {PACK_SCHEMA}; update"
        )
    own = {key: told[key] for key in _TOLD if key in told}
    if not all(isinstance(line, str) and line.isprintable() for line in own.values()):  # they go into NOTICE
        raise InputError(f"{path}: want one line of text for each of {', '.join(own)}; export the pack again")
    data = memoryview(content)[8 + size :]
    tensors = _tensors(header, data, str(path))
    end = tensors.pop(DIGEST, ("", (), memoryview(b"")))[2]
    if len(end) != DIGEST_BYTES or hashlib.sha256(content[:-DIGEST_BYTES]).digest() != end:
        raise InputError(
            f"{path}: the pack is damaged: its bytes are not those that it was written with; copy it again"
        )
    try:
        reference = {
            name.removeprefix(REFERENCE): np.frombuffer(view, _DTYPES[dtype]).reshape(shape)
            for name, (dtype, shape, view) in tensors.items()
            if name.startswith(REFERENCE)
        }
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path}: its reference cannot be read ({error}); export the pack again") from error
    rows = {name: bytes(view) for name, (_, _, view) in tensors.items() if not name.startswith(REFERENCE)}
    sha256 = hashlib.sha256(content).hexdigest()
    return ClassPack(told["class"], told["core"], own, rows, reference, sha256)


def _tensors(
    header: Mapping[str, Any], data: memoryview, where: str
) -> dict[str, tuple[str, tuple[int, ...], memoryview]]:
    """Type, shape and bytes by name; the offsets must cover the data without holes."""
    found, at = {}, 0
    try:
        for name, each in header.items():
            start, end = each["data_offsets"]
            if start != at or end < start:
                raise ValueError(name)
            found[name] = (str(each["dtype"]), tuple(each["shape"]), data[start:end])
            at = end
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: its header is no safetensors header ({error!r}); copy the pack again") from error
    if at != len(data):
        raise InputError(f"{where}: {len(data)} bytes of data, its header says {at}: cut short; copy the pack again")
    return found


def check_pack(pack: ClassPack, core: Core, where: str) -> None:
    """Refuse a pack of another core by name, and one whose rows are not what the core wants."""
    if pack.core_sha256 != core.sha256:
        raise InputError(
            f"{where}: the pack of {pack.class_name!r} is for core {pack.core_sha256[:12]}, this bundle has core "
            f"{core.sha256[:12]}: another plan, model or precision; take the pack that was exported with this core, or "
            "make one for it: kind-edge pack make"
        )
    wanted = {name: table.row_bytes for name, table in core.tables.items()}
    if {name: len(row) for name, row in pack.rows.items()} != wanted:
        raise InputError(f"{where}: the pack of {pack.class_name!r} lacks rows that its core has; export it again")
