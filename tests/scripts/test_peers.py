"""The comparison with other engines: the protocol of its workers, its statistics, and what it concludes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.model.shipped import find_model

ROOT = Path(__file__).resolve().parents[2]
WORKERS = ROOT / "scripts" / "peers" / "workers"

ENGINE = """
import os, sys
sys.path.insert(0, {workers!r})
from worker import Engine, Opened, serve

def load():
    print("a library that talks")
    return "fake 1.0"

def open_model(target, precision, batch, threads):
    if precision == "refused":
        raise ValueError("no such precision")
    def predict(sample, timestep, class_index):
        if precision == "dying":
            os._exit(3)
        assert len(sample) == len(timestep) == len(class_index) == batch, (len(sample), batch)
        with open({log!r}, "a") as log:
            log.write(precision + "\\n")
        return 0.5 * sample
    return Opened(predict, (1, 2, 2))

serve(Engine(load, None, open_model))
"""


def worker_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("worker", WORKERS / "worker.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["worker"] = module
    spec.loader.exec_module(module)
    return module


def test_rounds_go_forth_and_back_over_processes_that_stay_alive(tmp_path: Path) -> None:
    from peers.prepared import request_of
    from peers.race import EQUAL, GUIDED, Contestant, run

    log, engine = tmp_path / "log", tmp_path / "engine.py"
    engine.write_text(ENGINE.format(workers=str(WORKERS), log=str(log)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "b1.bin").write_bytes(b"12345")
    (tmp_path / "model" / "b2.bin").write_bytes(b"123")
    images, late = {GUIDED: request_of("euler", 2, 9)}, {EQUAL: request_of("euler", 3, 9, guidance=1.0)}
    told = (sys.executable, str(engine))
    contestants = [
        Contestant(name, told, tmp_path / "model", name, images, late, batch)
        for name, batch in (("once", 2), ("twice", 1), ("refused", 1), ("dying", 1))
    ]
    measured, failed = run(contestants, rounds=2, runs=3)
    assert {one.name: (one.runtime, one.batch, one.file_bytes) for one in measured} == {
        "once": ("fake 1.0", 2, 3),
        "twice": ("fake 1.0", 1, 5),
    }
    assert "no such precision" in failed["refused"]
    assert "exit code 3" in failed["dying"]
    for one in measured:
        assert {label: len(values) for label, values in one.image_ms.items()} == {GUIDED: 2, EQUAL: 2}
        assert {rows: len(values) for rows, values in one.evaluation_ms.items()} == {"1": 2, "2": 2}
        assert one.load_ms > 0
    # After one call each at the start: 3 images of 2 steps, in one call each or in two.
    calls = log.read_text().split()[2:]
    assert calls[: 6 + 12 + 12 + 6] == ["once"] * 6 + ["twice"] * 24 + ["once"] * 6


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmsolver++"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_worker_draws_what_the_distance_is_measured_of(sampler: str, batch: int) -> None:
    from peers.prepared import request_of
    from peers.samplers import draw, flow_table

    def predict(sample: Any, timestep: Any, classes: Any) -> Any:
        assert len(sample) in (batch, 2)
        return np.sin(sample) + (timestep / 1000 + 0.1 * classes).reshape(-1, 1, 1, 1).astype(np.float32)

    noise = np.random.default_rng(0).standard_normal((1, 1, 4, 4)).astype(np.float32)
    classes = np.array([3])
    theirs = worker_module().draw(predict, batch, request_of(sampler, 7, 10, 1.5), noise, classes)
    np.testing.assert_allclose(theirs, draw(predict, flow_table(sampler, 7), 1.5, noise, classes, 10), atol=1e-6)


@pytest.mark.parametrize("steps", [4, 15, 50])
def test_dpm_solver_of_a_flow_is_that_of_diffusers(steps: int) -> None:
    import torch
    from diffusers import DPMSolverMultistepScheduler
    from peers.samplers import flow_table

    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
    scheduler = DPMSolverMultistepScheduler(num_train_timesteps=1000, algorithm_type="dpmsolver++", **options)
    scheduler.set_timesteps(steps)
    table, x = flow_table("dpmsolver++", steps), torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y, before = x.double(), torch.zeros(1, dtype=torch.float64)
    assert table.timestep.tolist() == scheduler.timesteps.tolist()
    for row, timestep in enumerate(scheduler.timesteps):
        p, q, a, b, c = (float(getattr(table, name)[row]) for name in "pqabc")
        direction = p * y + q * y.sin()
        y, before = a * y + b * direction + c * before, direction
        x = scheduler.step(x.sin(), timestep, x).prev_sample
    torch.testing.assert_close(y.float(), x, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 60), st.integers(0, 60))
def test_the_fewest_steps_are_found_with_few_questions(count: int, first_good: int) -> None:
    from peers.distance import fewest, fewest_near

    asked: list[int] = []
    found = fewest(range(count), lambda n: asked.append(n) or n >= first_good)  # type: ignore[func-returns-value]
    assert found == (first_good if first_good < count else None)
    assert len(asked) == len(set(asked)) <= 11
    assert fewest_near(range(count), count // 2, lambda n: n >= first_good) == found


@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 1e4)), min_size=1, max_size=30))
def test_a_ratio_is_of_rounds_and_lies_in_its_spread(rounds: list[tuple[float, float]]) -> None:
    from peers.race import ratio

    slower, faster = zip(*rounds, strict=True)
    found, reverse = ratio(slower, faster), ratio(faster, slower)
    assert min(a / b for a, b in rounds) <= found.low <= found.median <= found.high <= max(a / b for a, b in rounds)
    assert reverse.low == pytest.approx(1 / found.high)
    assert ratio(slower, slower).text() == "1.0 (1.0 to 1.0)"


def records(ours: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """A run of the baseline, one int8 engine and `ours` (variant -> ms an image, distance), at ten and two classes."""
    from peers.distance import CLASS_SETS, MOST
    from peers.ours import VARIANTS
    from peers.race import EQUAL, GUIDED
    from peers.summary import AT_MOST, OUR_INT8

    def one(name: str, **images: float) -> dict[str, Any]:
        times = {{"most": AT_MOST, "guided": GUIDED, "equal": EQUAL}[key]: [ms] * 3 for key, ms in images.items()}
        return {"name": name, "runtime": "fake 1", "batch": 2, "threads": 1, "load_ms": 3.0, "file_bytes": 8_000_000,
                "peak_bytes": 10**7, "image_ms": times, "evaluation_ms": {"1": [1.0] * 3, "2": [1.5] * 3}}  # fmt: skip

    shipped = [one("onnxruntime fp32", most=200.0, guided=30.0, equal=4.0), one("litert int8", guided=12.0, equal=2.0)]
    shipped.append(one(OUR_INT8))
    shipped += [one(name, guided=ms, equal=ms) | {"file_bytes": 500_000} for name, (ms, _) in ours.items()]
    large = [one("onnxruntime fp32"), one("kind-edge int8, factored, 2 classes")]
    best = {"sampler": "dpmsolver++", "steps": 6, "frechet": 9.0, "frechet_at_most": 9.0}
    own: dict[str, Any] = dict.fromkeys(("cpu", "system", "python"), "this") | {"instruction_sets": ["avx2"]}
    own |= dict.fromkeys(("load_average", "cores", "threads", "rounds", "runs", "large_rounds", "large_runs"), 3)
    own["best"] = {"fp32": best, "int8": best}
    failed = {"failed": {"executorch int8": "it did not install"}, "large_failed": {}, "operators": {"MatMul": 1.0}}
    found = [_record("run", own, {"shipped": shipped, "large": large, **failed})]
    for count, classes in CLASS_SETS.items():
        at = {
            "precision": "fp32",
            "sampler": "euler",
            "steps": MOST,
            "classes": list(classes),
            "judge_sha256": "0" * 64,
        }
        found.append(_record("distance", at, {"frechet": 9.0, "class_accuracy": 0.9}))
        found.append(_record("engine", {"peer": "litert int8", "classes": list(classes)}, {"frechet": 8.0}))
        for variant in (each for each in VARIANTS if each.name in ours and each.classes == count):
            found.append(_record("ours", dataclasses.asdict(variant), {"frechet": ours[variant.name][1]}))
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def _record(kind: str, conditions: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    return {"conditions": {"kind": kind, **conditions}, "figures": figures}


def test_only_what_is_no_worse_is_compared() -> None:
    from peers.summary import summary
    from peers.text import text

    given_ours = {
        "kind-edge int8, 2 steps, 10 classes": (2.0, 8.5),
        "kind-edge int8, 4 steps, 10 classes": (4.0, 8.0),
        "kind-edge fp32, 2 steps, 10 classes": (1.0, 9.1),
        "kind-edge int8, 4 steps, 2 classes": (4.0, 9.5),
    }
    found = summary(records(given_ours))
    assert found["image_latency_vs_dense_fp32"] == {"2": None, "10": 100.0}
    assert found["image_latency_vs_best_int8_peer"] == {"2": None, "10": 3.0}
    assert found["file_size_vs_dense_fp32"] == {"2": None, "10": 16.0}
    compared = {(each["figure"], each["classes"]): each for each in found["compared"]}
    against_dense = compared["image_latency_vs_dense_fp32", 10]
    assert (against_dense["ours"], against_dense["our_frechet"]) == ("kind-edge int8, 2 steps, 10 classes", 8.5)
    assert compared["image_latency_vs_best_int8_peer", 10]["ours"] == "kind-edge int8, 4 steps, 10 classes"
    told = " ".join(text(records(given_ours)).split())
    assert "10 classes** (wanted: 40 x): reached, 100.0 x" in told
    assert "2 classes** (wanted: 3 x): missed. No bundle of ours" in told
    assert "executorch int8 at the shipped shape: it did not install" in told
    assert summary([]) == {}


def test_the_twin_is_the_teacher_but_for_what_makes_it_dense() -> None:
    from studies.store import TWIN, subject_of

    dense, teacher = load_checkpoint(TWIN), load_checkpoint(find_model("fashion-mnist-teacher"))
    different = {"factored", "learngene_rank", "tailor_rank", "label_embedding", "nested"}
    pairs = (dense.spec.to_dict(), teacher.spec.to_dict())
    assert {key for key in pairs[0] if pairs[0][key] != pairs[1][key]} <= different
    assert dense.provenance["data_sha256"] == teacher.provenance["data_sha256"]
    assert dense.provenance["config"]["images"] == teacher.provenance["config"]["images"]
    assert subject_of("fashion-mnist").twin_sha256 == subject_of(TWIN).sha256


def test_whatever_others_are_better_at_is_said() -> None:
    from peers.brief import _ahead

    def one(ms: float, file_bytes: int) -> dict[str, Any]:
        return {"evaluation_ms": {"1": [ms]}, "file_bytes": file_bytes, "peak_bytes": 10**6, "load_ms": 5.0}

    told = _ahead({"litert int8": one(1, 10**6), "openvino int8": one(2, 10**7), "ours": one(3, 10**6)}, "ours")
    assert "- one evaluation of one row: LiteRT int8 1.00 ms, OpenVINO int8 2.00 ms; ours 3.00 ms" in told
    assert "- file: none of them; ours 1.0 MB" in told
