"""What README.md and docs show is true of this tree: commands parse, cheap ones run, code compiles, links resolve.

A small model stands in for the shipped one, as a folder of its name in the working folder does for anybody; the folders
that long commands (`train`, `export`, ...) would make are copies of it, or of a bundle of it.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from kind_edge.budget.profile_file import parse_profile
from kind_edge.cli import main
from kind_edge.cli.app import app
from kind_edge.cli.options import known_profile, split_names
from kind_edge.cli.run import split_verbosity
from kind_edge.registry import FORMATS
from kind_edge.training.config import TrainConfig
from kind_edge.training.data import CLASS_NAMES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MADE_FROM_THE_CODE = ROOT / "docs" / "cli.md"
SHELLS = ("console", "sh")
CHEAP = ("generate", "inspect", "pack", "plan", "report", "verify")
"""But for a whole front, which is many plans."""
CHECKPOINTS, BUNDLES = ("adapt", "distill", "import", "resize", "train"), ("export",)
SHIPPED = ("fashion-mnist", "fashion-mnist-teacher")
OTHERS_OPTIONS = {"--json", "--help", "--threads", "--units", "--runs", "--checkpoint", "--into", "--images"}
"""Of the scripts and of files that are run elsewhere."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
_LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.M)
_OPTION = re.compile(r"`(--[a-z][a-z-]*)")
_PAGE = re.compile(r"docs/[a-z-]+\.md")


@dataclass(frozen=True)
class Command:
    """One command line of a page, without its prompt and its comment."""

    page: str
    words: tuple[str, ...]

    @property
    def of_ours(self) -> bool:
        return self.words[0] in ("kind-edge", "scripts/kind-edge")

    @property
    def verb(self) -> str:
        return self.words[1]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in _FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def lines_of(page: Path) -> Iterator[str]:
    """Of console blocks what stands behind the prompt, of other shell blocks all, and what is indented as code."""
    for language, body in _FENCE.findall(page.read_text(encoding="utf-8")):
        joined = body.replace("\\\n", " ")
        if language in SHELLS:
            yield from (line.removeprefix("$ ") for line in joined.splitlines() if line[:2] == "$ " or language == "sh")
    outside = _FENCE.sub("", page.read_text(encoding="utf-8"))
    yield from (line.strip() for line in outside.splitlines() if re.match(r" {4}(scripts/)?(kind-edge|results) ", line))


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for line in () if page == MADE_FROM_THE_CODE else lines_of(page):
            words = shlex.split(line, comments=True)
            if "kind_edge.cli" in words or words[:3] == ["optimum-cli", "export", "kind-edge"]:  # in another's clothes
                words = (
                    ["kind-edge", *words[words.index("kind_edge.cli") + 1 :]]
                    if "kind_edge.cli" in words
                    else ["kind-edge", "export", *words[3:]]
                )
            if words:
                found.append(Command(page.relative_to(ROOT).as_posix(), tuple(words)))
    return found


OURS = [command for command in commands() if command.of_ours]


def parse(command: Command) -> tuple[str, dict[str, Any]]:
    """The verb's full name and its parameters, as typer reads them; unknown verbs, options and values raise."""
    parser, words = typer.main.get_command(app), split_verbosity(command.words[1:])[1]
    names = []
    while hasattr(parser, "commands") and words and words[0] != "--help":
        name, *words = words
        assert name in parser.commands, f"{command}: no verb {name}"
        parser, names = parser.commands[name], [*names, name]
    if words == ["--help"]:
        return " ".join(names), {}
    return " ".join(names), parser.make_context(" ".join(names), words).params


def test_the_pages_have_commands() -> None:
    assert len(OURS) > 50
    assert {command.page for command in OURS} > {"README.md", "docs/plan.md"}


@pytest.mark.parametrize("page", sorted({command.page for command in OURS}))
def test_every_command_line_is_one_that_the_program_takes(page: str) -> None:
    for command in (each for each in OURS if each.page == page):
        verb, values = parse(command)
        for name in split_names(values.get("profiles")) or []:
            known_profile(name)
        assert set(split_names(values.get("formats")) or ()) <= set(FORMATS), command
        if values.get("checkpoint") in SHIPPED and verb in ("plan", "export"):
            assert set(split_names(values.get("classes")) or ()) <= set(CLASS_NAMES), command


def test_every_script_is_there_and_studies_have_the_names_that_are_given() -> None:
    studies = importlib.import_module("studies.__main__")
    for command in commands():
        if command.words[0].startswith(("scripts/", ".ci/")):
            assert (ROOT / command.words[0]).is_file(), command
        if command.words[0] == "scripts/results":
            chosen = studies.parse(list(command.words[1:]))
            assert set(chosen.blocks) <= {block.name for block in studies.BLOCKS}, command


# --- what is cheap is run ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(make_checkpoint_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small distilled model with the shipped one's classes, in a folder of its name."""
    folder = tmp_path_factory.mktemp("model") / "fashion-mnist"
    return make_checkpoint_folder(
        folder, num_classes=10, step_counts=(1, 2, 4), inside_guidance=1.75, depth=1, width=8, learngene_rank=3
    )


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's export with packs makes of that model."""
    place = tmp_path_factory.mktemp("bundle")
    (words,) = (each.words for each in OURS if each.page == "README.md" and "packs" in each.words)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(model.parent)
        assert main([*words[1 : words.index("-o")], "-o", str(place / "all")]) == 0
    return place / "all"


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(model, tmp_path / "fashion-mnist")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made_by(command: Command, values: dict[str, Any], model: Path, bundle: Path) -> bool:
    """Put something like it where a long command would leave what it makes; whether it is such a command."""
    output = values.get("output")
    if command.verb in (*CHECKPOINTS, *BUNDLES) and output is not None and not Path(output).exists():
        given = Path(str(values.get("checkpoint")))
        shutil.copytree((given if given.exists() else model) if command.verb in CHECKPOINTS else bundle, output)
        if command.verb == "adapt":  # its last classes stand for the new ones
            config = json.loads((Path(output) / "config.json").read_text())
            new = split_names(values["classes"]) or []
            config["class_names"][-len(new) :] = new
            (Path(output) / "config.json").write_text(json.dumps(config))
    return command.verb in (*CHECKPOINTS, *BUNDLES)


def is_ready(values: dict[str, Any]) -> bool:
    """Whether all that it reads is there: examples about other people's files are not run."""
    own = [values.get(name) for name in ("bundle", "checkpoint", "target", "autoencoder", "plan_file", "key")]
    files = [*own, *(values.get("packs") or ())]
    return all(name is None or Path(str(name)).exists() for name in files)


@pytest.mark.parametrize("page", sorted({command.page for command in OURS if command.page != "docs/tutorial.md"}))
def test_cheap_commands_do_what_they_are_shown_to_do(
    page: str, model: Path, bundle: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left, others = [], {command.words for command in OURS if command.page < page}  # README.md is before docs/
    for command in (each for each in OURS if each.page == page):
        _, values = parse(command)
        if made_by(command, values, model, bundle) or command.words in others:
            continue
        if command.verb not in CHEAP or "--pareto" in command.words:
            continue
        if not is_ready(values):
            left.append(command)
            continue
        assert main(list(command.words[1:])) == 0, f"{command}\n{capsys.readouterr().err}"
    assert page != "README.md" or not left


def test_the_readme_in_python_does_what_it_says(place: Path) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    values: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), values)
    assert values["images"].shape == (4, 8, 8, 1)
    assert Path(place, "out", "manifest.json").is_file()


# --- what is written in other languages -------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_code(page: Path) -> None:
    for body in blocks(page, "python"):
        compile(body, page.name, "exec")
        for name in re.findall(r"\b(?:ke|kind_edge)\.(\w+)\(", body):
            assert hasattr(importlib.import_module("kind_edge"), name), f"{page.name}: kind_edge.{name}"
    for body in blocks(page, "toml"):
        values = tomllib.loads(body)
        if "model" in values:
            TrainConfig.from_dict(values, page.name)
        if "memory" in values:
            parse_profile(body, "board", page.name)
    for body in blocks(page, "json"):
        json.loads(body)


# --- links ------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What the headings of a page are reached by: lower case, no punctuation, hyphens for spaces."""
    headings = _HEADING.findall(_FENCE.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_index_and_begins_with_its_title() -> None:
    linked = set(_LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8")))
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name in linked or page.name == "README.md", f"docs/README.md does not lead to {page.name}"
        text = page.read_text(encoding="utf-8")
        assert text.startswith("# "), page.name
        titles = re.findall(r"^# .*$", _FENCE.sub("", text), re.M)
        assert len(titles) == 1, f"{page.name}: {titles}"


def test_pages_that_the_code_names_are_there() -> None:
    for folder in ("kind_edge", "exporters", "scripts", "profiles"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".js", ".kt", ".md", ".toml", ".html") and "node_modules" not in path.parts:
                for page in _PAGE.findall(path.read_text(encoding="utf-8")):
                    assert (ROOT / page).is_file(), f"{path.relative_to(ROOT)}: {page}"


def options(command: Any) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    for child in getattr(command, "commands", {}).values():
        yield from options(child)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_are_spoken_of_exist(page: Path) -> None:
    known = {*options(typer.main.get_command(app)), *OTHERS_OPTIONS}
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    assert not [option for option in _OPTION.findall(text) if option not in known]


# --- the map of the house ---------------------------------------------------------------------------------------------


def test_contributing_names_every_folder_and_every_block() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    packages = [path.parent for path in (ROOT / "kind_edge").glob("*/__init__.py") if not path.parent.is_symlink()]
    folders = [*packages, ROOT / "exporters", ROOT / "profiles", ROOT / "tests", ROOT / "kind_edge" / "models"]
    folders += [path for path in (ROOT / "scripts").iterdir() if (path / "__init__.py").is_file()]
    missing = [name for folder in folders if f"`{(name := folder.relative_to(ROOT).as_posix())}" not in text]
    assert not missing
    studies = importlib.import_module("studies.__main__")
    shown = re.findall(r"^\| `([a-z]+)` \| (\S+) \|", text, re.M)
    assert shown == [(block.name, block.document) for block in studies.BLOCKS]
