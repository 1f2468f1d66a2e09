"""Plans within limits: what was predicted of their files, and what the files are. And how large a DiT-B/2 becomes."""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

CLASSES = ("sneaker", "bag")
SIZES = (None, "60%", "40%", "25%")

_SHAPE, _RANK, _STEPS = "DiT-B/2", 154, 20


def limited(model: str | Path = "fashion-mnist") -> dict[str, Any]:
    """Plans of several sizes on `host`, each exported and measured; two rounds, the faster counts."""
    from kind_edge.budget.profile import load_profile
    from kind_edge.deploy.bench import bench_model
    from kind_edge.deploy.pipeline import export
    from kind_edge.errors import GateError

    load_profile("host")  # measured before the clock runs
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "int8"):
            for size in SIZES:
                limit = size if precision == "fp32" or size is None else f"{float(size[:-1]) / 2.5:g}%"
                out = Path(folder, f"{precision}-{size}".replace("%", ""))
                try:
                    bundle = export(
                        model, profile="host", classes=CLASSES, precision=precision, max_size=limit, output=out
                    )
                except GateError as error:
                    print(f"{precision} within {limit}: {error}", file=sys.stderr)
                    refused.append({"precision": precision, "max_size": limit or "none", "reason": str(error)})
                    continue
                name = next(n for n in bundle.latency if n.endswith("int8.onnx") == (precision == "int8"))
                rounds = [bundle.latency[name], bench_model(out / name)]
                rows.append({
                    "precision": precision,
                    "max_size": limit or "none",
                    "predicted_ms": bundle.predicted_here_ms[name],
                    "measured_ms": min(report.p50_ms for report in rounds),
                    "predicted_bytes": bundle.plan.weight_bytes,
                    "file_bytes": bundle.files[name],
                    "parity_db": bundle.parity[name],
                    "predicted_peak_bytes": bundle.plan.peak_memory_bytes,
                    "measured_peak_bytes": max(report.peak_memory_bytes or 0 for report in rounds),
                })  # fmt: skip
    latency = [abs(row["predicted_ms"] / row["measured_ms"] - 1) for row in rows]
    return {
        "plans": rows,
        "refused": refused,
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
    from kind_edge.budget.probe_graph import Layer, Network, random_denoiser
    from kind_edge.budget.problem import GRAPH_BYTES_PER_OPERATOR
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
