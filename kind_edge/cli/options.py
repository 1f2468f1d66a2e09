"""Options that several verbs share, and what is checked of them before anything heavy is loaded."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kind_edge.errors import UsageError, unknown
from kind_edge.registry import FORMATS
from kind_edge.units import Kind, parse_duration, parse_quantity, parse_share

if TYPE_CHECKING:
    from kind_edge.deploy.signing import SigningKey

FormChoice = Literal["auto", "switch", "single", "union"]
PrecisionChoice = Literal["auto", "fp32", "fp16", "int8", "int8-qdq", "a16w8", "int8-weights", "int4"]
UnitChoice = Literal["auto", "cpu", "gpu", "npu"]
ModulationChoice = Literal["auto", "baked", "baked-fp16", "network"]
MinimizeChoice = Literal["size", "latency", "flops", "memory"]
SamplerChoice = Literal["euler", "heun", "dpmsolver++", "ddim"]

CoreMLTargetChoice = Literal["iOS16", "iOS17", "iOS18"]
CoreMLWeightsChoice = Literal["auto", "fp16", "int8", "int4", "palette4", "palette6", "palette8", "mixed"]
CoreMLLayoutChoice = Literal["auto", "tokens", "channels"]
CoreMLBatchChoice = Literal["fixed", "flexible"]

COREML = "Core ML packages (--formats coreml)"
_COREML_DEFAULTS = ("iOS18", "auto", "auto", "fixed", ())
CHOICES, LIMITS = "What to deploy", "Limits, each with a unit, or as a share of the dense fp32 model (40%)"
SHIPPED = "fashion-mnist"
PASSPHRASE = "KIND_EDGE_PASSPHRASE"


def split_names(text: str | None) -> list[str] | None:
    """ "a, b" -> ["a", "b"]."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def class_sets(texts: list[str] | None) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """["shoes=sneaker,sandal"] -> (("shoes", ("sneaker", "sandal")),)."""
    found = []
    for text in texts or []:
        name, equals, classes = text.partition("=")
        if not equals:
            raise UsageError(f"--coreml-function: got {text!r}, want a name and its classes: shoes=sneaker,sandal")
        found.append((name.strip(), tuple(split_names(classes) or ())))
    return tuple(found)


def known_formats(text: str) -> list[str]:
    """ "onnx, coreml" -> ["onnx", "coreml"]."""
    names = split_names(text) or []
    if not names:
        raise UsageError(f"--formats: none given; known: {', '.join(FORMATS)}")
    for name in names:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)
    return names


def coreml_choices(
    formats: Sequence[str], target: str, weights: str, layout: str, functions: list[str] | None, batch: str = "fixed"
) -> dict[str, Any]:
    """What the exporter of Core ML is to be told; `UsageError` where it is not among the formats."""
    asked = {
        "target": target,
        "weights": weights,
        "layout": layout,
        "batch": batch,
        "functions": class_sets(functions),
    }
    if "coreml" not in formats and tuple(asked.values()) != _COREML_DEFAULTS:
        raise UsageError("--coreml-...: no Core ML packages are written; add coreml to --formats, or leave that out")
    return asked


def coreml_words(choices: Mapping[str, Any]) -> list[str]:
    """`coreml_choices` as they are asked for."""
    words: list[str] = []
    for (name, value), default in zip(choices.items(), _COREML_DEFAULTS, strict=True):
        if name == "functions":
            for function, classes in value:
                words += ["--coreml-function", f"{function}={','.join(classes)}"]
        elif value != default:
            words += [f"--coreml-{name}", value]
    return words


def known_profile(text: str | None) -> str | None:
    """Refuse an unknown name at once; files and figures are read later."""
    from kind_edge.budget.profile import OWN_DEVICE

    if text is not None and not (text.endswith(".toml") or "/" in text) and text not in packaged_profiles():
        raise unknown("profile", text, packaged_profiles(), OWN_DEVICE)
    return text


def packaged_profiles() -> tuple[str, ...]:
    """Names of devices that need no file."""
    from kind_edge.budget.profile import profile_names

    return profile_names()


def _limit(flag: str, kind: Kind | Literal["share"]) -> Callable[[str | None], str | None]:
    """Refuse what is no quantity at once."""

    def check(text: str | None) -> str | None:
        if text is not None:
            parse_share(text, flag) if kind == "share" else parse_quantity(text, kind, flag=flag)
        return text

    return check


def duration(flag: str) -> Callable[[str | None], str | None]:
    """Refuse what is no time at once."""

    def check(text: str | None) -> str | None:
        if text is not None:
            parse_duration(text, flag)
        return text

    return check


Sign = Annotated[
    Path | None,
    typer.Option(
        "--sign",
        metavar="KEY.pem",
        help=f"Sign the manifest with a private Ed25519 key (openssl genpkey -algorithm ed25519); {PASSPHRASE} has its "
        "passphrase, or it is asked for.",
    ),
]


def signing_key(path: Path | None) -> SigningKey | None:
    """The key of --sign, read before any work."""
    if path is None:
        return None
    from kind_edge.deploy.signing import read_signing_key

    return read_signing_key(path, lambda: _passphrase(path))


def _passphrase(path: Path) -> str:
    if (given := os.environ.get(PASSPHRASE)) is not None:
        return given
    if not sys.stdin.isatty():
        raise UsageError(f"--sign {path}: the key has a passphrase; put it into {PASSPHRASE}, or use a terminal")
    import getpass

    return getpass.getpass(f"Passphrase of {path}: ")


def check_writable(path: Path) -> None:
    """Whether something can be made at `path`, missing parents included; `UsageError` names what is in the way."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if place == path.absolute() and place.is_file():
        place = place.parent  # the file itself will be replaced
    if not place.is_dir():
        raise UsageError(f"-o {path}: {place} is not a folder; choose another place")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UsageError(f"-o {path}: cannot write in {place}: {error.strerror}; choose another place") from error


Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder, or the name of a shipped model.")
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME|FILE",
        callback=known_profile,
        help="The device: a name from kind-edge profiles list, or a TOML file.",
    ),
]
Classes = Annotated[
    str | None,
    typer.Option("--classes", metavar="A,B", help="The classes to keep, in this order.", rich_help_panel=CHOICES),
]
Form = Annotated[
    FormChoice, typer.Option("--form", help="How classes are combined in one model.", rich_help_panel=CHOICES)
]
Precision = Annotated[PrecisionChoice, typer.Option("--precision", help="Of the weights.", rich_help_panel=CHOICES)]
Unit = Annotated[UnitChoice, typer.Option("--unit", help="The compute unit of the device.", rich_help_panel=CHOICES)]
Modulation = Annotated[
    ModulationChoice,
    typer.Option(
        "--modulation",
        help="A table of what each step (and class) does, or the networks that it comes from.",
        rich_help_panel=CHOICES,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", min=1, metavar="N", help="Sampling steps of an image.", rich_help_panel=CHOICES),
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", metavar="W", help="Guidance weight; 1 is none.", rich_help_panel=CHOICES),
]
Sampler = Annotated[SamplerChoice | None, typer.Option("--sampler", help="The sampler.", rich_help_panel=CHOICES)]
Autoencoder = Annotated[
    str | None,
    typer.Option(
        "--autoencoder",
        metavar="DIR",
        help="Of a latent model: the autoencoder (diffusers) whose decoder makes the pictures.",
        rich_help_panel=CHOICES,
    ),
]
MaxLatency = Annotated[
    str | None,
    typer.Option(
        "--max-latency",
        metavar="4s",
        callback=_limit("--max-latency", "seconds"),
        help="One image, sustained.",
        rich_help_panel=LIMITS,
    ),
]
Burst = Annotated[
    bool,
    typer.Option("--burst", help="Limit latency as it is at first, not after minutes of load.", rich_help_panel=LIMITS),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="300MiB",
        callback=_limit("--max-memory", "bytes"),
        help="Predicted peak memory.",
        rich_help_panel=LIMITS,
    ),
]
MaxFlops = Annotated[
    str | None,
    typer.Option(
        "--max-flops",
        metavar="13.2GFLOPs",
        callback=_limit("--max-flops", "flops"),
        help="One evaluation at batch 1.",
        rich_help_panel=LIMITS,
    ),
]
MaxSize = Annotated[
    str | None,
    typer.Option(
        "--max-size",
        metavar="5MiB",
        callback=_limit("--max-size", "bytes"),
        help="The model file that an app loads.",
        rich_help_panel=LIMITS,
    ),
]
MaxQualityLoss = Annotated[
    str | None,
    typer.Option(
        "--max-quality-loss",
        metavar="2%",
        callback=_limit("--max-quality-loss", "share"),
        help="The smallest model whose predicted loss rises by at most so much.",
        rich_help_panel=LIMITS,
    ),
]
Minimize = Annotated[
    MinimizeChoice | None,
    typer.Option("--minimize", help="What smallest means: size by default.", rich_help_panel=LIMITS),
]
Formats = Annotated[
    str,
    typer.Option("--formats", metavar="|".join(FORMATS), help="What to write beside onnx, comma separated."),
]
CoreMLTarget = Annotated[
    CoreMLTargetChoice,
    typer.Option("--coreml-target", help="The oldest system that runs the packages.", rich_help_panel=COREML),
]
CoreMLWeights = Annotated[
    CoreMLWeightsChoice,
    typer.Option("--coreml-weights", help="How weights are stored; auto: as --precision.", rich_help_panel=COREML),
]
CoreMLLayout = Annotated[
    CoreMLLayoutChoice,
    typer.Option(
        "--coreml-layout",
        help="channels is for the Neural Engine; auto takes it for plans of the NPU.",
        rich_help_panel=COREML,
    ),
]
CoreMLBatch = Annotated[
    CoreMLBatchChoice,
    typer.Option(
        "--coreml-batch", help="Batches of 1 and 2, or any up to 64 (no Neural Engine).", rich_help_panel=COREML
    ),
]
CoreMLFunction = Annotated[
    list[str] | None,
    typer.Option(
        "--coreml-function",
        metavar="NAME=A,B",
        help="A class pack as a function of its own in the same package; may be repeated. Needs iOS18.",
        rich_help_panel=COREML,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
