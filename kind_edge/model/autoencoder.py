"""An autoencoder of diffusers in a local folder: what lies between pixels and the latents that a network works on.

Symbols: B images, ch x h x w latents in the network's scale, C x H x W pixels, f pixels per latent along a side.
"""

from __future__ import annotations

import functools
import hashlib
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kind_edge.bounded import read_object
from kind_edge.errors import InputError, UsageError
from kind_edge.model.spec import ModelSpec
from kind_edge.model.tiles import Tiles, in_tiles, tiles_of

KINDS = ("AutoencoderKL", "AutoencoderTiny")
SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Keys of its configuration that say how an encoder's latents become the network's."""

_REASON_CHARACTERS = 300


@dataclass(frozen=True, eq=False)
class Autoencoder:
    """One that fits a model's latents; `config` is diffusers' own. The weights are read when they are asked for."""

    folder: Path
    kind: str
    sha256: str
    config: Mapping[str, Any]
    side: int
    pixels_per_latent: int

    @property
    def image_channels(self) -> int:
        return int(self.config["out_channels"])

    @functools.cached_property
    def decoder(self) -> LatentDecoder:
        """In float32; `InputError` if the weights do not load."""
        return LatentDecoder(load_autoencoder(self.folder)).eval().requires_grad_(False)

    def empty_decoder(self) -> LatentDecoder:
        """The same without values, on the meta device: for what can be counted from shapes."""
        return LatentDecoder(_empty(self.kind, self.config)).to("meta").eval().requires_grad_(False)

    def tiles(self, count: int) -> Tiles:
        return tiles_of(self.side, count, self.pixels_per_latent)

    def decode(self, latents: Tensor, tiles: int = 1) -> Tensor:
        """Latents [B, ch, h, w] to images [B, C, H, W] in [0, 1], one image and one tile at a time."""
        with torch.no_grad():
            return torch.cat([decode_tiled(self.decoder, latent[None], self.tiles(tiles)) for latent in latents])


class LatentDecoder(nn.Module):
    """latent [B, ch, h, w] in the network's scale -> image [B, C, H, W] in [0, 1]; scale and shift are inside."""

    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        config = autoencoder.config
        factor, (mean, std) = config.get("scaling_factor") or 1.0, latent_statistics(config)
        self.decoder, self.post_quant_conv = autoencoder.decoder, getattr(autoencoder, "post_quant_conv", None)
        self.register_buffer("scale", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1) / factor)
        self.register_buffer("shift", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, latent: Tensor) -> Tensor:
        z = latent * self.scale + self.shift  # [B, ch, h, w], as the encoder makes them
        if self.post_quant_conv is not None:
            z = self.post_quant_conv(z)
        return (self.decoder(z) * 0.5 + 0.5).clamp(0, 1)  # [B, C, H, W]


def open_autoencoder(folder: Path, spec: ModelSpec, provenance: Mapping[str, Any]) -> Autoencoder:
    """Check from its configuration alone that it turns the latents of this model into pictures.

    Another autoencoder than the one that made the latents may be given, a small `AutoencoderTiny` for example; one of
    the same kind must have the same scale.

    Raises:
        InputError: the folder holds no autoencoder.
        UsageError: the model works on pixels, or on other latents.
    """
    if spec.pixels_per_latent == 1:
        raise UsageError(f"--autoencoder {folder}: the model works on pixels, which need no decoder; leave it out")
    files = autoencoder_files(folder)
    config = _read_config(folder)
    kind = str(config["_class_name"])
    try:
        empty = _empty(kind, config)
        with torch.no_grad():
            latent = torch.zeros(1, spec.channels, spec.image_size, spec.image_size, device="meta")
            wanted = int(empty.config.latent_channels)
            shape = LatentDecoder(empty).to("meta").eval()(latent).shape[1:] if wanted == spec.channels else None
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        reason = textwrap.shorten(str(error), _REASON_CHARACTERS, placeholder=" ...")
        raise InputError(f"--autoencoder {folder}: config.json makes no {kind} ({reason}); copy it again") from error
    if shape is None:
        raise UsageError(
            f"--autoencoder {folder}: takes latents of {wanted} channels, the model makes {spec.channels}; take the "
            "autoencoder that it was trained with"
        )
    side = spec.image_size * spec.pixels_per_latent
    if tuple(shape[1:]) != (side, side) or shape[0] not in (1, 3):
        raise UsageError(
            f"--autoencoder {folder}: makes {' x '.join(map(str, shape))} of the model's {spec.image_size} x "
            f"{spec.image_size} latents, want 1 or 3 channels of {side} x {side} pixels ({spec.pixels_per_latent} per "
            "latent); take the autoencoder that it was trained with"
        )
    _check_scale(folder, kind, empty.config, provenance)
    facts = {**empty.config}
    return Autoencoder(folder, kind, _identity(files), facts, spec.image_size, spec.pixels_per_latent)


def _check_scale(folder: Path, kind: str, config: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """The latents that a model was trained on have a scale; that of the same kind of autoencoder must be the same."""
    known = provenance.get("data", {}).get("autoencoder", {})
    given = scaling_facts(config)
    if known.get("kind") != kind:
        return
    for name in SCALING:
        if known.get(name) != given.get(name):
            raise UsageError(
                f"--autoencoder {folder}: its {name} is {given.get(name)}, the model was trained on latents with "
                f"{known.get(name)}; take the autoencoder that it was trained with"
            )


def autoencoder_files(folder: Path) -> list[tuple[str, Path]]:
    """Config and weights of an autoencoder; `InputError` if the folder holds none of a kind that is known."""
    kind = _read_config(folder).get("_class_name")
    if kind not in KINDS:
        raise InputError(f"--autoencoder {folder}: config.json describes {kind!r}, want {' or '.join(KINDS)}")
    weights = sorted(folder.glob("*.safetensors*"))
    if not weights:
        raise InputError(
            f"--autoencoder {folder}: has no *.safetensors; save it anew with save_pretrained (pickles are not read)"
        )
    return [(path.name, path) for path in (folder / "config.json", *weights)]


def load_autoencoder(folder: Path) -> Any:
    """diffusers' module in float32, for evaluation; `InputError` if its weights do not load."""
    import diffusers

    kind = _read_config(folder)["_class_name"]
    try:
        model = getattr(diffusers, kind).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = textwrap.shorten(str(error), _REASON_CHARACTERS, placeholder=" ...")  # every tensor can be named in it
        raise InputError(f"--autoencoder {folder}: {kind} does not load ({reason}); copy it again") from error
    return model.eval().requires_grad_(False)


def scaling_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration says how latents are scaled."""
    return {name: config[name] for name in SCALING if config.get(name) is not None}


def latent_statistics(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of an encoder's latents, of each channel or of all: what comes off before scaling."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return [float(config.get("shift_factor") or 0.0)], [1.0]
    return list(mean), list(std)


def scaling(config: Mapping[str, Any], device: torch.device) -> Callable[[Tensor], Tensor]:
    """From an encoder's latents to the network's scale, as diffusers' pipelines do it."""
    factor = config.get("scaling_factor") or 1.0
    means, stds = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in latent_statistics(config))
    return lambda latents: (latents - means) * factor / stds


def decode_tiled(decode: Callable[[Tensor], Tensor], latent: Tensor, tiles: Tiles) -> Tensor:
    """Latents [B, ch, h, w] to images [B, C, H, W], tile by tile; what an exported decoder with these tiles does."""
    if tiles.count == 1:
        return decode(latent)
    return torch.from_numpy(in_tiles(lambda piece: decode(torch.from_numpy(piece)).numpy(), latent.numpy(), tiles))


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return read_object(folder / "config.json")
    except InputError as error:
        raise InputError(
            f"--autoencoder {folder}: no autoencoder of diffusers ({error}); want a folder with config.json and "
            f"safetensors weights of {' or '.join(KINDS)}, often the sub-folder vae of a pipeline"
        ) from error


def _empty(kind: str, config: Mapping[str, Any]) -> Any:
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(dict(config))


def _identity(files: list[tuple[str, Path]]) -> str:
    """One sha256 over names, sizes and contents, as a training run keeps it in its checkpoint's provenance."""
    digest = hashlib.sha256()
    for name, path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\0{path.stat().st_size}\0{content}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
