"""What can be asked of Core ML packages, and what of it no target has: checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from kind_edge.budget.coreml_weights import Target, Weights
from kind_edge.errors import UsageError, unknown

Batch = Literal["fixed", "flexible"]
LARGEST_BATCH = 64

MAIN = "main"
"""The function of all classes of the bundle, which is also the default."""

Functions = tuple[tuple[str, tuple[str, ...]], ...]
"""Names of functions with the names of their classes, in their own order."""


def check_functions(functions: Functions, target: Target) -> None:
    """`UsageError` for what no package can have, before any work."""
    names = [name for name, _ in functions]
    if functions and target != "iOS18":
        raise UsageError(f"--coreml-function --coreml-target {target}: several functions in one package need iOS18")
    for name, classes in functions:
        if not name.isidentifier() or name == MAIN or names.count(name) > 1:
            raise UsageError(
                f"--coreml-function {name}={','.join(classes)}: want a name of letters, digits and _, given once, "
                f"and not {MAIN}, which holds all classes"
            )
        if not classes or len(set(classes)) < len(classes):
            raise UsageError(f"--coreml-function {name}: got {', '.join(classes) or 'no class'}; want each class once")


def class_sets(functions: Functions, known: Sequence[str], null: bool) -> dict[str, tuple[int, ...]]:
    """By function the model's numbers of its classes; the null class, where there is one, comes last in each.

    An unknown class is refused with the nearest known ones.
    """
    for _, classes in functions:
        for name in classes:
            if name not in known:
                raise unknown("class", name, known)
    last = (len(known),) if null else ()
    return {name: (*map(list(known).index, classes), *last) for name, classes in functions}


def check_weights(weights: Weights, target: Target) -> None:
    """`UsageError` names the target that has what this one lacks."""
    if weights == "int4" and target != "iOS18":
        raise UsageError(
            f"--coreml-weights int4 --coreml-target {target}: blocks of 4 bits need iOS18; "
            "take --coreml-target iOS18, or palette4, which every target has"
        )


def batches(target: Target, batch: Batch, wanted: int) -> tuple[int, ...] | None:
    """The batch sizes that a package takes; None for any up to `LARGEST_BATCH`.

    Several inputs of several fixed shapes need iOS18; before, a package has the one batch that its loop needs (two
    where guidance asks for the class and the null class together). A range runs on the CPU and the GPU alone.
    """
    if batch == "flexible":
        return None
    return (1, 2) if target == "iOS18" else (wanted,)
