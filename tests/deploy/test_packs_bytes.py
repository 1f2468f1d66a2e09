"""Equal bytes: of any set of classes, in every precision, in any process."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kind_edge.budget.plan import Plan, read_plan
from kind_edge.budget.precision import PRECISIONS
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.packs import join_file, take_apart
from kind_edge.deploy.packs_recipe import make_core
from kind_edge.deploy.sampler_table import sampler_table
from kind_edge.model.checkpoint import Checkpoint
from kind_edge.registry import exporter

Contents = Callable[[Path], dict[str, bytes]]
CLASSES = ("sneaker", "bag", "coat", "shirt")
FoldPlan = Callable[[Path, Plan], Any]
FP32 = "onnx/denoiser.onnx"


@pytest.mark.parametrize("modulation", ["network", "baked", "baked-fp16"])
@pytest.mark.parametrize("distilled", [False, True])
def test_rows_of_labels_belong_to_packs(
    modulation: Any, distilled: bool, make_checkpoint: Callable[..., Checkpoint], packed: Path, tmp_path: Path
) -> None:
    """Where modulation depends on the label, with the null class's row behind those of the classes, or without one."""
    shape: dict[str, Any] = {"depth": 1, "label_embedding": True}
    checkpoint = make_checkpoint(**shape, **({"step_counts": (1, 4), "inside_guidance": 1.5} if distilled else {}))
    base = read_plan(packed / "plan.json")
    plan = dataclasses.replace(
        base, modulation=modulation, precisions=("fp32",), guidance=1.0 if distilled else 1.5,
        inside_guidance=1.5 if distilled else None, evaluations_per_step=1 if distilled else 2,
        matrices={name: dataclasses.replace(m, precision="fp32") for name, m in base.matrices.items() if ".0." in name},
    )  # fmt: skip
    files, cores = {}, {}
    for classes in (CLASSES, CLASSES[2:3]):
        own = dataclasses.replace(plan, classes=classes)
        folder = tmp_path / str(len(classes))
        timesteps = torch.from_numpy(sampler_table(own.sampler, "flow", own.steps).timestep)
        exporter("onnx").export(fold(truncate(checkpoint, own, None), own, timesteps), folder, ("fp32",))
        files[classes] = {name: (folder / name).read_bytes() for name in (FP32,)}
        cores[classes] = make_core(files[classes], len(classes), "fp32", {}, {})[1]
    core = cores[CLASSES]
    assert ("modulation.y_embed.weight" if modulation == "network" else "modulation.table") in core.tables
    assert core.sha256 == cores[CLASSES[2:3]].sha256
    shared, rows = take_apart(core, FP32, files[CLASSES][FP32], 4)
    assert join_file(core, FP32, shared, [rows[2]]) == files[CLASSES[2:3]][FP32]


AGAIN = """
import dataclasses, sys
from pathlib import Path
from kind_edge.budget.plan import read_plan
from kind_edge.budget.precision import PRECISIONS
from kind_edge.deploy.cut import make_cut, timesteps_of
from kind_edge.deploy.making import Formats, make_models
from kind_edge.deploy.merge import fold, truncate
from kind_edge.deploy.packs_bundle import write_packs
from kind_edge.deploy.request import open_model
from kind_edge.deploy.verify import load_reference
from kind_edge.registry import exporter

model, plan = open_model(sys.argv[1]), read_plan(Path(sys.argv[2]))
made = make_models(model, plan, Path("again"), Formats.of(["packs"]), lambda _: None, make_cut(model, plan))
write_packs(Path("again"), made.values, load_reference(Path("again")))
plain = fold(truncate(model.checkpoint, plan, model.calibration), plan, timesteps_of(model, plan))
exporter("onnx").export(plain, Path("every"), tuple(PRECISIONS))
"""


def test_another_process_writes_the_same_bytes(
    packed: Path,
    tiny_folder: Path,
    fold_plan: FoldPlan,
    tmp_path: Path,
    contents: Contents,
) -> None:
    """The same checkpoint, plan and tools, in every precision: whatever the folder, the order of sets, the threads."""
    exporter("onnx").export(
        fold_plan(tiny_folder, read_plan(packed / "plan.json")), tmp_path / "every", tuple(PRECISIONS)
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "OMP_NUM_THREADS": "2", "TZ": "Asia/Tokyo"}
    environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "again").mkdir(parents=True)
    command = [sys.executable, "-P", "-c", AGAIN, str(tiny_folder), str(packed / "plan.json")]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for here, name in ((packed, "again"), (tmp_path / "every", "every")):
        wanted = {path: data for path, data in contents(here).items() if path.startswith(("onnx/", "packs/"))}
        found = {path: data for path, data in contents(elsewhere / name).items() if path in wanted}
        assert len(wanted) == (3 + len(CLASSES) + 2 if name == "again" else len(PRECISIONS) + 1)
        assert [path for path in wanted if found.get(path) != wanted[path]] == []


def test_factors_are_found_on_one_thread(
    packed: Path, tiny_folder: Path, fold_plan: FoldPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries split larger products among threads, and round differently then; here all are small."""
    seen, before = set(), torch.get_num_threads()

    def watched(matrix: Any, svd: Any = torch.linalg.svd) -> Any:
        seen.add(torch.get_num_threads())
        return svd(matrix)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    try:
        torch.set_num_threads(2)
        fold_plan(tiny_folder, read_plan(packed / "plan.json"))
        assert (seen, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)
