"""What Core ML packages of a plan would take: bytes from shapes, time from the profile's figures. Estimates, all of it.

A package holds every weight once, in its weight file, and a program that names every operator, constant and shape. What
an app loads (`KindEdge.swift` does) is the denoiser, and the decoder where there is one. Times are the roofline's, for
arithmetic in fp16 and weights that are widened to it: compression is counted for its bytes, not for speed.

Symbols: D width, K kept classes, n x m a matrix, r rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kind_edge.budget.coreml_weights import Layout, Shape, Target, Weights, entry_bytes, stored_bytes, weights_for
from kind_edge.budget.decoder import DecoderCost
from kind_edge.budget.deployed import baked_table_values
from kind_edge.budget.plan import MatrixPlan, dropped_branches, file_precision
from kind_edge.budget.precision import Unit
from kind_edge.budget.problem import Deployment
from kind_edge.budget.profile import DeviceProfile
from kind_edge.model.names import weight_type
from kind_edge.model.spec import FREQUENCY_WIDTH, MatrixShape, ModelSpec

MOST_UNROLLED = 8
"""A model that takes more steps has no `Sampler`: every one of them is written out in it."""

APP_ROLES = ("denoiser", "decoder")
"""The packages that an app needs; a sampler holds the denoiser once more."""

_PROVIDERS: Mapping[Unit, str] = {"npu": "coreml-ane", "gpu": "coreml-gpu"}
"""By unit, the execution provider through which Core ML reaches it."""

_PACKAGE_BYTES = 10_000
"""Descriptions, Manifest.json, first and last layer; measured on our own packages, as all of the following."""
_COMPRESSED_BYTES = 135
"""What the program has more of a weight that is compressed."""
_ROW_SHARE = 0.75
"""Of the denoiser's program, that one row of a sampler takes: of a known row less is left to be computed."""
_GATHER_BYTES = 1_000
"""Of what a tailor takes in *tokens*, the picking of both its factors."""
_DECODER_OPERATOR_BYTES = 500


@dataclass(frozen=True)
class _Program:
    """Bytes of the program by what they describe: operators with their constants, and the names of weights."""

    attention: int
    head: int
    mlp: int
    product: int
    tailor: int
    mask: int


_PROGRAMS: Mapping[Layout, _Program] = {
    "tokens": _Program(attention=4_450, head=0, mlp=2_500, product=570, tailor=2_940, mask=0),
    "channels": _Program(attention=5_000, head=1_700, mlp=3_300, product=1_120, tailor=250, mask=1_300),
}


@dataclass(frozen=True)
class Packaging:
    """How packages are made. `weights` "auto" is what the plan's precision is in Core ML, `layout` "auto" what its unit
    likes. `functions`: how many there are beside the one for all classes; each has a program of its own."""

    target: Target = "iOS18"
    weights: Weights | Literal["auto"] = "auto"
    layout: Layout | Literal["auto"] = "auto"
    functions: int = 0

    def weights_of(self, precision: str) -> Weights:
        return weights_for(precision, self.target) if self.weights == "auto" else self.weights

    def layout_on(self, unit: str) -> Layout:
        if self.layout == "auto":
            return "channels" if unit == "npu" else "tokens"
        return self.layout


def reached_units(providers: Sequence[str]) -> tuple[Unit, ...]:
    """The units that Core ML reaches on a device."""
    return tuple(unit for unit, provider in _PROVIDERS.items() if provider in providers)


def most_app_bytes(limits: Mapping[str, float], profile: DeviceProfile) -> dict[str, int]:
    """`limit_bytes`: the most that an app's model files may take, by a plan's limits and by the device's store; nothing
    where neither says."""
    said = [limits["max_size"]] if "max_size" in limits else []
    if profile.store is not None:
        said.append(profile.store.model_bytes.value)
    return {"limit_bytes": int(min(said))} if said else {}


def coreml_estimate(
    deployment: Deployment,
    matrices: Mapping[str, MatrixPlan],
    packaging: Packaging | None = None,
    limits: Mapping[str, float] | None = None,
) -> dict[str, int | float | str]:
    """What a plan with such `limits` says of its packages: how they are made, bytes of each, and seconds of an image by
    unit.

    `app_bytes` is what an app needs of them, `limit_bytes` the most that it may be. A unit without figures for fp16 has
    no time.
    """
    packaging = packaging or Packaging()
    candidate = deployment.candidate
    weights = packaging.weights_of(file_precision(matrices))
    layout = packaging.layout_on(candidate.unit)
    found: dict[str, int | float | str] = {
        "mark": "E", "target": packaging.target, "layout": layout, "weights": weights,
        **dict(_package_bytes(deployment, matrices, packaging, layout, weights)),
    }  # fmt: skip
    profile = deployment.request.profile
    found["app_bytes"] = sum(int(found.get(f"{role}_bytes", 0)) for role in APP_ROLES)
    found |= most_app_bytes(limits or {}, profile)
    halves = {
        name: each if each.gone else dataclasses.replace(each, precision="fp16") for name, each in matrices.items()
    }
    for unit in reached_units(profile.execution_providers):
        if unit in profile.units and profile.unit(unit).has("fp16"):
            there = dataclasses.replace(
                deployment, candidate=dataclasses.replace(candidate, precision="fp16", unit=unit)
            )
            found[f"{unit}_image_latency_s"] = there.image_latency_s(halves, sustained=False)
            found[f"{unit}_sustained_image_latency_s"] = there.image_latency_s(halves, sustained=True)
    return found


def _package_bytes(
    deployment: Deployment, matrices: Mapping[str, MatrixPlan], packaging: Packaging, layout: Layout, weights: Weights
) -> Iterator[tuple[str, int]]:
    """By package. A sampler has the denoiser's weights, and its program once for every row."""
    spec = deployment.spec.without_branches(dropped_branches(matrices))
    stored = list(_stored(deployment, spec, matrices, layout))
    weight_bytes = sum(stored_bytes(shape, weights if narrow else "fp16", packaging.target) for shape, narrow in stored)
    rows, products = deployment.request.sampling.evaluations, sum(narrow for _, narrow in stored)
    program = _program_bytes(spec, matrices, layout, products)
    compressed = products * _COMPRESSED_BYTES * (weights != "fp16")
    once = _gathered_bytes(spec, matrices, layout)  # a sampler picks its tailors once, for all rows
    programs = 1 + packaging.functions
    yield "denoiser_bytes", _PACKAGE_BYTES + weight_bytes + programs * (program + compressed)
    if rows <= MOST_UNROLLED and deployment.evaluations_per_step == 1 and spec.pixels_per_latent == 1:
        unrolled = once + round(_ROW_SHARE * rows * (program - once)) + compressed
        yield "sampler_bytes", _PACKAGE_BYTES + weight_bytes + programs * unrolled
    decoder = deployment.decoder
    if decoder.autoencoder_sha256:
        yield "decoder_bytes", _PACKAGE_BYTES + _decoder_bytes(decoder, weights)


def _stored(
    deployment: Deployment, spec: ModelSpec, matrices: Mapping[str, MatrixPlan], layout: Layout
) -> Iterator[tuple[Shape, bool]]:
    """Shapes of all weights, and whether each may be compressed: tables, biases, first and last layer may not."""
    width, kept = spec.width, len(deployment.request.classes)
    switches = deployment.candidate.form == "switch"
    yield (width, spec.channels, spec.patch_size, spec.patch_size), False
    yield (spec.tokens, width), False
    yield (spec.patch_values, width), False
    yield from (((size,), False) for size in (width, spec.patch_values))
    row = baked_table_values(spec, 1)
    labels = kept + (not spec.distilled) if spec.label_embedding and switches else 0
    if deployment.candidate.modulation == "network":
        yield from (((width, FREQUENCY_WIDTH), True), ((width, width), True), ((labels, width), False))
        yield from (((row, width), True), ((row,), False))
    else:
        yield (deployment.request.sampling.evaluations * max(labels, 1), row), False
    common = spec.shared_factors and switches and layout == "tokens"
    for matrix in spec.matrices():
        plan = matrices[matrix.name]
        tailor = (plan.tailor_rank or 0) if switches else 0
        yield (matrix.outputs,), False
        shapes = list(_matrix_shapes(matrix, plan, tailor, kept, layout))
        first = matrix == spec.weight_types()[weight_type(matrix.name)]
        if common and plan.storage == "factored" and plan.shared_rank and not first:
            del shapes[1]  # equal constants are stored once; the other factor has its block's scale in it
        yield from ((shape, True) for shape in shapes)
    masks = _masks(spec, matrices) if switches and layout == "channels" else ()
    yield from (((kept + (not spec.distilled), shared + kept * rank), False) for shared, rank in masks)


def _masks(spec: ModelSpec, matrices: Mapping[str, MatrixPlan]) -> set[tuple[int, int]]:
    """Tables of which components a class has, in *channels*: by the shared rank beside tailors, and theirs."""
    plans = [matrices[matrix.name] for matrix in spec.matrices()]
    return {(p.shared_rank if p.storage == "factored" else 0, p.tailor_rank) for p in plans if p.tailor_rank}


def _matrix_shapes(matrix: MatrixShape, plan: MatrixPlan, tailor: int, kept: int, layout: Layout) -> Iterator[Shape]:
    """What is left of one matrix, as the layouts hold it; `tailor` is the rank of one class's."""
    n, m, rank = matrix.outputs, matrix.inputs, plan.shared_rank
    together = layout == "channels" and plan.storage == "factored"
    if plan.storage == "dense":
        yield n, m
    elif rank or (together and tailor):
        side_by_side = rank + (kept * tailor if together else 0)
        yield from ((side_by_side, m), (n, side_by_side))
    if tailor and layout == "tokens":
        yield from ((kept, m, tailor), (kept, tailor, n))
    elif tailor and not together:
        yield from ((kept * tailor, m), (n, kept * tailor))


def _program_bytes(spec: ModelSpec, matrices: Mapping[str, MatrixPlan], layout: Layout, products: int) -> int:
    """One evaluation. `products`: weights that are multiplied with; a tailor's gathers are counted with the tailor."""
    each = _PROGRAMS[layout]
    tailored = sum(bool(matrices[matrix.name].tailor_rank) for matrix in spec.matrices())
    gathered = 2 * tailored if layout == "tokens" else 0
    return (
        len(spec.branches("attn")) * (each.attention + spec.heads * each.head)
        + len(spec.branches("mlp")) * each.mlp
        + (products - gathered) * each.product
        + tailored * each.tailor
        + len(_masks(spec, matrices)) * each.mask
    )


def _gathered_bytes(spec: ModelSpec, matrices: Mapping[str, MatrixPlan], layout: Layout) -> int:
    """Of the program: what picks the tailors of a class."""
    tailored = sum(bool(matrices[matrix.name].tailor_rank) for matrix in spec.matrices())
    return tailored * _GATHER_BYTES if layout == "tokens" else 0


def _decoder_bytes(decoder: DecoderCost, weights: Weights) -> int:
    """Its kernels in fp16 or int8, and its program."""
    rest = 2 * (decoder.params - decoder.kernel_params) + decoder.operators * _DECODER_OPERATOR_BYTES
    if weights == "fp16":
        return rest + 2 * decoder.kernel_params
    return rest + decoder.kernel_params + 2 * decoder.kernel_outputs + decoder.kernels * entry_bytes(0)
