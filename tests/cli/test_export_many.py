"""`kind-edge export --profiles ... --classes-file ...`: what is refused at once, and the table at the end."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kind_edge.cli.export_many import print_fleet
from kind_edge.cli.terminal import Terminal
from kind_edge.deploy.fleet import Fleet, FleetBundle
from kind_edge.deploy.fleet_tasks import Failure, Job
from kind_edge.deploy.manifest import read_manifest


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--profile", "host", "--profiles", "host"], 2, "give one of them"),
        (["--classes-file", "sets.yaml"], 2, "one of --profile and --profiles is needed"),
        (["--profiles", ","], 2, "none given"),
        (["--profiles", "apple-a18,aple-m4"], 2, "apple-m4"),
        (["--profiles", "apple-a18", "--plan", "plan.json"], 2, "one bundle's"),
        (["--profiles", "apple-a18", "--classes-file", "sets.yaml", "--classes", "bag"], 2, "give one of them"),
        (["--profiles", "apple-a18", "--classes-file", "none.yaml"], 4, "none.yaml"),
    ],
)
def test_what_contradicts_itself(
    call: Callable[..., Any], tmp_path: Path, options: list[str], code: int, told: str
) -> None:
    answer = call("export", tmp_path / "no-model", *options, "-o", tmp_path / "out")
    assert (answer.code, answer.out) == (code, "")
    assert told in answer.err
    assert not (tmp_path / "out").exists()


def test_a_row_for_each_and_the_worst_code(exported_bundle: Path) -> None:
    folder = exported_bundle / "b"
    jobs = [Job(f"{name}/both", name, "both", ("shirt", "bag"), folder) for name in ("one", "poor", "odd")]
    no_plan, gate = Failure("NoPlanError", "no plan fits: too small", 3), Failure("GateError", "parity", 1)
    made = FleetBundle(jobs[0], manifest=read_manifest(folder))
    fleet = Fleet(Path("out"), (made, FleetBundle(jobs[1], failure=no_plan), FleetBundle(jobs[2], failure=gate)))
    assert fleet.exit_code == 1
    single = json.loads((exported_bundle / "export.json").read_text())
    told = {"name", "profile", "set", "status"}
    assert {**single, "bundle": str(folder)} == {k: v for k, v in made.to_dict().items() if k not in told}
    terminal, out, err = Terminal(), io.StringIO(), io.StringIO()
    terminal.out, terminal.err = Console(file=out, width=100), Console(file=err, width=100)
    print_fleet(terminal, fleet)
    rows = {line.split()[0]: line for line in out.getvalue().splitlines() if "/both" in line}
    assert [rows[job.name][-1] for job in jobs] == ["✓", "✗", "✗"]
    assert "1 of 3 bundles" in out.getvalue()
    assert "no plan fits" in rows["poor/both"]
    assert err.getvalue() == "error: poor/both: no plan fits: too small\nerror: odd/both: parity\n"
    assert made.manifest is not None
    worse = {**made.manifest.raw, "healing": {"kept": False, "told": "no better"}}
    print_fleet(terminal, Fleet(Path("out"), (FleetBundle(jobs[0], manifest=replace(made.manifest, raw=worse)),)))
    assert "warning: one/both: no better" in err.getvalue()
