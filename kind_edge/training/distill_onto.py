"""Tailors of later classes for a distilled model: it stays as it is, and new ones learn beside the old.

The teacher is one that was adapted to more classes than its student has. The run is an ordinary distillation of a
student that has the new classes alone: its shared weights are the old student's, frozen, and its tailors (with the
label rows, where the model has labels) start as the teacher's. At the end the new rows are put behind the old ones,
whose bytes are copied, so what is drawn of an old class is the same, bit for bit.

No walk has its gate closed: the learngene learns nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kind_edge.errors import UsageError
from kind_edge.model.checkpoint import Checkpoint, checkpoint_hash
from kind_edge.model.dit import DiT, initialise
from kind_edge.training.joined import join
from kind_edge.training.newcomers import LABELS


@dataclass(frozen=True)
class Onto:
    """A distilled model that gets the tailors of those classes of `teacher` which it has not; `teacher` has its own
    classes first, in the same order."""

    student: Checkpoint
    teacher: Checkpoint

    def __post_init__(self) -> None:
        old, spec = self.student, self.teacher.spec
        if not old.spec.distilled:
            raise UsageError(f"--onto {old.path}: not a distilled model; leave --onto out to make one")
        alike = dataclasses.replace(
            spec, num_classes=old.spec.num_classes, step_counts=old.spec.step_counts,
            inside_guidance=old.spec.inside_guidance,
        )  # fmt: skip
        if alike != old.spec:
            raise UsageError(
                f"--onto {old.path}: a model of another shape than {self.teacher.path}; give the one that was distilled"
                " before new classes came"
            )
        kept = len(old.class_names)
        if self.teacher.class_names[:kept] != old.class_names or not self.classes:
            raise UsageError(
                f"--onto {old.path}: {self.teacher.path} must have its classes ({', '.join(old.class_names)}) and new "
                f"ones after them; it has {', '.join(self.teacher.class_names)}: adapt the teacher of {old.path}"
            )

    @property
    def classes(self) -> tuple[str, ...]:
        """The new ones."""
        return self.teacher.class_names[len(self.student.class_names) :]

    def choices(self) -> dict[str, Any]:
        """What makes two runs the same, beside those of the distillation."""
        assert self.student.path is not None
        return {"onto_sha256": checkpoint_hash(self.student.path), "classes": list(self.classes)}

    def newcomers(self) -> Checkpoint:
        """The teacher, of the new classes alone."""
        first, tensors = len(self.student.class_names), {}
        for name, tensor in self.teacher.tensors.items():
            own = ".tailors." in name or name == LABELS  # the null label's row is the last, and stays
            tensors[name] = tensor[first:] if own else tensor
        spec = dataclasses.replace(self.teacher.spec, num_classes=len(self.classes))
        return Checkpoint(spec, self.classes, tensors, self.teacher.provenance, self.teacher.path)

    @torch.no_grad()
    def begin(self, seed: int) -> DiT:
        """The student of the new classes, all but their own frozen."""
        spec = dataclasses.replace(self.student.spec, num_classes=len(self.classes))
        model = initialise(DiT(spec), seed)
        shared = {n: t for n, t in self.student.float_tensors().items() if ".tailors." not in n and n != LABELS}
        own = {n: t for n, t in self.newcomers().float_tensors().items() if ".tailors." in n or n == LABELS}
        model.load_state_dict({**shared, **own})
        model.requires_grad_(False)
        if model.y_embed is not None:
            model.y_embed.weight.requires_grad_(True)  # `join` drops the null row, which lies in the same tensor
        return model

    def join(self, trained: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> Checkpoint:
        """The student's classes, whose bytes are its own, then the new ones."""
        return join(self.student, self.student.class_names, self.classes, trained, provenance)
