"""From what the user names to what a run learns from and what it never sees. All checks come before any long work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kind_edge.errors import InputError, UsageError, unknown
from kind_edge.model.autoencoder import autoencoder_files
from kind_edge.model.cache import cache_base
from kind_edge.model.spec import ModelSpec
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import (
    CLASS_NAMES,
    FILE_NAMES,
    IMAGE_SIDE,
    DataSplit,
    TrainingData,
    fashion_mnist_split,
    load_fashion_mnist,
)
from kind_edge.training.hashes import hash_of_files, remembered_hashes
from kind_edge.training.latents import Encoder, open_encoder
from kind_edge.training.mapping import ClassMap, choose_classes, read_class_map
from kind_edge.training.prepare import CHUNK, SCHEMA_VERSION, Prepared, Report, Work, describe, failures_file, prepare
from kind_edge.training.sources import WANTED, Source, open_source
from kind_edge.units import format_count

HELDOUT_PER_CLASS = 50
HELDOUT_SHARE = 0.1
USUAL_SPREAD = (0.5, 2.0)
"""Of latents in the network's scale: noise of 1 hides smaller ones, and does not cover larger ones."""
FEWEST_PER_CLASS = 2
"""With one image a tailor could only learn it by heart, and nothing could ever be held out."""


def open_data(
    config: TrainConfig,
    path: Path | None,
    *,
    only: Sequence[str] | None = None,
    class_map: Path | None = None,
    autoencoder: Path | None = None,
    device: torch.device,
    report: Report = lambda _: None,
    cache: Path | None = None,
) -> DataSplit:
    """The data of a run, prepared in `cache` (default: the user's) unless it lies there already.

    `only`: these classes in this order, all others are left out (default: all as they are).

    Raises:
        UsageError: the choices contradict each other or the model.
        InputError: something cannot be read, or is not what it should be.
    """
    if config.dataset == "fashion-mnist":
        if class_map is not None or autoencoder is not None:
            raise UsageError('--class-map and --autoencoder are for own images: dataset = "files" in a --config')
        return _open_fashion_mnist(config.spec, path, only)
    if path is None:
        raise UsageError(f'dataset = "files" needs --data: {WANTED}')
    _check_model(config.spec, autoencoder)
    weights = autoencoder_files(autoencoder) if autoencoder is not None else []
    wanted = read_class_map(class_map) if class_map is not None else None
    source = open_source(path)
    classes = choose_classes(wanted, source.class_names, source.where)
    if only is not None:
        classes = {name: classes[name] for name in _known(only, list(classes))}
    items, labels = _chosen(source, classes)
    amount = f"{format_count(len(items), 'image')} of {format_count(len(classes), 'class')}"
    report(f"data: {source.kind} {source.where}, {amount}")
    for note in source.notes:
        report(f"data: {note}")
    _check_classes(source, classes, labels, config.spec)
    base = cache if cache is not None else cache_base()
    with remembered_hashes(base) as sha256_of:
        encoder = open_encoder(autoencoder, config.spec, device) if autoencoder is not None else None
        report("checksums of the data (each file is read once; later runs remember)")
        recipe = {
            "schema_version": SCHEMA_VERSION,
            "source": [source.kind, hash_of_files(source.files(items), sha256_of)],
            "classes": [[name, list(members)] for name, members in classes.items()],
            "pixels": _pixels(config.spec, encoder),
            "autoencoder": hash_of_files(weights, sha256_of) if weights else None,
        }
        work = _work(source, items, labels, config.spec, encoder, recipe)
        prepared = prepare(work, base / "prepared", sha256_of, report)
    _report_prepared(prepared, work, report)
    _check_counts(_labels_of_different(prepared), list(classes), source.where, "different images")
    return _split(prepared, work, tuple(classes), _facts(source, prepared, encoder, recipe), report)


def dataset_at(path: Path) -> str:
    """Which of DATASETS lies there: "files" unless it is a folder with the idx files of Fashion-MNIST."""
    return "fashion-mnist" if any((path / name).is_file() for name in FILE_NAMES) else "files"


def _open_fashion_mnist(spec: ModelSpec, path: Path | None, only: Sequence[str] | None) -> DataSplit:
    names = CLASS_NAMES if only is None else _known(only, CLASS_NAMES)
    wanted = {"num_classes": len(names), "image_size": IMAGE_SIDE, "channels": 1, "pixels_per_latent": 1}
    for name, value in wanted.items():
        if getattr(spec, name) != value:
            raise UsageError(f"the model has {name} {getattr(spec, name)}, Fashion-MNIST has {value}")
    try:
        dataset = load_fashion_mnist(path)
    except InputError as error:
        if path is None or dataset_at(path) == "fashion-mnist":
            raise
        raise InputError(
            f"{path} has none of Fashion-MNIST's files, which this configuration is for; images of your own want "
            'one with dataset = "files", given with --config: docs/data.md begins with such a file'
        ) from error
    split = fashion_mnist_split(dataset, HELDOUT_PER_CLASS)
    return split if only is None else split.of_classes(names)


def _known(wanted: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    """`wanted`, each of which must be a class of the data."""
    for name in wanted:
        if name not in names:
            raise unknown("class of the data", name, names)
    return wanted


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_model(spec: ModelSpec, autoencoder: Path | None) -> None:
    if spec.pixels_per_latent > 1 and autoencoder is None:
        raise UsageError(
            f"the model works on latents (pixels_per_latent {spec.pixels_per_latent}); give the autoencoder that makes "
            "them: --autoencoder DIR"
        )
    if spec.pixels_per_latent == 1 and autoencoder is not None:
        raise UsageError("--autoencoder: the model works on pixels; leave it out, or set pixels_per_latent = 8")
    if autoencoder is None and spec.channels not in (1, 3):
        raise UsageError(f"the model has {spec.channels} channels; pixels have 1 (grey) or 3 (red, green, blue)")


def _check_classes(source: Source, classes: ClassMap, labels: NDArray[np.int64], spec: ModelSpec) -> None:
    if len(classes) != spec.num_classes:
        raise UsageError(
            f"{source.where} has {format_count(len(classes), 'class')} ({_some(list(classes))}), the model has "
            f"num_classes {spec.num_classes}; set num_classes = {len(classes)}, or choose classes with --class-map"
        )
    _check_counts(labels, list(classes), source.where)


def _labels_of_different(prepared: Prepared) -> NDArray[np.int64]:
    """Of every class's images without copies of one another: five copies of one image show as little as one does."""
    pairs = set(zip(prepared.labels.tolist(), prepared.digests.tolist(), strict=True))
    return np.array([label for label, _ in pairs], dtype=np.int64)


def _check_counts(labels: NDArray[np.int64], names: Sequence[str], where: str, what: str = "images") -> None:
    counts = np.bincount(labels, minlength=len(names))
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    few = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if 0 < count < FEWEST_PER_CLASS]
    for fault, those in (("no image of", empty), (f"fewer than {FEWEST_PER_CLASS} {what} of", few)):
        if those:
            raise InputError(f"{where}: {fault} {_some(those)}; add images, or leave the class out with --class-map")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


# --- preparing --------------------------------------------------------------------------------------------------------


def _chosen(source: Source, classes: ClassMap) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The items of the wanted classes, in the source's order, and their labels in the model."""
    new_label = np.full(len(source.class_names), -1)
    position = {name: index for index, name in enumerate(source.class_names)}
    for label, members in enumerate(classes.values()):
        new_label[[position[member] for member in members]] = label
    labels = new_label[source.labels]
    items = np.flatnonzero(labels >= 0)
    return items, labels[items]


def _pixels(spec: ModelSpec, encoder: Encoder | None) -> list[int]:
    """Channels and side of what is decoded."""
    return [spec.channels, spec.image_size] if encoder is None else [encoder.channels, encoder.size]


def _work(
    source: Source,
    items: NDArray[np.int64],
    labels: NDArray[np.int64],
    spec: ModelSpec,
    encoder: Encoder | None,
    recipe: Mapping[str, Any],
) -> Work:
    channels, size = _pixels(spec, encoder)
    return Work(
        key=hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest(),
        labels=labels,
        name=lambda number: source.name(int(items[number])),
        read=lambda number: source.read(int(items[number])),
        size=size,
        channels=channels,
        shape=(spec.channels, spec.image_size, spec.image_size),
        encode=encoder.encode if encoder is not None else None,
        broken=source.broken,
    )


def _report_prepared(prepared: Prepared, work: Work, report: Report) -> None:
    if work.encode is not None:
        spread = float(np.concatenate([shard[:CHUNK] for shard in prepared.shards]).astype(np.float32).std())
        low, high = USUAL_SPREAD
        if low <= spread <= high:
            report(f"latents have a standard deviation of {spread:.2f}; the objective wants about 1")
        else:
            report(
                f"warning: latents have a standard deviation of {spread:.2g}, the objective wants about 1: images will "
                "be poor; set scaling_factor in the autoencoder's config.json (multiply it by "
                f"{1 / max(spread, 1e-6):.3g})"
            )
    if prepared.enlarged:
        report(
            f"{prepared.enlarged} of {len(prepared.labels)} images are smaller than {work.size} x {work.size} pixels "
            "and were enlarged"
        )
    if prepared.failures:
        total = len(work.labels) + len(work.broken)
        share = len(prepared.failures) / total
        report(
            f"{len(prepared.failures)} of {total} images ({share:.1%}) could not be read and are left out: "
            f"{describe(prepared.failures)}; the list: {failures_file(prepared.folder)}"
        )


def _facts(source: Source, prepared: Prepared, encoder: Encoder | None, recipe: Mapping[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "kind": source.kind,
        "images": len(prepared.labels),
        "unreadable": len(prepared.failures),
        "enlarged": prepared.enlarged,
        **({"licence": source.licence} if source.licence else {}),
    }
    merged = {name: members for name, members in recipe["classes"] if members != [name]}
    if merged:
        facts["merged_classes"] = merged
    if encoder is not None:
        facts["autoencoder"] = {"kind": encoder.kind, "sha256": recipe["autoencoder"], **encoder.scaling}
    return facts


# --- what is held out -------------------------------------------------------------------------------------------------


def _split(
    prepared: Prepared, work: Work, names: tuple[str, ...], facts: Mapping[str, Any], report: Report
) -> DataSplit:
    training, heldout = hold_out(prepared.labels, prepared.digests)
    copies = len(prepared.labels) - len(training) - len(heldout)
    copied = f"; copies of these, left out of training: {copies}" if copies else ""
    report(f"training on {format_count(len(training), 'image')}, {len(heldout)} held out{copied}")
    bare = [name for label, name in enumerate(names) if not (prepared.labels[heldout] == label).any()]
    if bare:
        report(f"none held out of {_some(bare)}: fewer than {round(1 / HELDOUT_SHARE)} different images")

    def part(rows: NDArray[np.int64]) -> TrainingData:
        labels = torch.from_numpy(prepared.labels[rows])
        return TrainingData(labels, names, work.shape, work.key, prepared.shards, torch.from_numpy(rows))

    return DataSplit(part(training), part(heldout), {**facts, "heldout": len(heldout)})


def hold_out(labels: NDArray[np.int64], digests: NDArray[np.str_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and rows to hold out: of every class up to 50 images, at most a tenth.

    The images with the lowest digests are held out, so more images change little of the choice. Copies of a held-out
    image, in whichever class, are in neither part.
    """
    held: list[int] = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        different, first = np.unique(digests[rows], return_index=True)  # sorted by digest
        count = min(HELDOUT_PER_CLASS, int(len(different) * HELDOUT_SHARE))
        held += rows[first[:count]].tolist()
    heldout = np.array(held, dtype=np.int64)
    training = np.flatnonzero(~np.isin(digests, digests[heldout]))
    return training, heldout
