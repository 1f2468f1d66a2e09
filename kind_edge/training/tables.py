"""Hugging Face data sets on disk as a source: folders saved by `save_to_disk`, and .arrow and .parquet files.

Nothing is copied and nothing is downloaded: Arrow files are memory-mapped, Parquet files are read by row group.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kind_edge.errors import InputError
from kind_edge.training.sources import Source, needed

_SPLIT = re.compile(r"(?:^|[-_])(train|test|validation|valid|val|dev|eval)(?=[-_.])")


def open_saved(path: Path) -> Source:
    """A folder saved by `Dataset.save_to_disk`, or the training part of one by `DatasetDict.save_to_disk`."""
    datasets = needed("datasets", "reading a saved Hugging Face data set")
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's errors are ValueErrors and OSErrors
        raise InputError(f"--data {path}: datasets cannot load it ({error}); save it anew") from error
    parts = ""
    if isinstance(loaded, datasets.DatasetDict):
        part = _training_part(list(loaded), str(path))
        loaded, parts = loaded[part], f", part {part}"
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("cache-"))
    source = _of_dataset(datasets, loaded, f"Hugging Face data set{parts}", str(path), files)
    return dataclasses.replace(source, licence=str(loaded.info.license or ""))


def open_tables(files: Sequence[Path], where: str) -> Source:
    """Files of one data set; where their names tell parts of it apart, those for training."""
    datasets = needed("datasets", "reading a Hugging Face data set")
    parts: dict[str, list[Path]] = {}
    for file in files:
        match = _SPLIT.search(file.name.lower())
        parts.setdefault(match[1] if match else "", []).append(file)
    chosen = parts[_training_part(list(parts), where)]
    kinds = {file.suffix.lower() for file in chosen}
    if len(kinds) > 1:
        raise InputError(f"--data {where}: holds .arrow and .parquet files; name the ones that are meant")
    kind = f"Hugging Face data set of {len(chosen)} {kinds.pop()} file{'s' if len(chosen) > 1 else ''}"
    try:
        if chosen[0].suffix.lower() == ".parquet":
            return _of_parquet(datasets, chosen, kind, where)
        joined = datasets.concatenate_datasets([datasets.Dataset.from_file(str(file)) for file in chosen])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--data {where}: cannot be read as tables ({error}); make them anew") from error
    return _of_dataset(datasets, joined, kind, where, chosen)


def _training_part(parts: list[str], where: str) -> str:
    if len(parts) == 1:
        return parts[0]
    if "train" in parts:
        return "train"
    raise InputError(f"--data {where}: has the parts {', '.join(parts)} and none called train; name one of them alone")


def _of_dataset(datasets: Any, dataset: Any, kind: str, where: str, files: Sequence[Path]) -> Source:
    image, label = _columns(datasets, dataset.features, where)
    labels = dataset.select_columns([label]).with_format("arrow")[:].column(label).fill_null(-1).to_numpy()
    encoded = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    names = dataset.features[label].names
    return _source(kind, where, names, labels, lambda row: encoded[row][image], files)


def _of_parquet(datasets: Any, files: Sequence[Path], kind: str, where: str) -> Source:
    parquet = needed("pyarrow.parquet", "reading .parquet files")
    opened = [parquet.ParquetFile(file, memory_map=True) for file in files]
    features = datasets.Features.from_arrow_schema(opened[0].schema_arrow)
    image, label = _columns(datasets, features, where)
    groups = [(file, group) for file in opened for group in range(file.num_row_groups)]
    starts = np.cumsum([0, *(file.metadata.row_group(group).num_rows for file, group in groups)]).tolist()
    columns = [file.read(columns=[label]).column(label) for file in opened]
    labels = np.concatenate([column.fill_null(-1).to_numpy() for column in columns])

    @lru_cache(maxsize=1)  # items are read in order
    def images_of(number: int) -> Any:
        file, group = groups[number]
        return file.read_row_group(group, columns=[image]).column(image)

    def read(row: int) -> Any:
        number = bisect.bisect_right(starts, row) - 1
        return images_of(number)[row - starts[number]].as_py()

    return _source(kind, where, features[label].names, labels, read, files)


def _columns(datasets: Any, features: Any, where: str) -> tuple[str, str]:
    """The one column of images and the one of classes."""
    found = []
    for kind in (datasets.Image, datasets.ClassLabel):
        names = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(names) != 1:
            has = f"{', '.join(names)} are of that kind" if names else f"columns are: {', '.join(features) or 'none'}"
            raise InputError(
                f"--data {where}: want exactly one column of the feature {kind.__name__}; {has}; "
                "use cast_column or remove_columns, and save it anew"
            )
        found.append(names[0])
    return found[0], found[1]


def _source(
    kind: str,
    where: str,
    names: Sequence[str],
    labels: NDArray[Any],
    cell: Callable[[int], Any],
    files: Sequence[Path],
) -> Source:
    labels = labels.astype(np.int64)
    strange = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(strange):
        raise InputError(
            f"--data {where}: {len(strange)} of {len(labels)} rows have no class, the first is row {strange[0]}; "
            "filter them out and save it anew"
        )
    if not len(labels):
        raise InputError(f"--data {where}: has no rows")

    def read(row: int) -> bytes:
        value = cell(row)
        content = value.get("bytes") if isinstance(value, dict) else None
        if not isinstance(content, bytes):
            raise OSError("the row holds no image but at most its path; save_to_disk puts images into the files")
        return content

    base = Path(where)
    return Source(
        kind,
        where,
        tuple(names),
        labels,
        lambda row: f"row {row}",
        read,
        lambda _: [(file.relative_to(base).as_posix() if base.is_dir() else file.name, file) for file in files],
    )
