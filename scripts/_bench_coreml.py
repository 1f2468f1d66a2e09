"""What converting a model to Core ML takes: seconds and memory, each layout in a process of its own, and its distance.

The distance is of the saved package, run in NumPy, from the gated model: SQNR of one class at one timestep.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch

from kind_edge.budget.coreml_weights import Layout, Weights
from kind_edge.deploy.cut import make_cut
from kind_edge.deploy.merge import fold
from kind_edge.deploy.parity import sqnr_db
from kind_edge.deploy.pipeline import plan as make_plan
from kind_edge.deploy.plain import PlainDiT
from kind_edge.deploy.reference import make_reference
from kind_edge.deploy.request import open_model
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.exporters.coreml_choices import batches
from kind_edge.exporters.coreml_compress import compress
from kind_edge.exporters.coreml_convert import convert, interface_of
from kind_edge.exporters.coreml_graph import Denoiser
from kind_edge.exporters.coreml_package import Description, package_bytes, save_package
from kind_edge.exporters.mil_reference import open_package
from kind_edge.model.shipped import DEFAULT_MODEL

RANDOM = "DiT-B/2"
WAYS: tuple[Weights, ...] = ("fp16", "int8")
PROFILE, TARGET = "apple-a18", "iOS18"


def coreml() -> dict[str, Any]:
    """A row for every model, layout and way to store weights."""
    rows = []
    for model in (DEFAULT_MODEL, RANDOM):
        for layout in get_args(Layout):
            command = [sys.executable, "-P", "-W", "ignore", __file__, model, layout]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows += json.loads(done.stdout.splitlines()[-1])
    return {"rows": rows}


def _model(name: str) -> PlainDiT:
    if name == RANDOM:
        from _bench_packs import random_model

        return random_model(labels=False)
    opened = open_model(name)
    plan = make_plan(opened, profile=PROFILE, precision="fp32")
    table = sampler_table(plan.sampler, opened.checkpoint.spec.objective, plan.steps)
    return fold(make_cut(opened, plan).truncated, plan, torch.from_numpy(table.timestep))


def _rows(name: str, layout: Layout) -> list[dict[str, Any]]:
    """The peak is of the whole process so far, PyTorch and the model in it."""
    model = _model(name)
    denoiser = Denoiser(model, layout)
    started = time.perf_counter()
    sizes = batches(TARGET, "fixed", model.origin.plan.evaluations_per_step)
    program = convert(denoiser, interface_of(denoiser), TARGET, sizes)
    converted_s = time.perf_counter() - started
    rows = []
    for weights in WAYS:
        started = time.perf_counter()
        compressed = compress(program, weights, TARGET)
        with TemporaryDirectory() as folder:
            path = Path(folder, "Denoiser.mlpackage")
            save_package(compressed, path, Description("", "", "", "", {}))
            written_s = time.perf_counter() - started
            peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            rows.append({
                "model": name, "layout": layout, "weights": weights, "convert_s": round(converted_s, 1),
                "compress_and_write_s": round(written_s, 1), "peak_gib": round(peak_gib, 2),
                "package_bytes": package_bytes(path), "sqnr_db": round(_distance_db(model, path), 1),
            })  # fmt: skip
    return rows


def _distance_db(model: PlainDiT, path: Path) -> float:
    """Of the first class at the sampler's first step."""
    origin = model.origin
    reference = make_reference(origin.truncated, origin.plan.form, origin.timesteps, None)
    inputs = {name: reference[name][:1] for name in model.input_names}
    return sqnr_db(reference["prediction"][:1], open_package(path)(inputs))


if __name__ == "__main__":
    print(json.dumps(_rows(sys.argv[1], sys.argv[2])))  # type: ignore[arg-type]
