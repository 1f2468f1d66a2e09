"""What the shipped model's bundles are: the README's first command, cuts to a share of the size, predicted costs.

listing    what the first command of the README prints
planned    what `kind-edge plan` prints of a limit that binds, and of one that nothing fits
cutting    two pairs of classes, cut to 40 % of the dense size: change on held-out images, accuracy of the bundle's
cost       `scripts/bench costs`: predicted and measured
"""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import _bench_plans

from kind_edge.deploy.evaluation import evaluate
from kind_edge.deploy.pipeline import export
from kind_edge.errors import GateError
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.training.evaluate import Judge
from kind_edge.training.sampled import sampling_of
from studies.statistics import in_percent, markdown, paragraph
from studies.store import Record, Store, Subject

COMMAND = ("export", "--profile", "snapdragon8g3", "--classes", "sneaker,bag", "-o", "out")
PLANS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "binds": (("plan", "--profile", "raspberry-pi-5", "--classes", "sneaker,bag", "--max-size", "1MiB"), 0),
    "refused": (("plan", "--profile", "raspberry-pi-5", "--max-size", "150KiB"), 3),
}
"""Name of a run -> a command, and the exit code that it ends with."""
PROFILE, PRECISION, LIMIT = "snapdragon8g3", "fp32", "40%"
PAIRS = (("sneaker", "bag"), ("shirt", "coat"))
JUDGED_IMAGES = 400


def listing(subject: Subject, output: Path) -> list[Record]:
    store = Store(output, "export", subject)
    conditions = {"kind": "listing", "command": list(COMMAND), **_advice(subject)}
    store.run("listing", conditions, lambda: {"printed": printed(subject, COMMAND)})
    return store.finished()


def planned(subject: Subject, output: Path) -> list[Record]:
    store = Store(output, "plan", subject)
    for name, (command, exit_code) in PLANS.items():
        conditions = {"kind": "plan", "command": list(command), "exit_code": exit_code, **_advice(subject)}
        store.run(name, conditions, lambda: {"printed": printed(subject, command, exit_code)})  # noqa: B023 - called here
    return store.finished()


def printed(subject: Subject, command: Sequence[str], exit_code: int = 0) -> str:
    """The command as a person runs it: a process of its own, in an empty folder, into a pipe. What a refusal says goes
    to stderr, and is printed as well."""
    words = [sys.executable, "-P", "-m", "kind_edge.cli", command[0], str(subject.folder.resolve()), *command[1:]]
    told = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    with TemporaryDirectory() as folder:
        errors = None if exit_code == 0 else subprocess.STDOUT
        done = subprocess.run(
            words, cwd=folder, env=told, stdout=subprocess.PIPE, stderr=errors, text=True, check=False
        )
    if done.returncode != exit_code:
        raise GateError(f"kind-edge {' '.join(command)} ended with exit code {done.returncode}; see above")
    return "\n".join(map(str.rstrip, done.stdout.splitlines())).strip("\n")


def cutting(subject: Subject, output: Path) -> list[Record]:
    store = Store(output, "cutting", subject)
    own = {"profile": PROFILE, "precision": PRECISION, "max_size": LIMIT, "images": JUDGED_IMAGES, "seed": 0}
    for pair in PAIRS:
        conditions = {"kind": "cut", "classes": list(pair), **own, **_advice(subject)}
        conditions["judge_sha256"] = Judge.load().judge_sha256
        store.run("-".join(pair), conditions, partial(_cut, subject.folder, pair))
    return store.finished()


def _cut(model: Path, classes: Sequence[str]) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        bundle = export(
            model, profile=PROFILE, classes=classes, precision=PRECISION, max_size=LIMIT, output=Path(folder, "out")
        )
        report = evaluate(bundle.path, JUDGED_IMAGES, 0).quality
    return {
        "file_bytes": bundle.files["onnx/denoiser.onnx"],
        "limit_bytes": int(bundle.plan.limits["max_size"]),
        "heldout_change": {each.name: each.change for each in bundle.quality},
        "class_accuracy": report.class_accuracy,
    }


def cost(subject: Subject, output: Path) -> list[Record]:
    store = Store(output, "cost", subject)
    conditions = {"kind": "cost", "profile": "host", "classes": list(_bench_plans.CLASSES), "in_turns": True}
    conditions |= _advice(subject)
    store.run("plans", conditions, lambda: _bench_plans.limited(subject.folder))
    return store.finished()


def _advice(subject: Subject) -> dict[str, Any]:
    return dataclasses.asdict(sampling_of(load_checkpoint(subject.folder)))


# --- what is printed --------------------------------------------------------------------------------------------------


def listing_text(records: Sequence[Record]) -> str:
    return "\n\n".join(f"```text\n{record['figures']['printed']}\n```" for record in records)


def planned_text(records: Sequence[Record]) -> str:
    return "\n\n".join(_shown(record, record["figures"]["printed"]) for record in records if record["run"] == "binds")


def refused_text(records: Sequence[Record]) -> str:
    """From where it says what is missed; the closest plan before it looks like any other."""
    refused = [(record, record["figures"]["printed"]) for record in records if record["run"] == "refused"]
    return "\n\n".join(_shown(record, f"...\n{text[text.index('What it misses') :]}") for record, text in refused)


def _shown(record: Record, text: str) -> str:
    return f"```console\n$ scripts/kind-edge {shlex.join(record['conditions']['command'])}\n{text}\n```"


def cutting_text(records: Sequence[Record]) -> str:
    rows = [_cut_row(record) for pair in PAIRS for record in records if record["conditions"]["classes"] == list(pair)]
    own = records[0]["conditions"] if records else {}
    command = f"kind-edge export --profile {PROFILE} --precision {PRECISION} --max-size {LIMIT} --classes ..."
    judged = f"kind-edge eval --images {own.get('images')}"
    sampling = f"{own.get('sampler')}, {own.get('steps')} steps, guidance {own.get('guidance')}"
    header = ("classes", "file", "limit", "held-out change", "accuracy")
    told = paragraph(f"`{command}`, then `{judged}`; {sampling}:")
    return f"{told}\n\n{markdown(header, rows)}"


def _cut_row(record: Record) -> tuple[str, ...]:
    figures = record["figures"]
    loss = ", ".join(f"{name} {100 * increase:+.1f} %" for name, increase in figures["heldout_change"].items())
    sizes = (f"{figures[key]:,} B" for key in ("file_bytes", "limit_bytes"))
    return (", ".join(record["conditions"]["classes"]), *sizes, loss, f"{in_percent(figures['class_accuracy'], 1)}")


def cost_text(records: Sequence[Record]) -> str:
    return "\n\n".join(map(_cost_part, records))


def _cost_part(record: Record) -> str:
    figures = record["figures"]
    header = ("precision", "`--max-size`", "predicted", "measured", "predicted file", "file", "parity")
    errors = {
        name: f"{in_percent(figures[key])}" if figures[key] >= 0.1 else f"{in_percent(figures[key], 1)}"
        for name, key in (
            ("median", "latency_error_median"), ("worst", "latency_error_worst"), ("size", "size_error_worst"),
            ("memory", "peak_memory_error_worst"),
        )
    }  # fmt: skip
    refused = [f"Refused: {row['precision']} within {row['max_size']}: {row['reason']}." for row in figures["refused"]]
    in_turns = record["conditions"].get("in_turns", False)
    how = "measured in turns with the calibration" if in_turns else "of two rounds the faster median"
    told = (
        f"`scripts/bench costs`, on {record['hardware']}, classes {', '.join(record['conditions']['classes'])}, one "
        f"evaluation; {how}"
    )
    missed = (
        f"Predicted latencies miss the measured ones by {errors['median']} in the median and {errors['worst']} at "
        f"worst, sizes by {errors['size']} at worst, peak memory by {errors['memory']}."
    )
    rows = markdown(header, map(_cost_row, figures["plans"]))
    return "\n\n".join([paragraph(f"{told}:"), rows, paragraph(" ".join([missed, *refused]))])


def _cost_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    times = (f"{row[key]:.2f} ms" for key in ("predicted_ms", "measured_ms"))
    sizes = (f"{row[key]:,} B" for key in ("predicted_bytes", "file_bytes"))
    return (row["precision"], row["max_size"], *times, *sizes, f"{row['parity_db']:.1f} dB")
