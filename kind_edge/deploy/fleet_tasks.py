"""What the parts of a fleet export tell one another: the jobs, the tasks of a worker, and its answers. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kind_edge import errors
from kind_edge.errors import KindEdgeError

if TYPE_CHECKING:
    from kind_edge.budget.plan import Plan
    from kind_edge.deploy.made import Made, Measured
    from kind_edge.deploy.signing import SigningKey


@dataclass(frozen=True)
class Order:
    """What is asked for all bundles alike; `choices` are those of a plan, but for the classes."""

    model: str
    formats: tuple[str, ...]
    choices: Mapping[str, Any]
    format_choices: Mapping[str, Mapping[str, Any]]
    autoencoder: str | None = None
    heal: str | None = None
    keep_failed: bool = False
    sign: SigningKey | None = None


@dataclass(frozen=True)
class Job:
    """One bundle. `name` is its path in the output: PROFILE or PROFILE/SET; `classes` None: all of the model's."""

    name: str
    profile: str
    set_name: str | None
    classes: tuple[str, ...] | None
    destination: Path


@dataclass(frozen=True)
class Opened:
    """What is known of a model once a worker has read it; `fingerprint` says what plans and files depend on."""

    name: str
    class_names: tuple[str, ...]
    fingerprint: Mapping[str, str | None]
    measured: bool


@dataclass(frozen=True)
class Failure:
    """An error on its way from one process to another."""

    kind: str
    message: str
    exit_code: int
    details: str = ""

    def error(self) -> KindEdgeError:
        """The error that it was; what was no error of ours is a bug."""
        kind = getattr(errors, self.kind, None)
        if isinstance(kind, type) and issubclass(kind, KindEdgeError):
            return kind(self.message)
        return KindEdgeError(f"{self.kind}: {self.message}")


@dataclass(frozen=True)
class Open:
    """Read the model -> Opened."""


@dataclass(frozen=True)
class MeasureSensitivity:
    """Measure what plans need to know of the model, and keep it -> None."""


@dataclass(frozen=True)
class MakePlans:
    """Plan jobs of the same classes, each with so many spare bytes -> a Plan or a Failure for each."""

    jobs: tuple[Job, ...]
    spare_bytes: tuple[int, ...]


@dataclass(frozen=True)
class MakeFiles:
    """Make, prove and draw a plan's model files in `folder` -> Made. The first bundle of them is at `destination`."""

    plan: Plan
    folder: Path
    name: str
    destination: Path


@dataclass(frozen=True)
class Finish:
    """Write the bundle of a job from the files in `folder` -> None."""

    job: Job
    plan: Plan
    folder: Path
    made: Made
    measured: Measured


Task = Open | MeasureSensitivity | MakePlans | MakeFiles | Finish

_ONLY_TOLD = (
    "profile", "peak_memory_bytes", "evaluation_latency_s", "image_latency_s", "sustained_image_latency_s",
    "predicted_loss_increase", "predicted_frechet", "limits", "binding", "prices", "optimality_gap", "dense", "time",
    "teacher_time", "minimised", "latency_source", "burst", "coreml",
)  # fmt: skip
"""Fields of a plan that no model file depends on."""


def artefact_key(plan: Plan) -> str:
    """The same for plans that make the same of a model. A field that is not known here keeps plans apart."""
    values = {name: value for name, value in plan.to_dict().items() if name not in _ONLY_TOLD}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
