"""Are predicted costs true? Latency of exported plans and peak memory, predicted and measured on this machine.

The machine is calibrated in the same rounds. No plan here is among what calibration runs: ranks of every matrix are
drawn at random, matrices are dense, factored or int8 one by one, classes and forms differ. Both times are medians of
single calls in the calmest of several short rounds, which go over all models in turn, with the threads that a bundle's
manifest names.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _bench_cases import BATCHES, Case, timed

from kind_edge.budget.plan import MatrixPlan, Plan
from kind_edge.budget.probe_graph import Layer, Network, network
from kind_edge.budget.problem import Candidate, Deployment, Request, Sampling
from kind_edge.budget.profile import DeviceProfile, load_profile
from kind_edge.model.spec import ModelSpec, Ranks

PLANS = (
    # classes, form, largest share of the ranks, matrices that are dense
    (("sneaker", "bag"), "switch", 1.0, 0.0),
    (("sneaker", "bag"), "switch", 0.4, 0.3),
    (None, "switch", 0.7, 0.0),
    (None, "switch", 1.0, 1.0),
    (("coat",), "single", 0.5, 0.0),
    (("coat", "dress"), "union", 1.0, 0.5),
)
"""All classes where none are named."""

SHAPES = (
    # image size, channels, patch, output channels, width, heads, blocks; rank of the matrices, 0 dense, and of tailors
    ("DiT-S/2", (32, 4, 2, 8, 384, 6, 12), 0, 0),
    ("DiT-S/2", (32, 4, 2, 8, 384, 6, 12), 77, 16),
    ("8x8 tokens, D 256", (32, 3, 4, 3, 256, 4, 8), 48, 8),
)
MEMORY_SHAPES = (("DiT-B/2", (32, 4, 2, 8, 768, 12, 12), 0, 0), ("DiT-B/2", (32, 4, 2, 8, 768, 12, 12), 154, 16))
PRECISIONS = ("fp32", "int8")


def costs(model: str = "fashion-mnist") -> dict[str, Any]:
    """Export, calibrate and measure in turns, compare: about ten minutes."""
    from _bench_plans import limited_figures, sizes, within_limits

    device = load_profile("host")
    with tempfile.TemporaryDirectory(prefix="kind-edge-costs-") as name:
        folder = Path(name)
        say("exporting")
        exported = list(_exported(model, device, folder))
        say("exporting within limits")
        within = within_limits(model, folder)
        say("calibrating and measuring latency, in turns")
        found = timed([*exported, *_drawn(device, folder, SHAPES), *within.cases])
        say("measuring memory")
        memory = _memories([*exported, *_drawn(device, folder, MEMORY_SHAPES)])
        limited = limited_figures(within, found.rows)
    errors = {
        kind: [abs(row["error"]) for row in found.rows if row["kind"] == kind]
        for kind in ("exported", "random weights")
    }
    return {
        "latency": [row for row in found.rows if row["kind"] != "within limits"],
        "memory": memory,
        "plans": limited["plans"],
        "refused": limited["refused"],
        "sizes": sizes(),
        "unrest": found.unrest,
        "latency_error_median": statistics.median(errors["exported"]),
        "latency_error_worst": max(errors["exported"]),
        "latency_error_worst_of_larger": max(errors["random weights"]),
        "peak_memory_error_worst": max(abs(row["error"]) for row in memory),
        "latency_error_median_of_limited": limited["latency_error_median"],
        "size_error_worst_of_limited": limited["size_error_worst"],
        "document": document(found.rows, memory),
    }


def document(latency: Sequence[dict[str, Any]], memory: Sequence[dict[str, Any]]) -> str:
    """The two tables of docs/costs.md."""
    header = ("model", "precision", "batch 1: {} predicted / measured", "", "batch 2", "")
    lines = []
    for unit, scale, digits, rows, keys in (
        ("ms", 1.0, 2, [row for row in latency if row["kind"] != "within limits"], ("predicted_ms", "measured_ms")),
        ("MiB", 2.0**-20, 1, memory, ("predicted_bytes", "measured_bytes")),
    ):
        lines += [f"| {' | '.join(header).format(unit)} |", "|---|---|--:|--:|--:|--:|"]
        for one, two in zip(rows[::2], rows[1::2], strict=True):
            cells = [one["model"], one["precision"]]
            for row in (one, two):
                told = (f"{row[key] * scale:.{digits if row[key] * scale < 10 else min(digits, 1)}f}" for key in keys)
                cells += [" / ".join(told), f"{row['error']:+.0%}".replace("%", " %")]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _memories(cases: Sequence[Case]) -> list[dict[str, Any]]:
    from kind_edge.deploy.bench import bench_model

    rows = []
    for case, batch in itertools.product(cases, BATCHES):
        peak = bench_model(case.file, case.threads, warmups=2, runs=3, batch=batch).peak_memory_bytes
        if peak is None:
            continue  # not Linux, nor macOS
        predicted = case.peak_bytes(batch)
        rows.append({
            "model": case.name, "precision": case.deployment.candidate.precision, "batch": batch,
            "predicted_bytes": predicted, "measured_bytes": peak, "error": predicted / peak - 1,
        })  # fmt: skip
    return rows


def _exported(model: str, host: DeviceProfile, folder: Path) -> Iterator[Case]:
    """Plans of random ranks through the whole way: truncate, fold, export; every file of each."""
    import torch

    from kind_edge.deploy.merge import fold, truncate
    from kind_edge.deploy.pipeline import plan
    from kind_edge.deploy.request import open_model
    from kind_edge.deploy.sampler_table import sampler_table
    from kind_edge.registry import exporter

    opened, random = open_model(model), np.random.default_rng(0)
    for index, (classes, form, share, dense) in enumerate(PLANS):
        base = plan(model, profile="snapdragon8g3", classes=classes, form=form, precision="int8")
        spec = opened.checkpoint.spec
        chosen = dataclasses.replace(base, matrices=_random_matrices(spec, base, share, dense, random))
        table = sampler_table(chosen.sampler, spec.objective, chosen.steps)
        truncated = truncate(opened.checkpoint, chosen, opened.calibration)
        plain = fold(truncated, chosen, torch.from_numpy(table.timestep))
        files = exporter("onnx").export(plain, folder / str(index), PRECISIONS)
        for file in (each for each in files if each.entry["role"] == "denoiser"):
            request = Request(host, chosen.classes, Sampling("euler", chosen.steps, 1.0, len(table.timestep)))
            precisions = chosen.matrix_precisions(file.precision)
            matrices = {n: dataclasses.replace(m, precision=precisions[n]) for n, m in chosen.matrices.items()}
            candidate = Candidate(chosen.form, file.precision, "cpu")  # type: ignore[arg-type]
            name = f"{form}, {len(chosen.classes)} classes, ranks up to {share:.0%}, {dense:.0%} dense"
            renamed = folder / f"plan{index}.{file.precision}.onnx"
            (folder / str(index) / file.path).rename(renamed)
            yield Case(name, "exported", renamed, spec, Deployment(spec, request, candidate), matrices)


def _random_matrices(
    spec: ModelSpec, base: Plan, share: float, dense: float, random: np.random.Generator
) -> dict[str, MatrixPlan]:
    """Ranks at random, up to a share of the whole; of the int8 file a fifth of the matrices stays in fp32."""
    matrices = {}
    for shape in spec.matrices():
        ranks = spec.ranks(shape.name)
        most = ranks if base.form == "switch" else Ranks(ranks.learngene + len(base.classes) * ranks.tailor, 0)
        full = bool(random.random() < dense)
        rank = most.learngene if full else int(random.integers(2, max(3, round(share * most.learngene)) + 1))
        tailor = int(random.integers(1, max(1, round(share * ranks.tailor)) + 1))
        storage: Any = "dense" if full else "factored"
        precision = "fp32" if random.random() < 0.2 else "int8"
        matrices[shape.name] = (
            MatrixPlan(storage, precision, rank, tailor)
            if base.form == "switch"
            else MatrixPlan(storage, precision, rank=rank)
        )
    return matrices


def _drawn(host: DeviceProfile, folder: Path, shapes: tuple[Any, ...]) -> Iterator[Case]:
    """Larger models of random weights, as the exporter writes them: exporting them would take minutes."""
    for index, ((name, sizes, rank, tailor), precision) in enumerate(itertools.product(shapes, PRECISIONS)):
        image, channels, patch, outputs, width, heads, depth = sizes
        blocks = (("attn", "mlp"),) * depth
        layer = Layer(precision, rank, tailor)
        shape = Network(image, channels, patch, outputs, width, heads, 4 * width, blocks, layer)  # type: ignore[arg-type]
        file = folder / f"{name.split(',')[0].replace('/', '')}-{rank}-{precision}-{index}.onnx"
        file.write_bytes(network(shape))
        objective: Any = "epsilon" if outputs > channels else "flow"  # one that learns a variance
        spec = ModelSpec(
            image, channels, patch, width, depth, heads, 2, rank or 1, tailor,
            objective=objective, learned_sigma=outputs > channels,
        )  # fmt: skip
        form: Any = "switch" if tailor else "single"
        storage: Any = "factored" if rank else "dense"
        one = MatrixPlan(storage, precision, rank, tailor) if tailor else MatrixPlan(storage, precision, rank=rank)
        request = Request(host, ("a", "b"), Sampling("euler", 4, 1.0, 4))
        deployment = Deployment(spec, request, Candidate(form, precision, "cpu"))
        text = f"{name}, {f'rank {rank}, tailors {tailor}' if rank else 'dense'}"
        matrices = {matrix.name: one for matrix in spec.matrices()}
        yield Case(text, "random weights", file, spec, deployment, matrices)


def say(text: str) -> None:
    print(f"{text} ...", file=sys.stderr)
