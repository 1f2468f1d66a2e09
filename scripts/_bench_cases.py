"""Model files with what the cost model knows of them, timed in the same rounds as the probes of a calibration.

A machine that others use too is never as fast twice. What is compared here was measured in turns, every model in every
round, so that a slow spell meets both sides, and the calmest round of each counts.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kind_edge.budget import runner
from kind_edge.budget.calibrate import all_probes, probes_folder
from kind_edge.budget.cost import fixed_memory_bytes, matrix_memory_bytes, runs_on_one_thread
from kind_edge.budget.decoder import decoder_cost
from kind_edge.budget.host import available_threads, host_key, keep_host
from kind_edge.budget.plan import MatrixPlan
from kind_edge.budget.problem import Deployment
from kind_edge.budget.profile import DeviceProfile
from kind_edge.model.spec import ModelSpec

BATCHES = (1, 2)
_ROUNDS_S = 240.0
"""Four rounds take half of that; the others go to models whose rounds disagree."""


@dataclass(frozen=True)
class Case:
    """One model file, and what the cost model knows of it. `kind`: "exported", "within limits" or "random weights"."""

    name: str
    kind: str
    file: Path
    spec: ModelSpec
    deployment: Deployment
    matrices: Mapping[str, MatrixPlan]

    @property
    def threads(self) -> int:
        """What its manifest says, or what the runtime takes."""
        return 1 if runs_on_one_thread(self.spec) else available_threads()

    def on(self, host: DeviceProfile) -> Case:
        request = dataclasses.replace(self.deployment.request, profile=host)
        return dataclasses.replace(self, deployment=dataclasses.replace(self.deployment, request=request))

    def latency_ms(self, batch: int) -> float:
        return 1e3 * self.deployment.evaluation_latency_s(self.matrices, sustained=False, batch=batch)

    def peak_bytes(self, batch: int) -> int:
        left = self.deployment
        total = fixed_memory_bytes(left.fixed, batch, decoder_cost(dataclasses.replace(self.spec, pixels_per_latent=1)))
        for shape in self.spec.matrices():
            plan = self.matrices[shape.name]
            precision: Any = plan.precision
            shared = left.shared(shape, plan.storage, plan.shared_rank, precision)
            total += matrix_memory_bytes(shared, batch)
            total += matrix_memory_bytes(left.tailors(shape, plan.tailor_rank or 0, precision), batch)
        return total

    def entries(self) -> list[dict[str, Any]]:
        """Its lines in a runner's request, one for each batch."""
        side = self.spec.image_size
        found = []
        for batch in BATCHES:
            shapes = {"sample": ("float32", [batch, self.spec.channels, side, side]), "step_index": ("int32", [batch])}
            if self.deployment.candidate.form == "switch":
                shapes["class_index"] = ("int64", [batch])
            inputs = {name: {"dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()}
            entry = {"name": f"{self.file} x{batch}", "file": str(self.file), "inputs": inputs}
            found.append(entry | {"threads": self.threads})
        return found


@dataclass(frozen=True)
class Timed:
    """`rows`: every case at every batch, predicted by the profile of the very run and measured.

    `unrest`: by how much the middle round of a model was slower than its calmest, in the median over all models.
    """

    host: DeviceProfile
    rows: tuple[dict[str, Any], ...]
    unrest: float


def timed(cases: Sequence[Case]) -> Timed:
    """Calibrate this machine and time the cases, in the same rounds. The calibration is remembered."""
    key = host_key()
    probes = all_probes(key.threads > 1)
    with probes_folder(probes) as folder:
        path = folder / runner.REQUEST
        request = json.loads(path.read_text(encoding="utf-8"))
        request["models"] = _mixed([*request["models"], *(entry for case in cases for entry in case.entries())])
        path.write_text(json.dumps(request), encoding="utf-8")
        rounds = runner.measure_rounds(folder, key.threads, _ROUNDS_S)
    host = keep_host(key, {probe.name: min(rounds[probe.name]) for probe in probes})
    unrest = statistics.median(statistics.median(times) / min(times) - 1 for times in rounds.values())
    rows = []
    for case in (case.on(host) for case in cases):
        for batch, entry in zip(BATCHES, case.entries(), strict=True):
            predicted_ms, measured_ms = case.latency_ms(batch), min(rounds[entry["name"]]) / 1e3
            rows.append({
                "model": case.name, "kind": case.kind, "precision": case.deployment.candidate.precision, "batch": batch,
                "threads": case.threads, "predicted_ms": predicted_ms, "measured_ms": measured_ms,
                "error": predicted_ms / measured_ms - 1,
            })  # fmt: skip
    return Timed(host, tuple(rows), unrest)


def _mixed(models: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In an order of chance; those of one file and number of threads stay together, as they share a session."""
    groups: dict[tuple[str, int | None], list[dict[str, Any]]] = {}
    for model in models:
        groups.setdefault((model["file"], model.get("threads")), []).append(model)
    every = list(groups.values())
    return [model for index in np.random.default_rng(0).permutation(len(every)) for model in every[index]]
