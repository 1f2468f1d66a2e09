"""A checkpoint is a folder: config.json and model.safetensors (sharded with an index when large). Never pickle.

Beside them, both optional: calibration.safetensors (covariances at both sides of every matrix) and heldout.safetensors
(images that training never saw, for measuring what truncation costs).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kind_edge.bounded import read_json, read_object
from kind_edge.errors import InputError, UsageError
from kind_edge.model.dit import DiT, sincos_position_table
from kind_edge.model.spec import ModelSpec
from kind_edge.units import format_bytes

SCHEMA_VERSION = 1
SHARD_BYTES = 16 * 1000**2
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
CALIBRATION, HELDOUT = "calibration.safetensors", "heldout.safetensors"
HELDOUT_IMAGES, HELDOUT_LATENTS = "images", "latents"
"""Of HELDOUT, the tensor beside `labels`: uint8 pixels, or float16 latents in the network's own scale."""


@dataclass(frozen=True)
class Checkpoint:
    """A model at rest. `tensors` keep the dtype of the file; `model()` computes in float32."""

    spec: ModelSpec
    class_names: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    def model(self) -> DiT:
        """The gated model in float32, in evaluation mode."""
        model = DiT(self.spec)
        model.load_state_dict(self.float_tensors())
        return model.eval().requires_grad_(False)

    def float_tensors(self) -> dict[str, Tensor]:
        """All tensors in float32. A sine-cosine table that storage rounded is computed anew, as other formats do."""
        table = sincos_position_table(self.spec.image_size // self.spec.patch_size, self.spec.width)
        rounded = torch.equal(table.to(self.tensors["pos_embed"].dtype), self.tensors["pos_embed"])
        tensors = {name: tensor.float() for name, tensor in self.tensors.items()}
        return tensors | {"pos_embed": table} if rounded else tensors


def stored_dtype(source: Checkpoint) -> torch.dtype:
    """In what a checkpoint made from another is stored: fp16 if that one was, else fp32."""
    return torch.float16 if all(t.dtype == torch.float16 for t in source.tensors.values()) else torch.float32


def as_stored(checkpoint: Checkpoint, source: Checkpoint) -> Checkpoint:
    """In float32, with the values that it has once it was stored with `stored_dtype(source)` and read again."""
    tensors = {name: tensor.to(stored_dtype(source)) for name, tensor in checkpoint.tensors.items()}
    rounded = dataclasses.replace(checkpoint, tensors=tensors)
    return dataclasses.replace(rounded, tensors=rounded.float_tensors())


def expected_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in DiT(spec).state_dict().items()}


def check_tensors(spec: ModelSpec, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse tensors that disagree with the spec, naming the first few: path, got, wanted."""
    wanted = expected_shapes(spec)
    faults = [f"{name}: missing, want {shape}" for name, shape in wanted.items() if name not in shapes]
    faults += [f"{name}: unexpected" for name in shapes if name not in wanted]
    faults += [
        f"{name}: file has {shapes[name]}, model wants {shape}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        raise InputError(f"{where}: tensors do not match config.json: {'; '.join(faults[:3])}{more}")


def save_checkpoint(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Write config and weights, each file by renaming a finished one into place."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().to("cpu", dtype or t.dtype).contiguous() for n, t in sorted(checkpoint.tensors.items())}
    check_tensors(checkpoint.spec, {name: tuple(t.shape) for name, t in tensors.items()}, str(folder))
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for name, keys in split.filename_to_tensors.items():
        write_tensors(folder / name, {key: tensors[key] for key in keys})
    for stale in set(folder.glob("model*.safetensors*")) - {folder / name for name in split.filename_to_tensors}:
        stale.unlink()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_text(folder / INDEX, json.dumps(index, indent=2))
    config = {
        "schema_version": SCHEMA_VERSION,
        "model": checkpoint.spec.to_dict(),
        "class_names": list(checkpoint.class_names),
        "provenance": dict(checkpoint.provenance),
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint; anything missing, corrupt or contradictory is an `InputError` that says where."""
    config = read_config(folder)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors.update(read_tensors(file))
    spec = ModelSpec.from_dict(config["model"], f"{folder / CONFIG}: model")
    check_tensors(spec, {name: tuple(t.shape) for name, t in tensors.items()}, str(folder))
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise InputError(f"{folder}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, want {wanted}")
        if not torch.isfinite(tensor).all():
            raise InputError(f"{folder}: tensor {name} holds NaN or infinity")
    names = tuple(config["class_names"])
    if len(names) != spec.num_classes or len(set(names)) != len(names):
        raise InputError(f"{folder / CONFIG}: got {len(names)} class names, want {spec.num_classes} different ones")
    return Checkpoint(spec, names, tensors, config["provenance"], folder)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, checked for its version and its keys."""
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder} is not a checkpoint: it has no {CONFIG}")
    config = read_json(path, "the configuration")
    version = config.get("schema_version") if isinstance(config, dict) else None
    if version != SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version is {version!r}, this kind-edge reads {SCHEMA_VERSION}")
    for key, kind, wanted in (("model", dict, "an object"), ("class_names", list, "a list of names")):
        if key not in config:
            raise InputError(f"{path}: missing key {key!r}")
        if not isinstance(config[key], kind):
            raise InputError(f"{path}: {key}: got {config[key]!r:.60}, want {wanted}")
    if not all(isinstance(name, str) for name in config["class_names"]):
        raise InputError(f"{path}: class_names: got {config['class_names']!r:.60}, want a list of names")
    if not isinstance(config.setdefault("provenance", {}), dict):
        raise InputError(f"{path}: provenance: got {config['provenance']!r:.60}, want an object")
    advice = config["provenance"].get("recommended", {})
    kinds: dict[str, Any] = {"steps": int, "guidance": (int, float), "sampler": str}
    if not isinstance(advice, dict) or any(k in advice and not isinstance(advice[k], kinds[k]) for k in kinds):
        raise InputError(f"{path}: provenance: recommended: got {advice!r:.60}, want steps, guidance and sampler")
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, from the index when there is one."""
    index = folder / INDEX
    if not index.exists():
        return [folder / WEIGHTS]
    try:
        names = {Path(name).name for name in read_object(index)["weight_map"].values()}
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not a safetensors index: {error!r}") from error
    return [folder / name for name in sorted(names)]


def checkpoint_hash(folder: Path) -> str:
    """sha256 over the weights and what they mean (config without provenance): what a bundle and a cache refer to."""
    config = read_config(folder)
    digest = hashlib.sha256(json.dumps([config["model"], config["class_names"]], sort_keys=True).encode())
    for file in weight_files(folder):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if not path.is_file():
        raise InputError(f"{path}: missing; the checkpoint is incomplete, copy it again")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: truncated or corrupt ({error}); copy it again") from error


def read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or corrupt ({error}); copy it again") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that `path` is either the old one or the whole new one, whatever happens.

    Several processes may write it at once: the last one's stays.

    Raises:
        UsageError: the disk has no room for it, or refuses it; `path` is as it was.
    """
    temporary = _temporary(path)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(path.parent).free
    kept = f"; the earlier {path.name} is untouched" if path.exists() else ""
    if needed > free:
        raise UsageError(
            f"{path}: needs {format_bytes(needed)}, but its disk has {format_bytes(free)} left{kept}; make room"
        )
    try:
        save_file(dict(tensors), temporary, metadata=metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with half its bytes
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path}: cannot be written ({error}){kept}; make room, or choose another place") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write_file` in UTF-8."""
    write_file(path, text.encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all: under a temporary name, then renamed. Raises `OSError`."""
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Beside `path`, of this writer alone: of two with one name, the first would rename what the second has begun."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


def partial_files(path: Path) -> list[Path]:
    """What processes that were killed while they wrote `path` have left; or are writing now."""
    return list(path.parent.glob(f"{path.name}.*.partial"))
