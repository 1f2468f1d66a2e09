"""`scripts/results NAME -o FOLDER`: run what is not finished yet, then print the table as markdown."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from kind_edge.errors import KindEdgeError, UsageError
from kind_edge.model.shipped import DEFAULT_MODEL
from studies import anysize, decomposition, pictures, trainings, transfer, trials
from studies.statistics import SEEDS
from studies.store import Record, subject_of, write_whole

HELP = """decomposition  is the learngene classless, and does a tailor draw its own class alone?
anysize        what a smaller model costs, without retraining: whitened, plain and planned truncation
anysize-heal   the same after 300 steps of training on (trains four times a seed)
anysize-dense  ordinary DiTs of equal FLOPs, trained from scratch on as many images as the model (hours to days)
trainings      trains the study presets with three seeds each, and runs decomposition on every model (hours)
transfer       new classes and a new domain: tailors against LoRA, full fine-tuning and from scratch (an hour a seed)
trials         trains the four short runs (KIND, dense, with label embedding, epsilon) into FOLDER and judges each
twin           trains the dense transformer of the shipped model's shape on as many images, and judges it (1.5 hours)
shipped        judges the model in FOLDER over guidance strengths, and with 10,000 images at its best

A finished run's figures lie in FOLDER/STUDY/RUN.json and are never computed again; stopped runs go on."""

METHODS = {
    "anysize": ("whitened", "plain", "planned"),
    "anysize-heal": ("healed",),
    "anysize-dense": ("dense",),
}


def study(name: str, chosen: argparse.Namespace) -> tuple[list[Record], str]:
    """Run a study; returns its records and its table."""
    own = {"trials": trials.trials, "twin": trials.twin, "shipped": trials.shipped}
    if name in own:
        rows = own[name](chosen.output)
        return rows, trials.table(rows)
    if name == "trainings":
        trained = trainings.run(chosen.output, chosen.images, SEEDS[: chosen.seeds])
        return [record for own in trained.values() for record in own], trainings.table(trained)
    if name == "transfer":
        records = transfer.study(chosen.output, transfer.Size(judged=chosen.images), SEEDS[: chosen.seeds])
        return records, transfer.table(records)
    subject = subject_of(chosen.checkpoint)
    size = (chosen.images, SEEDS[: chosen.seeds])
    album = chosen.into.parent / "images" if chosen.into else chosen.output
    if name == "decomposition":
        parts = decomposition.Decomposition(subject, chosen.output, *size)
        records = parts.run()
        pictures.draw_decomposition(parts, records, album)
        return records, decomposition.table(records)
    sizes = anysize.AnySize(subject, chosen.output, *size)
    records = sizes.run(METHODS[name])
    pictures.draw_anysize(sizes, records, album)
    return records, anysize.table(records)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/results", description=HELP, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "name", choices=["decomposition", *METHODS, "trainings", "transfer", "trials", "twin", "shipped"]
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--checkpoint", default=DEFAULT_MODEL, help="a folder, or a shipped model's name")
    parser.add_argument("--images", type=int, default=1000, help="images of a run")
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), default=len(SEEDS))
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="put the table into this document, and pictures beside it"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    try:
        records, table = study(chosen.name, chosen)
        if chosen.into:
            insert(chosen.into, chosen.name.split("-")[0], table)
    except KindEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps({"rows": records}) if chosen.json else table)
    return 0


def insert(document: Path, name: str, table: str) -> None:
    """Put the table in the place of what stands between the two marks of this study in a document."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    text = document.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise UsageError(f"--into {document}: it has no lines {begin.strip()} and {end} to put the table between")
    write_whole(document, f"{before}{begin}\n{table}\n\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
