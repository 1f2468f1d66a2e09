"""Measurements of the shipped model on this machine; every name prints a table, or one JSON object with --json.

coreml   seconds and memory of converting the shipped model and a DiT-B/2 with random weights to Core ML, and how close
         the saved packages stay for one class; five minutes
costs    latency of exported plans in the same rounds as a calibration of this machine, memory and file size, predicted
         against measured; sizes of a DiT-B/2; the tables of docs/costs.md; ten minutes
peers    other engines with a dense twin of the shipped model beside our artefacts, in one interleaved run, into
         docs/benchmarks.md; environments of 5 GB and Frechet distances are made once; then ten minutes
export   how long the main command takes, stage by stage
fleet    10 devices x 4 sets of classes in one export, over the time of one export; interleaved, ten minutes
graph    what the layout of the exported graph is worth, and the sampler beside a loop in Python; five minutes
packs    bytes of a core and of a class pack, of DiT-B/2 with random weights and of the shipped model; nothing is timed
resize   other depths and widths against ranks and precision alone, at equal latency, healed alike: latency and Frechet
         distance of the shipped model; measures the sizes first, 9 minutes, then two limits, 6 minutes each
solver   predicted against measured loss of random plans, of the shipped model and its teacher; minutes a level. The
         solver's plans against uniform ranks; seconds that it takes for DiT-XL/2
steps    the distilled model at its step counts against its guided teacher: Frechet distance and accuracy, 5,000 images
training a step at the shape of DiT-S/2: 1,000 classes against 10, rank 0.3 D against dense; few rounds, minutes
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CLASSES = ("sneaker", "bag")


def export_time() -> dict[str, Any]:
    """The README's command in this process, imports included."""
    started = time.perf_counter()
    marks: list[tuple[str, float]] = []
    from kind_edge.deploy.pipeline import export

    def stage(name: str) -> None:
        marks.append((name, time.perf_counter()))

    with tempfile.TemporaryDirectory() as folder:
        export(profile="snapdragon8g3", classes=CLASSES, output=Path(folder, "out"), on_stage=stage)
    ended = time.perf_counter()
    times = [("importing", started), *marks, ("end", ended)]
    stages = [{"stage": a[0], "seconds": b[1] - a[1]} for a, b in itertools.pairwise(times)]
    return {"stages": stages, "total_s": ended - started}


def training() -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parent))
    from _bench_training import training as steps

    return steps()


def steps() -> dict[str, Any]:
    """Runs that are finished are read."""
    sys.path.append(str(Path(__file__).parent))
    from studies.documents import RESULTS, ROOT
    from studies.steps import IMAGES, run, summary
    from studies.store import subject_of

    from kind_edge.model.shipped import DEFAULT_MODEL

    records = run(subject_of(DEFAULT_MODEL), ROOT / RESULTS, IMAGES)
    keys = ("evaluations", "frechet", "recall", "class_accuracy")
    rows = [
        {"model": record["checkpoint"]["model"], "steps": record["conditions"]["steps"]}
        | {key: record["figures"][key] for key in keys}
        for record in records
    ]
    return {"rows": rows, **summary(records)}


def coreml() -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parent))
    from _bench_coreml import coreml as conversions

    return conversions()


def costs() -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parent))
    from _bench_costs import costs as compared

    return compared()


def fleet() -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parent))
    from _bench_fleet import fleet as compared

    return compared()


def graph() -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parent))
    from _bench_graph import graph as compared

    return compared()


def solver() -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parent))
    from _bench_solver import solver as parts

    return parts()


def packs() -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parent))
    from _bench_packs import packs as sizes

    return sizes()


def resize() -> dict[str, Any]:
    sys.path.append(str(Path(__file__).parent))
    from _bench_resize import resize as compared

    return compared()


def peers() -> dict[str, Any]:
    """Measured anew, and put into docs/benchmarks.md."""
    sys.path.append(str(Path(__file__).parent))
    from peers.summary import summary
    from studies.__main__ import publish
    from studies.documents import RESULTS, ROOT
    from studies.store import read_record

    (ROOT / RESULTS / "peers" / "run.json").unlink(missing_ok=True)
    publish(["peers"])
    return summary([read_record(path) for path in sorted((ROOT / RESULTS / "peers").glob("*.json"))])


BENCHES = {
    "coreml": coreml,
    "costs": costs,
    "export": export_time,
    "fleet": fleet,
    "graph": graph,
    "packs": packs,
    "peers": peers,
    "resize": resize,
    "solver": solver,
    "steps": steps,
    "training": training,
}


def show(result: dict[str, Any]) -> None:
    console = Console()
    for key, value in result.items():
        if isinstance(value, dict):
            told = (f"{name} {'none' if number is None else format(number, '.4g')}" for name, number in value.items())
            console.print(f"{key}: " + ", ".join(told))
            continue
        if isinstance(value, str):
            console.print(value, markup=False, highlight=False, soft_wrap=True)
            continue
        if not isinstance(value, list):
            console.print(f"{key}: {value:.4g}")
            continue
        if not value:
            continue
        table = Table(*value[0])
        for row in value:
            table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values()))
        console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=sorted(BENCHES))
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = BENCHES[arguments.name]()
    if arguments.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
