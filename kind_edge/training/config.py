"""What a training run is: a frozen configuration, from a preset's name or a TOML file. Needs no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kind_edge.bounded import read_toml
from kind_edge.errors import InputError, nearest, unknown
from kind_edge.model.provenance import Stated
from kind_edge.model.spec import ModelSpec

DATASETS = ("fashion-mnist", "files")
"""With "files" the images are the user's own: what `--data` names."""

PRECISIONS = ("fp32", "bf16")

_TABLES = {"spec": "model", "stated": "provenance"}
"""Fields that are tables of their own in a file."""
_TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


@dataclass(frozen=True)
class TrainConfig:
    """`images` is how many are seen in all; the learning rate warms up linearly, then falls to zero as a cosine."""

    spec: ModelSpec
    dataset: str = "fashion-mnist"
    images: int = 1_000_000
    batch_size: int = 120
    learning_rate: float = 1.5e-3
    warmup_steps: int = 300
    weight_decay: float = 0.01
    ema_decay: float = 0.9995
    gradient_clip: float = 1.0
    null_share: float = 0.1
    """Share of images trained with every gate closed: the unconditional branch of guidance."""
    seed: int = 0
    precision: str = "fp32"
    """Of the forward and backward pass; weights, averages and optimizer are fp32 always."""
    compile: bool = False
    """Run the blocks through torch.compile."""
    accumulation: int = 1
    """Parts that a process goes through a step's images in, to save memory."""
    nested_share: float = 0.1
    """After `images`, how many more as a share of them, in a second stage that teaches every cut of the learngene."""
    spectral_penalty: float = 0.0
    """Weight of a penalty on weights that differ between neighbours, for models that are to be resized; 0 is none."""
    stated: Stated = field(default_factory=Stated)
    """The table [provenance]: no part of what a run is, so that it may change when one is resumed."""

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise InputError(f"dataset: got {self.dataset!r}, want one of {', '.join(DATASETS)}")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision: got {self.precision!r}, want one of {', '.join(PRECISIONS)}")
        lowest_of = {"images": 1, "batch_size": 1, "accumulation": 1, "warmup_steps": 0, "weight_decay": 0}
        lowest_of["spectral_penalty"] = 0
        for name, lowest in lowest_of.items():
            if not lowest <= getattr(self, name) < math.inf:
                raise InputError(f"{name}: got {getattr(self, name)}, want at least {lowest}")
        for name in ("learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}: got {getattr(self, name)}, want a number above 0")
        for name in ("ema_decay", "null_share"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}: got {getattr(self, name)}, want at least 0 and less than 1")
        self.spec.check_trainable_ranks()
        if not 0 <= self.nested_share <= 1:
            raise InputError(f"nested_share: got {self.nested_share}, want 0 to 1")
        if self.spectral_penalty and (self.spec.matrix_ranks or self.spec.dropped_branches):
            raise InputError("spectral_penalty: blocks of a cut model are no stack of equals; leave it at 0")

    @property
    def steps(self) -> int:
        return max(1, self.images // self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _TABLES}
        if not self.spectral_penalty:  # as in files of before there was any
            del values["spectral_penalty"]
        return {**values, "model": self.spec.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> TrainConfig:
        known = {f.name: f.type for f in dataclasses.fields(cls) if f.name not in _TABLES}
        for key in values:
            if key not in known and key not in _TABLES.values():
                known_keys = [*known, *_TABLES.values()]
                raise InputError(f"{where}: unknown key {key!r}; nearest known: {nearest(key, known_keys)}")
        if not isinstance(values.get("model"), Mapping):
            raise InputError(f"{where}: missing table [model]")
        for key, value in values.items():
            wanted = _TYPES.get(str(known.get(key)), (object,))
            if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
                raise InputError(f"{where}: {key}: got {value!r}, want {known[key]}")
        spec = ModelSpec.from_dict(values["model"], f"{where} [model]")
        stated = Stated.from_dict(values.get("provenance", {}), f"{where} [provenance]")
        try:
            return cls(spec=spec, stated=stated, **{key: value for key, value in values.items() if key in known})
        except InputError as error:
            raise InputError(f"{where}: {error}") from error


_FASHION = ModelSpec(
    image_size=28, channels=1, patch_size=4, width=128, depth=6, heads=4, num_classes=10,
    learngene_rank=48, tailor_rank=8, objective="flow",
)  # fmt: skip
_TRIAL = TrainConfig(_FASHION, images=60_000, nested_share=0.0)
_STUDY = TrainConfig(dataclasses.replace(_FASHION, width=64, depth=4, learngene_rank=24, tailor_rank=4), images=240_000)

PRESETS: dict[str, TrainConfig] = {
    "fashion-mnist": TrainConfig(_FASHION, images=660_000),
    # The ordinary transformer of the same shape after as many images: what the shipped model is compared with.
    "fashion-mnist-dense": TrainConfig(
        dataclasses.replace(_FASHION.dense(), label_embedding=True), images=660_000
    ),
    # Short runs of equal length that settled the choices; see docs/results.md.
    "fashion-mnist-short": _TRIAL,
    "fashion-mnist-short-label": dataclasses.replace(_TRIAL, spec=dataclasses.replace(_FASHION, label_embedding=True)),
    "fashion-mnist-short-epsilon": dataclasses.replace(_TRIAL, spec=dataclasses.replace(_FASHION, objective="epsilon")),
    "fashion-mnist-short-dense": dataclasses.replace(
        _TRIAL, spec=dataclasses.replace(_FASHION.dense(), label_embedding=True)
    ),
    # Small enough to train with several seeds; see docs/claims.md.
    "study": _STUDY,
    "study-label": dataclasses.replace(_STUDY, spec=dataclasses.replace(_STUDY.spec, label_embedding=True)),
    "smoke": TrainConfig(
        dataclasses.replace(_FASHION, width=32, depth=2, heads=2, patch_size=7, learngene_rank=12, tailor_rank=2),
        images=2_400, batch_size=40, warmup_steps=10, ema_decay=0.95,
    ),
}  # fmt: skip


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS, "for images of your own write a configuration and give it with --config")
    return PRESETS[name]


def read_config(path: Path) -> TrainConfig:
    """A TOML file: the fields of `TrainConfig` at the top, those of `ModelSpec` under [model], of `Stated` under
    [provenance]."""
    values = read_toml(path, "the training configuration")
    config = TrainConfig.from_dict(values, str(path))
    if config.spec.distilled:
        raise InputError(f"{path} [model]: step_counts: training makes none; train without, then kind-edge distill")
    if config.spec.nested:
        raise InputError(f"{path} [model]: nested: a training's second stage makes it so; set nested_share instead")
    return config
