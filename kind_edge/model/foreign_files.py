"""Reading DiTs that others saved: a `.pt` file of facebookresearch/DiT, or a folder of diffusers. No code is ever run.

Whatever is missing, damaged or of another kind is an `InputError` that says where.
"""

from __future__ import annotations

import argparse
import dataclasses
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kind_edge.bounded import read_object
from kind_edge.errors import InputError
from kind_edge.model.checkpoint import read_tensors
from kind_edge.model.diffusion import BETA_END, BETA_START, TRAIN_STEPS
from kind_edge.model.dit_layouts import DIFFUSERS_CLASSES, DenseDiT, from_diffusers, from_facebook

FACEBOOK, DIFFUSERS = "facebookresearch DiT", "diffusers DiT"
_WEIGHTS = "diffusion_pytorch_model"
_NOT_LOADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError,
    OSError, AssertionError, ImportError, OverflowError, MemoryError, struct.error,
)  # fmt: skip
"""What torch.load answers a file that was cut, changed, or never was its own."""

_SCHEDULE = {
    "prediction_type": "epsilon",
    "num_train_timesteps": TRAIN_STEPS,
    "beta_schedule": "linear",
    "beta_start": BETA_START,
    "beta_end": BETA_END,
}
"""The noise that our epsilon objective means; a pipeline trained with another one would be sampled wrongly."""


class ForeignModel(NamedTuple):
    """A DiT as it was found; `class_names` None where the source has none."""

    layout: str
    dense: DenseDiT
    class_names: tuple[str, ...] | None


def read_foreign(path: Path, heads: int | None = None) -> ForeignModel:
    """Read a `.pt` file, a `DiTTransformer2DModel` folder or a `DiTPipeline` folder."""
    if path.is_dir():
        return _read_pipeline(path) if (path / "model_index.json").exists() else _read_transformer(path)
    if path.is_file():
        return _read_facebook(path, heads)
    raise InputError(f"{path}: no such file or folder; want a DiT's .pt file, or a folder of diffusers")


def _read_facebook(path: Path, heads: int | None) -> ForeignModel:
    content = load_pickled_tensors(path)
    for key in ("ema", "model"):  # what DiT's own training saves; the average is what its authors sample from
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    odd = next((name for name, value in content.items() if not isinstance(value, Tensor)), None)
    if odd is not None or not content or not all(isinstance(name, str) for name in content):
        raise InputError(f"{path}: {odd!r} is no tensor; want a DiT's state dict, by itself or under 'ema' or 'model'")
    return ForeignModel(FACEBOOK, from_facebook(content, str(path), heads), None)


def load_pickled_tensors(path: Path) -> Mapping[str, Any]:
    """A `torch.save` file of tensors. Anything else that it holds is refused, not loaded."""
    try:
        # The arguments of DiT's training script lie beside its weights: plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_LOADABLE as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise InputError(
            f"{path}: truncated, corrupt, or more than tensors, so it was not loaded ({reason:.120})"
        ) from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds {type(content).__name__}, want a DiT's state dict")
    return content


def _read_pipeline(folder: Path) -> ForeignModel:
    """The transformer of a `DiTPipeline`, with its class names."""
    index = _read_json(folder / "model_index.json")
    if index.get("_class_name") != "DiTPipeline":
        raise InputError(f"{folder}: a {index.get('_class_name')}, want a DiTPipeline")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        config = _read_json(scheduler)
        for key, wanted in _SCHEDULE.items():
            if config.get(key, wanted) != wanted:
                raise InputError(f"{scheduler}: {key} is {config[key]!r}: not supported, want {wanted!r}")
    found = _read_transformer(folder / "transformer")
    spec, names = found.dense.spec, _class_names(index.get("id2label"), found.dense.spec.num_classes)
    autoencoder = folder / "vae" / "config.json"
    if autoencoder.exists():  # every level but the last halves the image
        levels = _read_json(autoencoder).get("block_out_channels")
        if not isinstance(levels, list) or len(levels) not in (1, 4):
            raise InputError(f"{autoencoder}: block_out_channels is {levels!r}: want 4 levels (8 x), or 1 (pixels)")
        spec = dataclasses.replace(spec, pixels_per_latent=2 ** (len(levels) - 1))
    return ForeignModel(found.layout, found.dense._replace(spec=spec), names)


def _class_names(labels: Any, count: int) -> tuple[str, ...] | None:
    """The first of every class's names, with its index where two classes share one; None if not all have one."""
    if not isinstance(labels, Mapping) or not {str(index) for index in range(count)} <= set(labels):
        return None
    names = [str(labels[str(index)]).split(",")[0].strip() for index in range(count)]
    return tuple(f"{name} {index}" if names.count(name) > 1 else name for index, name in enumerate(names))


def _read_transformer(folder: Path) -> ForeignModel:
    config = _read_json(folder / "config.json")
    if "_class_name" not in config and {"schema_version", "model", "class_names"} <= config.keys():
        raise InputError(
            f"{folder}: is a checkpoint of kind-edge already; give it to plan, export or adapt as it is, without import"
        )
    if config.get("_class_name") not in DIFFUSERS_CLASSES:
        raise InputError(f"{folder}: a {config.get('_class_name')}, want a {DIFFUSERS_CLASSES[0]}")
    return ForeignModel(DIFFUSERS, from_diffusers(config, _diffusers_tensors(folder), str(folder)), None)


def _diffusers_tensors(folder: Path) -> Mapping[str, Any]:
    whole, old = folder / f"{_WEIGHTS}.safetensors", folder / f"{_WEIGHTS}.bin"
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    if index.exists():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, Mapping):
            raise InputError(f"{index}: not a safetensors index: it has no weight_map")
        tensors: dict[str, Tensor] = {}
        for name in sorted({Path(str(file)).name for file in shards.values()}):
            tensors |= read_tensors(folder / name)
        return tensors
    if old.exists() and not whole.exists():
        return load_pickled_tensors(old)
    return read_tensors(whole)


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: missing; want a folder that diffusers saved, or a .pt file")
    return read_object(path)
