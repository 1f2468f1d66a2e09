"""What the manifest says of every ONNX and ORT file beyond its role: opsets and operators, read from the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kind_edge.deploy.graph_facts import load_graph, operators_by_domain, opsets
from kind_edge.deploy.ort import quiet_tools
from kind_edge.errors import GateError

Entry = Mapping[str, Any]


def recorded(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries with `opset` (domain -> version) and `operators` (domain -> sorted names) of each file in `folder`.

    Every `.onnx` file has to pass onnx.checker in full, or this is a `GateError`. An entry that names a `source` says
    of itself only what differs from it.
    """
    return {path: _recorded(folder / path, path, entry, entries) for path, entry in entries.items()}


def _recorded(file: Path, path: str, entry: Entry, entries: Mapping[str, Entry]) -> Entry:
    whole = {**entries[entry["source"]], **entry} if "source" in entry else dict(entry)
    if file.suffix == ".onnx":
        return {**whole, **_of_onnx(file, path)}
    return {**whole, **_of_ort(file)} if file.suffix == ".ort" else whole


def _of_onnx(file: Path, path: str) -> dict[str, Any]:
    import onnx

    try:
        onnx.checker.check_model(str(file), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GateError(f"{path}: onnx.checker refuses it: {error}") from error
    model = load_graph(file)
    used = operators_by_domain(model)
    return {"opset": {domain: opsets(model)[domain] for domain in used}, "operators": used}


def _of_ort(file: Path) -> dict[str, Any]:
    from onnxruntime.tools import ort_format_model

    needed: dict[str, dict[int, set[str]]] = {}
    with quiet_tools():
        processor = ort_format_model.OrtFormatModelProcessor(str(file), needed, None)
        processor.process()
    used = {domain: sorted(set().union(*versions.values())) for domain, versions in sorted(needed.items())}
    versions = dict(_ort_opsets(processor))
    return {"opset": {domain: versions[domain] for domain in used}, "operators": used}


def _ort_opsets(processor: Any) -> Iterator[tuple[str, int]]:
    model = processor._model  # the processor keeps it to itself, and reading the file twice would not be better
    for i in range(model.OpsetImportLength()):
        yield model.OpsetImport(i).Domain().decode() or "ai.onnx", int(model.OpsetImport(i).Version())
