"""Plans within limits: what was predicted of their files, and what the files are. And how large a DiT-B/2 becomes."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _bench_cases import Case, timed

from kind_edge.budget.breakdown import deployment_of
from kind_edge.budget.profile import load_profile
from kind_edge.deploy.request import make_source, open_model

if TYPE_CHECKING:
    from kind_edge.budget.problem import Source
    from kind_edge.deploy.making import Bundle

CLASSES = ("sneaker", "bag")
SIZES = (None, "60%", "40%", "25%")

_SHAPE, _RANK, _STEPS = "DiT-B/2", 154, 20


@dataclass(frozen=True)
class Within:
    """Bundles within limits, each with its case: the file that was planned; and what was refused."""

    bundles: tuple[tuple[str, Bundle], ...]
    cases: tuple[Case, ...]
    refused: tuple[dict[str, Any], ...]


def limited(model: str | Path = "fashion-mnist") -> dict[str, Any]:
    """Plans of several sizes on `host`, each exported, then measured in the same rounds as a calibration."""
    with tempfile.TemporaryDirectory(prefix="kind-edge-plans-") as folder:
        within = within_limits(model, Path(folder))
        return limited_figures(within, timed(within.cases).rows)


def within_limits(model: str | Path, folder: Path) -> Within:
    """Export every plan; a gate that fails is told."""
    from kind_edge.deploy.pipeline import export
    from kind_edge.errors import GateError

    source, bundles, cases = make_source(open_model(model)), [], []
    refused: list[dict[str, Any]] = []
    for precision, size in itertools.product(("fp32", "int8"), SIZES):
        limit = size if precision == "fp32" or size is None else f"{float(size[:-1]) / 2.5:g}%"
        out = folder / f"{precision}-{size}".replace("%", "")
        try:
            bundle = export(model, profile="host", classes=CLASSES, precision=precision, max_size=limit, output=out)
        except GateError as error:
            print(f"{precision} within {limit}: {error}", file=sys.stderr)
            refused.append({"precision": precision, "max_size": limit or "none", "reason": str(error)})
            continue
        bundles.append((limit or "none", bundle))
        cases.append(_case(bundle, source, f"{precision} within {limit or 'no limit'}"))
    return Within(tuple(bundles), tuple(cases), tuple(refused))


def _case(bundle: Bundle, source: Source, name: str) -> Case:
    plan = bundle.plan
    deployment = deployment_of(plan, source, load_profile("host"), plan.steps, None)
    file = bundle.path / _planned_file(bundle)
    left = source.spec.without_branches(plan.dropped_branches)
    return Case(name, "within limits", file, left, deployment, plan.matrices)


def _planned_file(bundle: Bundle) -> str:
    return next(name for name in bundle.latency if name.endswith("int8.onnx") == (bundle.plan.precision == "int8"))


def limited_figures(within: Within, timed_rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was predicted of every plan, and what came out; `timed_rows` of its case among others."""
    alone = {row["model"]: row for row in timed_rows if (row["kind"], row["batch"]) == ("within limits", 1)}
    rows: list[dict[str, Any]] = []
    for (limit, bundle), case in zip(within.bundles, within.cases, strict=True):
        name, found = _planned_file(bundle), alone[case.name]
        rows.append({
            "precision": bundle.plan.precision,
            "max_size": limit,
            "predicted_ms": found["predicted_ms"],
            "measured_ms": found["measured_ms"],
            "predicted_bytes": bundle.plan.weight_bytes,
            "file_bytes": bundle.files[name],
            "parity_db": bundle.parity[name],
            "predicted_peak_bytes": bundle.plan.peak_memory_bytes,
            "measured_peak_bytes": bundle.latency[name].peak_memory_bytes or 0,
        })  # fmt: skip
    latency = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in rows]
    return {
        "plans": rows,
        "refused": list(within.refused),
        "latency_error_median": statistics.median(latency),
        "latency_error_worst": max(latency),
        "size_error_worst": max(abs(row["predicted_bytes"] / row["file_bytes"] - 1) for row in rows),
        "peak_memory_error_worst": max(abs(r["predicted_peak_bytes"] / r["measured_peak_bytes"] - 1) for r in rows),
    }


def sizes() -> list[dict[str, Any]]:
    """Files of a DiT-B/2 of one class, rank 154, 20 steps, random weights, written and quantized as exports are."""
    import numpy as np
    import onnx

    from kind_edge.budget.cost import deployed_fixed_cost, matrix_cost
    from kind_edge.budget.denoiser_graph import BakedModulation, write
    from kind_edge.budget.graph_bytes import GRAPH_BYTES_PER_OPERATOR
    from kind_edge.budget.probe_graph import Layer, Network, random_denoiser
    from kind_edge.budget.whole_model import model_cost
    from kind_edge.exporters.onnx_int8 import quantize_int8
    from kind_edge.model.spec import named_spec

    spec = named_spec(_SHAPE, 1, factored=True, learngene_rank=_RANK, tailor_rank=0)
    shape = Network(
        spec.image_size, spec.channels, spec.patch_size, spec.output_channels, spec.width, spec.heads,
        spec.hidden_width, (("attn", "mlp"),) * spec.depth, Layer("fp32", _RANK), steps=_STEPS,
    )  # fmt: skip
    whole = random_denoiser(shape)
    assert isinstance(whole.modulation, BakedModulation)
    half = dataclasses.replace(whole, modulation=BakedModulation(whole.modulation.table.astype(np.float16)))
    rows: list[dict[str, Any]] = []
    for precision, modulation in (("fp32", "baked"), ("fp32", "baked-fp16"), ("int8", "baked"), ("fp32", "network")):
        fixed = deployed_fixed_cost(
            spec, 1, _STEPS, modulation != "network", precision,  # type: ignore[arg-type]
            switches=False, half_table=modulation == "baked-fp16",
        )  # fmt: skip
        matrices = [matrix_cost(spec, m, "factored", _RANK, 0, 0, precision) for m in spec.matrices()]  # type: ignore[arg-type]
        parts = [fixed, *matrices]
        row = {
            "model": f"{_SHAPE}, rank {_RANK}, {_STEPS} steps",
            "precision": precision,
            "modulation": modulation,
            "predicted_bytes": sum(part.weight_bytes + GRAPH_BYTES_PER_OPERATOR * part.operators for part in parts),
        }
        if modulation != "network":
            graph = write(half if modulation == "baked-fp16" else whole)
            graph = quantize_int8(graph) if precision == "int8" else graph
            onnx.checker.check_model(graph)
            row["file_bytes"] = graph.ByteSize()
        rows.append(row)
    rows[-1]["file_bytes"] = 4 * model_cost(spec, "exact").params  # its weights alone
    return rows
