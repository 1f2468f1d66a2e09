"""`scripts/results NAME -o FOLDER`: run what is not finished yet, then print what it says as markdown."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from peers import brief
from peers import measure as peers
from peers.text import text as peers_text

from kind_edge.errors import KindEdgeError, UsageError, unknown
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.model.shipped import DEFAULT_MODEL, find_model
from kind_edge.training.sampled import sampling_of
from studies import (
    anysize,
    claims,
    decomposition,
    exported,
    fine,
    healed,
    nesting,
    packages,
    pictures,
    precisions,
    prediction,
    resize,
    resize_text,
    response,
    shipped,
    steps,
    trainings,
    transfer,
    trials,
    uniform,
)
from studies.documents import RESULTS, ROOT, Block, as_recommended, check, insert, runs_of
from studies.statistics import SEEDS
from studies.store import Record, Store, Subject, read_record, records_in, subject_of

HELP = """publish        all that README.md and docs say of the shipped model, or only the BLOCKs that are named

Of the shipped model, or of --checkpoint; with --into FILE they go into a document:
classes        pictures of every class, from the same noises
export         what the README's first command prints
plan           what `kind-edge plan` prints of a limit that binds, and of one that nothing fits
cutting        two pairs of classes cut to 40 % of the size: what changes on held-out images, accuracy
coreml         Core ML packages: size and distance of every way to store weights
cost           scripts/bench costs: predicted and measured time, size and memory
peers          scripts/bench peers: other engines with a dense twin of the model beside our artefacts
shipped        the judge over strengths of guidance (distilled: numbers of steps), and 10,000 images at the recommended
steps          a distilled model at each of its step counts beside its guided teacher, through ONNX Runtime
precisions     the model's file in every precision: size, parity, PSNR, Fréchet distance and accuracy of its images
nesting        cuts of the learngene alone, without retraining: the model and its teacher
heal           the cut to 20 % of the dense FLOPs, and what five minutes of healing give back
prediction     random plans of equal FLOPs, the model's and its teacher's: predicted against measured loss; whitening
response       judges cut plans and fits the Fréchet distance to the predicted loss, into sensitivity.json
uniform        the solver's plans against one rank for all matrices at equal FLOPs: loss and Fréchet distance
decomposition  is the learngene classless, and does a tailor draw its own class alone?
anysize        what a smaller model costs, without retraining: whitened, plain and planned truncation
anysize-heal   the same after 300 steps of training on (trains four times a seed)
anysize-dense  ordinary DiTs of equal FLOPs, trained from scratch on as many images as the model (hours to days)

From runs of its own:
fine           scripts/results fine -o FOLDER: models whose blocks have factors in common beside ordinary ones, by files
               of equal Fréchet distance (an hour a seed); publish reads the runs in docs/studies/fine
resize         -o FOLDER: models of other sizes, begun from a trained one and from scratch (hours); publish reads
               the runs in docs/studies/resize

Beside it:
recommend      settles the guidance of --checkpoint by the judge, and writes it and its quality into config.json
trainings      trains the study presets with three seeds each; decomposition and anysize of every model (hours)
transfer       new classes and a new domain: tailors against LoRA, full fine-tuning and from scratch (an hour a seed)
trials         trains the four short runs (KIND, dense, with label embedding, epsilon) into FOLDER and judges each
twin           trains the dense transformer of the preset fashion-mnist's shape on as many images (1.5 hours)

A finished run's figures lie in FOLDER/STUDY/RUN.json and are never computed again; stopped runs go on. `publish` keeps
them in docs/results, which is of the shipped model, drawn as it recommends: what else lies there is removed."""

BLOCKS = (
    Block("classes", "README.md", lambda _: "![Ten classes drawn by the shipped model](docs/images/classes.png)",
          has_runs=False, album="docs/images"),
    Block("export", "README.md", exported.listing_text),
    Block("plan", "docs/plan.md", exported.planned_text),
    Block("refusal", "docs/plan.md", exported.refused_text, of="plan"),
    Block("cutting", "docs/results.md", exported.cutting_text),
    Block("cost", "docs/results.md", exported.cost_text),
    Block("coreml", "docs/coreml.md", packages.text),
    Block("peers", "docs/benchmarks.md", peers_text),
    Block("measured", "README.md", brief.readme_text, of="peers"),
    Block("compare", "docs/compare.md", brief.compare_text, of="peers"),
    Block("shipped", "docs/results.md", shipped.text),
    Block("steps", "docs/distillation.md", steps.text, images=steps.IMAGES, seeds=1),
    Block("precisions", "docs/precision.md", precisions.text, images=precisions.IMAGES, seeds=1),
    Block("nesting", "docs/results.md", nesting.text, images=2000, seeds=1),
    Block("heal", "docs/healing.md", healed.text, seeds=1),
    Block("prediction", "docs/solver.md", prediction.text),
    Block("response", "docs/solver.md", response.text),
    Block("uniform", "docs/solver.md", uniform.text),
    Block("decomposition", "docs/claims.md", claims.decomposition_text),
    Block("anysize", "docs/claims.md", claims.anysize_text, images=500, seeds=1),
    Block("fine", "docs/fine.md", fine.text, of_shipped=False),
    Block("resize", "docs/results.md", resize_text.text, album="studies/resize", of_shipped=False),
)  # fmt: skip
"""All that is said of the shipped model, and what stands in STUDIES; quick ones first, and what is timed before the
machine gets warm."""

METHODS = {
    "anysize": ("whitened", "plain", "planned"),
    "anysize-heal": ("healed",),
    "anysize-dense": ("dense",),
}
_OF_MODELS = (block.name for block in BLOCKS if block.of_shipped and not block.of)
ABOUT_A_MODEL = (*_OF_MODELS, "anysize-heal", "anysize-dense")
OTHERS = ("fine", "resize", "trainings", "transfer", "trials", "twin")


@dataclass(frozen=True)
class Job:
    """What a study is of, where its runs lie and its pictures go, and how much it draws."""

    subject: Subject
    output: Path
    album: Path
    images: int
    seeds: Sequence[int]


def block_of(name: str) -> Block:
    """Where a study of one model writes; the three about sizes share one."""
    return next(block for block in BLOCKS if block.name == name.split("-")[0])


def measure(name: str, job: Job) -> list[Record]:
    """Run a study of one model, and draw its pictures."""
    size = (job.subject, job.output, job.images, job.seeds)
    if name == "fine":
        return records_in(job.output, fine.NAME)
    if name == "resize":
        records = records_in(job.output, resize.NAME)
        resize_text.draw(records, job.album / "loss.png")
        return records
    if name == "classes":
        pictures.draw_classes(job.subject, job.album)
        return []
    if name == "decomposition":
        parts = decomposition.Decomposition(*size)
        records = parts.run()
        pictures.draw_decomposition(parts, records, job.album)
        return records
    if name == "steps":
        return steps.run(job.subject, job.output, job.images)
    if name == "precisions":
        return precisions.run(job.subject, job.output, job.images)
    if name == "nesting":
        return nesting.run(job.subject, job.output, job.images)
    if name == "heal":
        return healed.run(job.subject, job.output, job.images)
    if name in METHODS:
        sizes = anysize.AnySize(*size)
        records = sizes.run(METHODS[name])
        pictures.draw_anysize(sizes, records, job.album)
        return records
    studies = {
        "export": exported.listing, "plan": exported.planned, "cutting": exported.cutting, "cost": exported.cost,
        "coreml": packages.run,
        "peers": peers.publish,
        "shipped": shipped.run, "prediction": prediction.run, "response": response.publish, "uniform": uniform.run,
    }  # fmt: skip
    return studies[name](job.subject, job.output)


def make_way(study: str, subject: Subject, output: Path) -> None:
    """docs/results is of the shipped model, drawn as it recommends: other runs there go when their study runs anew."""
    shipped_model = subject.folder == find_model(DEFAULT_MODEL)
    if shipped_model and output.resolve() == ROOT / RESULTS:
        advice = sampling_of(load_checkpoint(subject.folder))
        Store(output, study, subject).forget(
            lambda record: record["checkpoint"]["sha256"] != subject.sha256 or as_recommended(record, advice)
        )


def publish(names: Sequence[str]) -> None:
    """Make blocks of the shipped model anew, one after the other, each put into its document when it is done."""
    known = [block.name for block in BLOCKS]
    for name in names:
        if name not in known:
            raise unknown("block", name, known)
    subject = subject_of(DEFAULT_MODEL)
    for block in [block for block in BLOCKS if not names or {block.name, block.study} & set(names)]:
        began, document = time.monotonic(), ROOT / block.document
        sha256 = subject.sha256 if block.of_shipped else None
        if block.of:
            records = [read_record(path) for path in runs_of(ROOT, block)]
        else:
            if block.of_shipped:
                make_way(block.name, subject, ROOT / RESULTS)
            runs = ROOT / block.runs.parent
            job = Job(subject, runs, document.parent / block.album, block.images, SEEDS[: block.seeds])
            records = measure(block.name, job)
        insert(document, block.name, sha256, block.text(records))
        print(f"{block.document}: {block.name} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    if not names:
        check(ROOT, subject, BLOCKS)


def beside(name: str, chosen: argparse.Namespace) -> tuple[list[Record], str]:
    """Studies that train models of their own."""
    seeds, images = SEEDS[: chosen.seeds], chosen.images or 1000
    if name == "trainings":
        trained = trainings.run(chosen.output, images, seeds)
        trainings.draw(trained, chosen.output)
        return [record for own in trained.values() for record in own], trainings.table(trained)
    if name == "fine":
        records = fine.run_study(chosen.output, chosen.images or fine.IMAGES, seeds)
        return records, fine.text(records)
    if name == "resize":
        records = resize.run_study(chosen.output, chosen.images or resize.JUDGED_IMAGES, seeds)
        resize_text.draw(records, chosen.output / "loss.png")
        return records, resize_text.text(records)
    if name == "transfer":
        records = transfer.study(chosen.output, transfer.Size(judged=images), seeds)
        return records, transfer.table(records)
    rows = {"trials": trials.trials, "twin": trials.twin}[name](chosen.output)
    return rows, trials.table(rows)


def run(chosen: argparse.Namespace) -> None:
    if chosen.blocks and chosen.name != "publish":
        raise UsageError(f"{' '.join(chosen.blocks)}: only publish takes names of blocks")
    if chosen.into and chosen.name not in ABOUT_A_MODEL:
        raise UsageError(f"--into: {chosen.name} has no block in a document; leave it out")
    if chosen.name == "publish":
        if chosen.into or chosen.checkpoint != DEFAULT_MODEL:
            raise UsageError("publish is of the shipped model, into README.md and docs; it takes nothing but blocks")
        publish(chosen.blocks)
        return
    if chosen.name in OTHERS:
        records, text = beside(chosen.name, chosen)
    elif chosen.name == "recommend":
        subject = subject_of(chosen.checkpoint)
        make_way(shipped.NAME, subject, chosen.output)
        records = shipped.recommend(subject, chosen.output)
        text = shipped.text(records)
    else:
        block = block_of(chosen.name)
        album = chosen.into.parent / block.album if chosen.into else chosen.output
        size = (chosen.images or block.images, SEEDS[: chosen.seeds or block.seeds])
        job = Job(subject_of(chosen.checkpoint), chosen.output, album, *size)
        make_way(block.name, job.subject, job.output)
        records = measure(chosen.name, job)
        text = block.text(records)
        if chosen.into:
            insert(chosen.into, block.name, job.subject.sha256, text)
    print(json.dumps({"rows": records}) if chosen.json else text)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/results", description=HELP, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=["publish", *ABOUT_A_MODEL, "recommend", *OTHERS], metavar="NAME")
    parser.add_argument("blocks", nargs="*", metavar="BLOCK", help=f"of publish: {', '.join(b.name for b in BLOCKS)}")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs"), help="where runs are kept")
    parser.add_argument("--checkpoint", default=DEFAULT_MODEL, help="a folder, or a shipped model's name")
    parser.add_argument("--images", type=int, help="of a run; 1000, nesting, precisions 2000, anysize 500, steps 5000")
    parser.add_argument("--seeds", type=int, choices=range(1, len(SEEDS) + 1), help="3, anysize 1")
    parser.add_argument(
        "--into", type=Path, metavar="FILE", help="put it into this document, and pictures into images/ beside it"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse(arguments))
    except KindEdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
