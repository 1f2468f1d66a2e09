"""Many bundles at once: each equals that of a single export, an interruption costs little, a failure stops nobody."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.budget.profile import packaged_text
from kind_edge.deploy import fleet
from kind_edge.deploy.bench import Conditions, LatencyReport
from kind_edge.deploy.bundle import read_manifest, verify_hashes
from kind_edge.deploy.fleet import Fleet, export_many
from kind_edge.deploy.fleet_crew import Crew
from kind_edge.deploy.fleet_schedule import Schedule
from kind_edge.deploy.fleet_tasks import (
    Failure,
    Finish,
    Job,
    MakeFiles,
    MakePlans,
    MeasureSensitivity,
    Open,
    Order,
    Task,
)
from kind_edge.deploy.fleet_worker import Worker
from kind_edge.deploy.made import Made, Measured
from kind_edge.deploy.quality import Healing
from kind_edge.deploy.report import write_report
from kind_edge.errors import NoPlanError, UsageError
from kind_edge.model.checkpoint import CALIBRATION

Contents = Callable[[Path], dict[str, bytes]]
SETS = {"both": ["shirt", "bag"]}
ASKED: dict[str, Any] = {"max_flops": "60%"}  # as of the fixture `exported_bundle`


@pytest.fixture
def measured(exported_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured: times are those of the bundle of a single export."""
    latency = json.loads((exported_bundle / "b" / "manifest.json").read_text())["latency"]

    def report(values: dict[str, Any]) -> LatencyReport:
        here = values["conditions"]
        conditions = Conditions(**{**here, "instruction_sets": tuple(here["instruction_sets"])})
        return LatencyReport(**{**values, "conditions": conditions})

    times = Measured({name: report(each) for name, each in latency["models"].items()}, report(latency["image"]))
    monkeypatch.setattr(fleet, "measure", lambda folder, made: times)


@pytest.fixture(scope="module")
def poor_device(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A profile whose apps may have hardly any memory."""
    path = tmp_path_factory.mktemp("profile") / "poor.toml"
    text, changes = re.subn(
        "app_limit_gib = { value = [0-9.]+", "app_limit_gib = { value = 1e-6", packaged_text("apple-a18")
    )
    assert changes == 1
    path.write_text(text)
    return str(path)


def make(model: Path, output: Path, profiles: list[str], **more: Any) -> Fleet:
    return export_many(model, profiles=profiles, class_sets=SETS, output=output, workers=1, **ASKED, **more)


def test_every_bundle_equals_that_of_a_single_export(
    tiny_folder: Path,
    exported_bundle: Path,
    tmp_path: Path,
    measured: None,
    poor_device: str,
    contents: Contents,
) -> None:
    made = make(tiny_folder, tmp_path / "out", ["raspberry-pi-5", "apple-a18", poor_device])
    assert made.exit_code == NoPlanError.exit_code
    first, second, third = made.to_dict()["bundles"]
    assert (third["status"], third["exit_code"]) == ("failed", 3)
    assert "--max-memory" in third["error"]
    single = json.loads((exported_bundle / "export.json").read_text())
    told = {"profile", "set", "name", "status"}
    assert {key: value for key, value in first.items() if key not in told}.keys() == single.keys()
    manifest = read_manifest(made.bundles[0].job.destination)
    healing = Healing(1.0, 2, "deviation", 0.2, 0.1, True)
    told_of = {**manifest.raw, "healing": {**healing.to_dict(), "told": healing.told()}}
    healed = dataclasses.replace(made.bundles[0], manifest=dataclasses.replace(manifest, raw=told_of))
    assert healed.to_dict()["healing"] == healing.to_dict()
    ours, theirs = contents(tmp_path / "out/raspberry-pi-5/both"), contents(exported_bundle / "b")
    values = [json.loads(each.pop("manifest.json")) for each in (ours, theirs)]
    for each, folder in zip(values, (tmp_path / "out/raspberry-pi-5/both", exported_bundle / "b"), strict=True):
        each["latency"]["predicted_here_ms"] = {}  # this machine may have been measured anew in between
        del each["files"]["report.html"]
        write_report(folder, each, tmp_path / f"{folder.name}.html")
    assert values[0] == values[1]
    assert (tmp_path / "both.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    del ours["report.html"], theirs["report.html"]
    assert ours == theirs
    assert second["plan"]["profile"] == "apple-a18"
    assert "apple-a18" in (tmp_path / "out/apple-a18/both/README.md").read_text()
    assert (tmp_path / "out/raspberry-pi-5/both/onnx/denoiser.onnx").stat().st_nlink == 2
    for name in ("raspberry-pi-5", "apple-a18"):
        verify_hashes(tmp_path / "out" / name / "both")


def test_what_is_stated_of_a_model_makes_its_bundles_others(tiny_folder: Path, tmp_path: Path) -> None:
    """No hash of weights covers it, but it is told in every bundle."""
    folder = tmp_path / "m"
    shutil.copytree(tiny_folder, folder)
    order = Order(str(folder), ("onnx",), {}, {})
    before = Worker(order, lambda _: None, lambda *_: None).do(Open()).fingerprint
    config = json.loads((folder / "config.json").read_text())
    config["provenance"]["stated"] = {"licence": "MIT"}
    (folder / "config.json").write_text(json.dumps(config))
    after = Worker(order, lambda _: None, lambda *_: None).do(Open()).fingerprint
    assert {name for name in before if before[name] != after[name]} == {"provenance"}


def test_what_is_measured_of_a_model_changes_nothing_the_next_time(tiny_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (model / CALIBRATION).unlink()
    order = Order(str(model), ("onnx",), {}, {})
    worker, later = (Worker(order, lambda _: None, lambda *_: None) for _ in range(2))
    assert not worker.do(Open()).measured
    worker.do(MeasureSensitivity())
    opened = worker.do(Open())
    assert opened.measured
    assert opened == later.do(Open())


def test_a_worker_that_died_at_rest_fails_its_next_task_alone(tiny_folder: Path) -> None:
    with Crew(Order(str(tiny_folder), ("onnx",), {}, {}), 2, 2, lambda *_: None, lambda *_: None) as crew:
        crew.grow(1)
        process = crew._team[0]._process  # type: ignore[union-attr]
        process.kill()
        process.join()
        crew.start(0, Open())
        ((_, answer),) = crew.answers()
        assert isinstance(answer, Failure)
        assert "killed by signal 9" in answer.message
        assert crew.idle() == [0]


def flip_a_bit(path: Path) -> None:
    """In the middle; the file that other bundles may share stays as it is."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


class Stop(BaseException):
    """As Ctrl-C, but for pytest."""


def test_an_interrupted_export_goes_on_wherever_it_stopped(tiny_folder: Path, tmp_path: Path, measured: None) -> None:
    out, profiles = tmp_path / "out", ["raspberry-pi-5", "apple-a18"]
    draw, asked, whole = random.Random(8), {"precision": "fp32"}, 0
    events: list[Any] = []
    for chance in (0.3, 0.08, 0.0):
        notes: list[str] = []

        def progress(now: Any, chance: float = chance) -> None:
            events.append(now)
            if draw.random() < chance:
                raise Stop

        try:
            made = make(tiny_folder, out, profiles, on_progress=progress, on_note=notes.append, **asked)
        except Stop:
            left = {path.name for path in out.rglob(".*")} if out.exists() else set()
            assert left == set()
        whole = sum((out / name / "both/manifest.json").exists() for name in profiles)
    assert whole == 2
    assert made.exit_code == 0
    times = {name: (out / name / "both/manifest.json").stat().st_mtime_ns for name in profiles}
    flip_a_bit(out / "apple-a18/both/onnx/denoiser.onnx")
    healing = [out / name for name in (".alone.heal", ".0123456789abcdef.heal")]
    for folder in healing:
        folder.mkdir()
    notes = []
    again = make(tiny_folder, out, profiles, on_note=notes.append, **asked)
    assert [each.kept for each in again.bundles] == [True, False]
    assert [folder.exists() for folder in healing] == [True, False]  # the first is of a bundle exported by itself
    assert notes == ["made anew, as the bundle is damaged or gone: apple-a18/both"]
    assert (out / "raspberry-pi-5/both/manifest.json").stat().st_mtime_ns == times["raspberry-pi-5"]
    notes.clear()
    other = make(tiny_folder, out, ["apple-a18"], on_note=notes.append, **asked, steps=2)
    assert not other.bundles[0].kept
    assert notes == [
        "made anew, as something else was asked for or given before (steps): apple-a18/both",
        "left as they are, of an earlier export and not asked for now: raspberry-pi-5/both",
    ]


def test_killed_processes_leave_nothing_half_done(tiny_folder: Path, tmp_path: Path, measured: None) -> None:
    out = tmp_path / "out"
    sets = tmp_path / "sets.yaml"
    sets.write_text("both: [shirt, bag]\n")
    options = ["--profiles", "raspberry-pi-5,apple-a18", "--classes-file", str(sets), "--max-flops", "60%"]
    command = [sys.executable, "-P", "-m", "kind_edge.cli", "-q", "export", str(tiny_folder), *options, "-o", str(out)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stderr=log, stdout=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if any(out.rglob("*/.both.new-*")):  # a bundle is being written
                time.sleep(random.uniform(0.0, 0.3))
                break
            time.sleep(0.01)
        family = _descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
    until = time.monotonic() + 30
    while (alive := [pid for pid in family if _alive(pid)]) and time.monotonic() < until:
        time.sleep(0.02)
    assert alive == []
    made = make(tiny_folder, out, ["raspberry-pi-5", "apple-a18"])
    assert made.exit_code == 0, (tmp_path / "log").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["apple-a18", "fleet.json", "raspberry-pi-5"]
    assert not any(out.rglob(".*"))
    for each in made.bundles:
        verify_hashes(each.job.destination)


def _descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_cannot_be_meant_is_refused_before_any_work(tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"profiles": ["aple-a18"]}, "apple-a18"),
        ({"profiles": ["apple-a18", "apple-a18"]}, "twice"),
        (
            {"profiles": ["apple-a18"], "class_sets": {"x": ["shirts"]}},
            "x: unknown class 'shirts'; did you mean: shirt",
        ),
        ({"profiles": ["apple-a18"], "class_sets": {"../x": ["shirt"]}}, "want letters"),
        ({"profiles": ["apple-a18"], "class_sets": {"x": ["shirt"]}, "classes": ["shirt"]}, "leave one"),
    ]
    for given_, told in wrong:
        with pytest.raises(UsageError, match=told):
            export_many(tiny_folder, output=out, workers=1, **given_)
    assert not out.exists()
    with fleet._locked(out), pytest.raises(UsageError, match="another export is writing there"):
        make(tiny_folder, out, ["apple-a18"])


@dataclasses.dataclass(frozen=True)
class FakePlan:
    """As much of a plan as a schedule looks at."""

    what: int
    classes: tuple[str, ...]
    weight_bytes: int = 90
    limits: Any = dataclasses.field(default_factory=lambda: {"max_size": 100})
    coreml: Any = dataclasses.field(default_factory=lambda: {"app_bytes": 80, "limit_bytes": 99})

    def to_dict(self) -> dict[str, Any]:
        return {"what": self.what, "classes": self.classes}


@given(
    kinds=st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab")), min_size=1, max_size=12),
    workers=st.integers(1, 4),
    order=st.randoms(use_true_random=False),
    faults=st.sets(st.integers(0, 3)),
    large=st.sets(st.integers(0, 3)),
    bulky=st.sets(st.integers(0, 3)),
)
def test_whatever_takes_how_long(
    kinds: list[tuple[int, str]], workers: int, order: random.Random, faults: set[int],
    large: set[int], bulky: set[int],
) -> None:  # fmt: skip
    """Every job ends; the same files are made once; nothing runs while something is measured."""
    jobs = [Job(f"{i}", "p", None, (c,), Path(f"{i}")) for i, (_, c) in enumerate(kinds)]
    kind_of = {job: kind for job, (kind, _) in zip(jobs, kinds, strict=True)}
    schedule = Schedule(jobs, Path("work"), workers)
    running: list[Task] = []
    folders: list[Path] = []
    finished: list[str] = []

    def answer(task: Task) -> Any:
        if isinstance(task, MakePlans):  # a plan with spare bytes is another one, whose file fits
            pairs = zip(task.jobs, task.spare_bytes, strict=True)
            return tuple(FakePlan(kind_of[job] + 10 * (spare > 0), job.classes or ()) for job, spare in pairs)
        if isinstance(task, MakeFiles):
            folders.append(task.folder)
            if task.plan.what in faults:  # type: ignore[attr-defined]
                return Failure("GateError", "parity", 1)
            what = task.plan.what  # type: ignore[attr-defined]
            return Made({}, 110 if what in large else 95, 1, {}, 105 if what in bulky else 0)
        assert isinstance(task, Finish)
        finished.append(task.job.name)
        return None

    while True:
        while len(running) < workers and (task := schedule.next()) is not None:
            running.append(task)
        if running:
            task = running.pop(order.randrange(len(running)))
            schedule.done(task, answer(task))
        elif schedule.measuring:
            schedule.measured(schedule.measuring[0], Measured({}, None))  # type: ignore[arg-type]
        else:
            break
    assert set(schedule.outcome) == set(jobs)
    assert len(set(folders)) == len(folders)
    assert sorted(finished) == sorted(job.name for job in jobs if kind_of[job] not in faults)
    assert all((schedule.outcome[job] is None) == (kind_of[job] not in faults) for job in jobs)
