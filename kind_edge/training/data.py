"""What training sees, item by item, whatever it came from; and Fashion-MNIST, checked byte for byte.

Fashion-MNIST's four idx files come from `--data DIR`, else from the user's cache, else from Debian's package
`dataset-fashion-mnist`. Checksums are of the *decompressed* contents: distributions recompress the same data with other
gzip settings.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kind_edge.errors import InputError
from kind_edge.model.cache import cache_base

CLASS_NAMES: tuple[str, ...] = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
"""The ten classes in label order."""

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SIDE = 28
_IDX_UBYTE = 0x08  # idx type code of unsigned bytes: the third byte of the magic number

HOW_TO_GET = (
    "run scripts/fetch-fashion-mnist, or give a folder with these files as --data DIR "
    "(on Debian: apt install dataset-fashion-mnist)"
)


class _IdxFile(NamedTuple):
    name: str
    shape: tuple[int, ...]
    sha256: str  # of the decompressed file, header included


_FILES: tuple[_IdxFile, ...] = (
    _IdxFile(
        "train-images-idx3-ubyte.gz",
        (60_000, IMAGE_SIDE, IMAGE_SIDE),
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    _IdxFile(
        "train-labels-idx1-ubyte.gz",
        (60_000,),
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    _IdxFile(
        "t10k-images-idx3-ubyte.gz",
        (10_000, IMAGE_SIDE, IMAGE_SIDE),
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    _IdxFile(
        "t10k-labels-idx1-ubyte.gz",
        (10_000,),
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)

FILE_NAMES: tuple[str, ...] = tuple(file.name for file in _FILES)
DATA_SHA256: str = hashlib.sha256("".join(file.sha256 for file in _FILES).encode()).hexdigest()
"""One hash for the whole data set: sha256 over the four files' hexadecimal checksums in the order of FILE_NAMES."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """Items by index, in any order: the same index is the same item in every run and on every machine.

    `shards` hold the items end to end, [m, ch, H, W] each: uint8 pixels, or float16 latents in the network's own scale.
    `rows` says where in them each of the n items lies; the shards may hold more, for instance what is held out.
    """

    labels: Tensor
    """int64 [n], positions in `class_names`."""
    class_names: tuple[str, ...]
    shape: tuple[int, int, int]
    """(ch, H, W) of one item."""
    sha256: str
    """Of everything that determines the items."""
    shards: tuple[npt.NDArray[Any], ...]
    rows: Tensor
    """int64 [n]."""

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(len(shard) for shard in self.shards)])

    def stored(self, indices: Tensor) -> Tensor:
        """The items as they are kept: uint8 or float16 [b, ch, H, W] for int64 [b]."""
        rows = self.rows[indices].numpy()
        out = np.empty((len(rows), *self.shape), dtype=self.shards[0].dtype)
        holders = np.searchsorted(self._starts, rows, side="right") - 1
        for holder in np.unique(holders):
            mine = holders == holder
            out[mine] = self.shards[holder][rows[mine] - self._starts[holder]]
        return torch.from_numpy(out)

    def batch(self, indices: Tensor) -> Tensor:
        """The items as the network takes them: float32 [b, ch, H, W] for int64 [b]; pixels in [-1, 1]."""
        stored = self.stored(indices)
        return stored.float().div_(127.5).sub_(1) if stored.dtype == torch.uint8 else stored.float()

    def of_classes(self, names: Sequence[str]) -> TrainingData:
        """Only the items of these classes, which are numbered anew in this order."""
        new_label = torch.full((len(self.class_names),), -1)
        new_label[[self.class_names.index(name) for name in names]] = torch.arange(len(names))
        labels = new_label[self.labels]
        kept = labels >= 0
        return dataclasses.replace(self, labels=labels[kept], class_names=tuple(names), rows=self.rows[kept])


@dataclass(frozen=True, eq=False)
class DataSplit:
    """What a run learns from, what it never sees, and what its checkpoint says of both."""

    training: TrainingData
    heldout: TrainingData
    facts: Mapping[str, Any] = field(default_factory=dict)

    def of_classes(self, names: Sequence[str]) -> DataSplit:
        return DataSplit(self.training.of_classes(names), self.heldout.of_classes(names), self.facts)


@dataclass(frozen=True, eq=False)
class FashionMNIST:
    """The data set in memory (about 56 MB)."""

    train_images: npt.NDArray[np.uint8]  # [60000, 28, 28], 0 is background
    train_labels: npt.NDArray[np.int64]  # [60000], 0..9 in the order of CLASS_NAMES
    test_images: npt.NDArray[np.uint8]  # [10000, 28, 28]
    test_labels: npt.NDArray[np.int64]  # [10000]
    data_sha256: str


def cache_folder() -> Path:
    """Where `scripts/fetch-fashion-mnist` puts the files: fashion-mnist in the user's cache."""
    return cache_base() / "fashion-mnist"


def find_fashion_mnist(root: Path | None = None) -> Path:
    """The folder that holds all four files: `root` alone if given, else the user's cache or Debian's package.

    Raises:
        InputError: no such folder; says which files are missing where, and how to get them.
    """
    candidates = [Path(root)] if root is not None else [cache_folder(), DEBIAN_FOLDER]
    reports = []
    for folder in candidates:
        missing = [name for name in FILE_NAMES if not (folder / name).is_file()]
        if not missing:
            return folder
        reports.append(f"{folder} lacks {', '.join(missing) if len(missing) < len(FILE_NAMES) else 'all four files'}")
    raise InputError(f"Fashion-MNIST not found: {'; '.join(reports)}; wanted {', '.join(FILE_NAMES)}; {HOW_TO_GET}")


def load_fashion_mnist(root: Path | None = None) -> FashionMNIST:
    """Read and check the four files of `find_fashion_mnist(root)`; about half a second.

    Raises:
        InputError: a file is missing, is not gzip, or its contents are not the published ones.
    """
    folder = find_fashion_mnist(root)
    train_images, train_labels, test_images, test_labels = (_read_idx(folder / file.name, file) for file in _FILES)
    return FashionMNIST(
        train_images=train_images,
        train_labels=train_labels.astype(np.int64),
        test_images=test_images,
        test_labels=test_labels.astype(np.int64),
        data_sha256=DATA_SHA256,
    )


def fashion_mnist_split(dataset: FashionMNIST, heldout_per_class: int) -> DataSplit:
    """All training images, and the first test images of every class."""
    chosen = [np.flatnonzero(dataset.test_labels == c)[:heldout_per_class] for c in range(len(CLASS_NAMES))]
    rows = np.concatenate(chosen)
    return DataSplit(
        _as_data(dataset.train_images, dataset.train_labels, dataset.data_sha256),
        _as_data(dataset.test_images[rows], dataset.test_labels[rows], dataset.data_sha256),
        {"kind": "Fashion-MNIST"},
    )


def _as_data(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], sha256: str) -> TrainingData:
    return in_memory(images[:, None], torch.from_numpy(labels), CLASS_NAMES, sha256)


def in_memory(images: npt.NDArray[np.uint8], labels: Tensor, class_names: tuple[str, ...], sha256: str) -> TrainingData:
    """Images [n, ch, H, W] that are in memory already."""
    channels, height, width = images.shape[1:]
    rows = torch.arange(len(labels))
    return TrainingData(labels, class_names, (channels, height, width), sha256, (images,), rows)


def _read_idx(path: Path, expected: _IdxFile) -> npt.NDArray[np.uint8]:
    """The array in one gzipped idx file: 0, 0, type, number of axes; each axis as big-endian uint32; the values."""
    most_bytes = math.prod(expected.shape) + 64  # with the header; no more is unpacked, whatever the file claims
    try:
        with gzip.open(path) as file:
            content = file.read(most_bytes)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read as gzip ({error}); wanted a gzipped idx file; {HOW_TO_GET}") from error
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != expected.sha256:
        raise InputError(
            f"{path} is corrupt: its decompressed contents have sha256 {sha256}, wanted {expected.sha256}; {HOW_TO_GET}"
        )
    axes = b"".join(axis.to_bytes(4, "big") for axis in expected.shape)
    header = bytes((0, 0, _IDX_UBYTE, len(expected.shape))) + axes
    assert content.startswith(header), "the pinned checksum vouches for the header"
    # A copy, because torch.from_numpy warns about arrays that it may not write to.
    return np.frombuffer(content, dtype=np.uint8, offset=len(header)).reshape(expected.shape).copy()
