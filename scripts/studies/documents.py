"""What documents say of the shipped model: written between marks by studies, and checked against model and runs.

A block lies between `<!-- NAME: begin, model HASH -->` and `<!-- NAME: end -->`; HASH is the first 12 digits of the
checkpoint's, as `kind-edge export` prints it. A picture carries the same hash as PNG text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from kind_edge.errors import InputError, UsageError
from kind_edge.model.checkpoint import load_checkpoint
from kind_edge.training.sampled import Sampling, sampling_of
from studies.store import Record, Subject, read_record, write_whole

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PICTURES = Path("docs/results"), Path("docs/images")
STUDIES = Path("docs/studies")
"""Finished runs of studies that train models of their own."""
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/*.md")
REMEDY = "scripts/results publish"
HASH_DIGITS = 12

_BLOCK = re.compile(
    r"<!-- (?P<name>[a-z]+): begin(?:, model (?P<model>[0-9a-f]{12}))? -->\n(?P<body>.*?)<!-- (?P=name): end -->", re.S
)
_MARK = re.compile(r"<!-- [a-z]+: (?:begin|end)")
_PICTURE = re.compile(r"\((?:docs/)?images/([^)]+)\)")


@dataclass(frozen=True)
class Block:
    """What one study writes into one document: `text` of its runs, which lie in RESULTS/name (unless it has none).

    `images` and `seeds` are how much it draws; its pictures go into the folder `album` beside the document. A block
    with `of` measures nothing: it says something else of the runs of that study, and is written anew with it.
    `of_shipped`: whether it is of the shipped model; else its runs lie in STUDIES/name, and its mark names no model.
    """

    name: str
    document: str
    text: Callable[[Sequence[Record]], str]
    images: int = 1000
    seeds: int = 3
    has_runs: bool = True
    album: str = "images"
    of: str | None = None
    of_shipped: bool = True

    @property
    def study(self) -> str:
        return self.of or self.name

    @property
    def runs(self) -> Path:
        return (RESULTS if self.of_shipped else STUDIES) / self.study


@dataclass(frozen=True)
class Written:
    """A block as it stands in a document; `model` is None where the mark names none."""

    model: str | None
    body: str


def short(sha256: str) -> str:
    return sha256[:HASH_DIGITS]


def runs_of(root: Path, block: Block) -> list[Path]:
    """The files of the runs that a block rests on."""
    return sorted((root / block.runs).glob("*.json"))


def insert(document: Path, name: str, model_sha256: str | None, text: str) -> None:
    """Put `text` between the two marks of that name, in the place of what stands there, and a hash into the first."""
    if not document.is_file():
        raise UsageError(f"--into {document}: no such file")
    whole = document.read_text(encoding="utf-8")
    found = next((match for match in _BLOCK.finditer(whole) if match["name"] == name), None)
    if found is None:
        raise UsageError(
            f"--into {document}: it has no lines <!-- {name}: begin --> and <!-- {name}: end --> to put that between"
        )
    model = "" if model_sha256 is None else f", model {short(model_sha256)}"
    block = f"<!-- {name}: begin{model} -->\n\n{text}\n\n<!-- {name}: end -->"
    write_whole(document, whole[: found.start()] + block + whole[found.end() :])


def stamp(picture: Path, model_sha256: str) -> None:
    """Write the model's hash into a PNG."""
    with Image.open(picture) as image:
        image.load()
    text = PngInfo()
    text.add_text("model", short(model_sha256))
    temporary = picture.with_name(f".{picture.name}")
    image.save(temporary, format="PNG", optimize=True, pnginfo=text)
    temporary.replace(picture)


def as_recommended(record: Record, advice: Sampling) -> bool:
    """Whether a run of the model was drawn as it recommends, or so without guidance.

    `shipped`, `steps` and `peers` try all there is.
    """
    own = record["conditions"]
    if record["study"] in ("steps", "peers"):
        return True
    if record["study"] == "shipped":
        return bool(own.get("recommended", asdict(advice)) == asdict(advice))
    return "guidance" not in own or (
        (own["sampler"], own["steps"]) == (advice.sampler, advice.steps) and own["guidance"] in (1.0, advice.guidance)
    )


# --- are they still true? ---------------------------------------------------------------------------------------------


def check(root: Path, subject: Subject, blocks: Sequence[Block]) -> None:
    """Raise `InputError`, with all that is stale and what makes it anew, unless all is of the model `subject`."""
    advice = sampling_of(load_checkpoint(subject.folder))
    names: list[str] = []
    faults: list[str] = []
    found = {(path, name): block for path in _documents(root) for name, block in _written(root, path, faults)}
    for block in blocks:
        own = [*_block_faults(root, subject, advice, block, found.pop((block.document, block.name), None))]
        faults += [f"{block.document}: block {block.name} {fault}" for fault in own]
        names += [block.name] if own else []
    known = [block.name for block in blocks]
    studies = {block.study for block in blocks}
    faults += [f"{path}: block {name} is no study's; known: {', '.join(known)}" for path, name in found]
    runs = sorted((root / RESULTS).glob("*/*.json"))
    faults += [f"{path.relative_to(root)}: no block rests on it" for path in runs if path.parent.name not in studies]
    faults += _picture_faults(root, subject)
    if faults:
        heading = f"the documents are not what was measured of the shipped model, {short(subject.sha256)}:"
        raise InputError("\n".join([heading, *faults, f"make them anew with: {' '.join([REMEDY, *names])}"]))


def _documents(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]


def _written(root: Path, document: str, faults: list[str]) -> Iterator[tuple[str, Written]]:
    text = (root / document).read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    if len(_MARK.findall(text)) != 2 * len(found) or len({match["name"] for match in found}) != len(found):
        faults.append(f"{document}: a mark lacks its other end, or a block stands there twice")
    for match in found:
        yield match["name"], Written(match["model"], match["body"])


def _block_faults(
    root: Path, subject: Subject, advice: Sampling, block: Block, written: Written | None
) -> Iterator[str]:
    if written is None:
        yield "is not there"
        return
    if block.of_shipped and written.model is None:
        yield "does not say of which model it is"
    elif block.of_shipped and written.model != short(subject.sha256):
        yield f"is of model {written.model}"
    records = []
    for path in runs_of(root, block):
        try:
            record = read_record(path)
        except InputError as error:
            yield f"rests on {error}"
            continue
        records.append(record)
        if block.of_shipped:
            yield from _of_another(record, subject, advice, path.relative_to(root))
        if (record["study"], record["run"]) != (block.study, path.stem):
            yield f"rests on {path.relative_to(root)}, which calls itself {record['study']}/{record['run']}"
    if block.has_runs and not records:
        yield f"has no runs in {block.runs}"
    if (records or not block.has_runs) and written.body.strip() != block.text(records).strip():
        yield f"is not what the runs in {block.runs} say"


def _of_another(record: Record, subject: Subject, advice: Sampling, path: Path) -> Iterator[str]:
    if record["checkpoint"]["sha256"] not in subject.family:
        yield f"rests on {path}, of model {short(record['checkpoint']['sha256'])}"
    elif record["checkpoint"]["sha256"] == subject.sha256 and not as_recommended(record, advice):
        yield f"rests on {path}, which is not drawn as the checkpoint recommends"


def _picture_faults(root: Path, subject: Subject) -> Iterator[str]:
    shown = {
        name
        for path in _documents(root)
        for match in _BLOCK.finditer((root / path).read_text(encoding="utf-8"))
        for name in _PICTURE.findall(match["body"])
    }
    lying = {path.name for path in (root / PICTURES).iterdir()}
    yield from (f"{PICTURES / name}: not there, but a block shows it" for name in sorted(shown - lying))
    yield from (f"{PICTURES / name}: no block shows it, so no study makes it" for name in sorted(lying - shown))
    for name in sorted(lying):
        model = _model_of_picture(root / PICTURES / name)
        if model != short(subject.sha256):
            yield f"{PICTURES / name}: of model {model or 'unknown'}"


def _model_of_picture(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get("model")
    except (OSError, UnidentifiedImageError):
        return None
