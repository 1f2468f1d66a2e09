"""The feature network of the literature: Inception-v3 as converted for FID, through torch-fidelity.

Its weights are not shipped: whoever has torch-fidelity's file names it. What real images look like to it takes long to
compute, so that is kept in the user's cache, under a hash of weights, data and choice of images.

Legend: n images; F = 2048 features.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pickle
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray

from kind_edge.errors import InputError, UsageError
from kind_edge.training.data import cache_folder
from kind_edge.training.metrics import (
    Float64s,
    Root,
    frechet_distance_of_roots,
    neighbour_radii_squared,
    precision_recall_with_radii,
    root_of,
)

LAYER = "2048"
FEATURES = 2048
BATCH = 50
CACHE_VERSION = 1
_REASON_CHARACTERS = 200
PUBLISHED = "weights-inception-2015-12-05-6726825d.pth"

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class InceptionFigures:
    """Squared Fréchet distance, precision and recall; the last two None for too few images, the first for one."""

    frechet: float | None
    precision: float | None
    recall: float | None
    weights_sha256: str


@dataclass(frozen=True, eq=False)
class RealFeatures:
    """What real images look like: features [n, F], squared radii [n] of their neighbourhoods, and their Gaussian."""

    features: NDArray[np.float32]
    radii_squared: Float64s
    root: Root


class Inception:
    """Inception-v3 with weights from a file, on the GPU where there is one."""

    def __init__(self, network: torch.nn.Module, weights_sha256: str) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = network.to(self._device)
        self.weights_sha256 = weights_sha256

    @classmethod
    def load(cls, weights: Path) -> Inception:
        """The network with the weights in a file, as torch-fidelity publishes it.

        Raises:
            UsageError: torch-fidelity is not installed.
            InputError: the file is missing, holds anything but tensors, or is for another network.
        """
        make = _network_class()
        wanted = f"want {PUBLISHED} from torch-fidelity's releases, or a file of the same tensors"
        _check_tensors_alone(weights, wanted)
        try:
            network = make("inception", [LAYER], feature_extractor_weights_path=str(weights))
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = textwrap.shorten(str(error), _REASON_CHARACTERS, placeholder=" ...")  # torch names every tensor
            raise InputError(f"{weights}: not the weights of this network ({reason}); {wanted}") from error
        return cls(network, _file_sha256(weights))

    def embed(self, images: NDArray[np.uint8], on_progress: OnProgress | None = None) -> NDArray[np.float32]:
        """Features float32 [n, F] of images uint8 [n, H, W, ch], ch 1 or 3; grey is taken for three equal channels."""
        if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8 or not len(images):
            raise UsageError(f"Inception wants uint8 images [n, H, W, 1 or 3], got {images.dtype} {list(images.shape)}")
        parts = []
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(np.ascontiguousarray(images[start : start + BATCH])).permute(0, 3, 1, 2)
            with torch.inference_mode():
                parts.append(self._network(batch.expand(-1, 3, -1, -1).to(self._device))[0].cpu().numpy())
            if on_progress:
                on_progress(min(start + BATCH, len(images)), len(images))
        return np.concatenate(parts)

    def real_features(
        self, blocks: Callable[[], Iterable[NDArray[np.uint8]]], key: str, neighbours: int
    ) -> RealFeatures:
        """What the real images behind `key` look like, from the cache where it has them.

        `key` names the images: data set and choice. `blocks` gives them a part [m, H, W, ch] at a time, as all would
        not fit into memory. A damaged cache file is computed anew.
        """
        parts = (str(CACHE_VERSION), self.weights_sha256, LAYER, key, str(neighbours))
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
        path = cache_folder().parent / "inception" / f"{name}.safetensors"
        found = _read_cache(path)
        if found is None:
            features = np.concatenate([self.embed(block) for block in blocks()])
            found = RealFeatures(features, neighbour_radii_squared(features, neighbours), root_of(features))
            _write_cache(path, found)
        return found

    def compare(self, images: NDArray[np.uint8], real: RealFeatures, neighbours: int) -> InceptionFigures:
        """Generated images uint8 [n, H, W, ch] against real ones."""
        features = self.embed(images)
        frechet = frechet_distance_of_roots(real.root, root_of(features)) if len(features) > 1 else None
        if len(features) <= neighbours:
            return InceptionFigures(frechet, None, None, self.weights_sha256)
        shares = precision_recall_with_radii(real.features, real.radii_squared, features, neighbours)
        return InceptionFigures(frechet, shares.precision, shares.recall, self.weights_sha256)


def _network_class() -> Any:
    """torch-fidelity's Inception-v3, imported without the package around it.

    The package imports torchvision for its other networks, and PyPI's torchvision does not load beside a CPU build of
    PyTorch. This network needs neither.
    """
    package = importlib.util.find_spec("torch_fidelity")
    if package is None:
        raise UsageError(
            f"--features inception needs torch-fidelity, the extra `inception`: {sys.executable} -m pip install "
            "'kind-edge[inception]', or, beside a CPU build of PyTorch, pip install --no-deps torch-fidelity"
        )
    loaded = "torch_fidelity" in sys.modules
    if not loaded:
        bare = types.ModuleType("torch_fidelity")
        bare.__path__ = list(package.submodule_search_locations or ())
        sys.modules["torch_fidelity"] = bare
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    finally:
        if not loaded:
            del sys.modules["torch_fidelity"]  # whoever asks for the package later gets all of it
    return module.FeatureExtractorInceptionV3


def _check_tensors_alone(path: Path, wanted: str) -> None:
    """Refuse a file that holds more than tensors: torch-fidelity would unpickle it, and run whatever is in it."""
    try:
        tensors: Any = torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; {wanted}") from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: not a PyTorch file of tensors alone ({reason:.120}); {wanted}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f"{path}: holds a {type(tensors).__name__}, not tensors by name; {wanted}")


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_cache(path: Path) -> RealFeatures | None:
    try:
        arrays = safetensors.numpy.load(path.read_bytes())
        features, radii = arrays["features"], arrays["radii_squared"]
        root = Root(arrays["mean"], arrays["root"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        return None
    fitting = features.shape == (len(radii), FEATURES) and root.mean.shape == (FEATURES,) == root.root.shape[:1]
    return RealFeatures(features, radii, root) if fitting else None


def _write_cache(path: Path, real: RealFeatures) -> None:
    """Written aside and renamed. Without a cache folder to write to, the features hold for this process alone."""
    arrays = {
        "features": real.features,
        "radii_squared": real.radii_squared,
        "mean": real.root.mean,
        "root": np.ascontiguousarray(real.root.root),
    }
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(handle, "wb") as file:
            file.write(safetensors.numpy.save(arrays))
        os.replace(temporary, path)
    except OSError:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
