"""A denoiser in each precision. What stays wide, so that the gate is kept with a margin, is found by measuring."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx

from kind_edge.budget.precision import PRECISIONS, Precision
from kind_edge.deploy.plain import PlainDiT
from kind_edge.exporters import onnx_blocks, onnx_fp16, onnx_qdq
from kind_edge.exporters.onnx_graph import to_onnx
from kind_edge.exporters.onnx_int8 import FINAL, quantize_int8
from kind_edge.exporters.static_graph import to_static
from kind_edge.exporters.trajectories import Call, chosen_wide, walk

MARGIN_DB = 3.0
"""Above the gate: other images than those of the calibration come out a little worse."""
DYNAMIC_MARGIN_DB = 1.0
"""Of dynamic int8, which is calibrated on nothing; and a matrix in fp32 is four times as large."""


@dataclass(frozen=True)
class Rounded:
    """A model in a precision, and what in it stays wide by measurement."""

    proto: onnx.ModelProto
    wide: tuple[str, ...] = ()


class Precisions:
    """The precisions of one plain model; what several need is made once."""

    def __init__(self, model: PlainDiT) -> None:
        self.model = model

    def make(self, precision: str) -> Rounded:
        """The denoiser in a precision."""
        return _MAKERS[PRECISIONS[precision].name](self)  # type: ignore[index]

    @functools.cached_property
    def graph(self) -> onnx.ModelProto:
        return to_onnx(self.model)

    @functools.cached_property
    def calls(self) -> tuple[Call, ...]:
        return walk(self.graph, self.model.origin)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the block matrices that are left."""
        return tuple(shape.name for shape in self.model.spec.matrices())

    def _wide(
        self,
        rounded: Callable[[tuple[str, ...]], onnx.ModelProto],
        candidates: Sequence[str],
        wanted_db: float,
        most: int,
    ) -> tuple[str, ...]:
        """What stays wide: as it was chosen for other classes on the same core, or found by measuring."""
        given = self.model.origin.wide
        if given is not None:
            return tuple(name for name in given if name in candidates)
        return chosen_wide(rounded, candidates, self.calls, wanted_db, most)

    def fp32(self) -> Rounded:
        return Rounded(self.graph)

    def fp16(self) -> Rounded:
        def halved(wide: tuple[str, ...]) -> onnx.ModelProto:
            return onnx_fp16.halve(self.graph, wide)

        wide = self._wide(halved, tuple(onnx_fp16.FLOAT_KINDS), _wanted_db("fp16"), most=2)
        return Rounded(halved(wide), wide)

    def int8(self) -> Rounded:
        stored = self.model.origin.plan.matrix_precisions("int8")
        kept = [name for name in stored if stored[name] == "fp32"]

        def narrow(wide: tuple[str, ...]) -> onnx.ModelProto:
            return quantize_int8(self.graph, [*kept, *wide])

        left = tuple(name for name in self.matrices if name not in kept)
        wide = self._wide(narrow, left, _wanted_db("int8", DYNAMIC_MARGIN_DB), most=5)
        return Rounded(narrow(wide), (FINAL, *wide))

    def blocks(self, precision: Precision) -> Rounded:
        bits = PRECISIONS[precision].weight_bits
        graph = onnx_blocks.without_gemm(self.graph)
        rounded = onnx_blocks.round_blocks(graph, self.calls, {bits, 8})

        def narrow(wide: tuple[str, ...]) -> onnx.ModelProto:
            return onnx_blocks.quantize_blocks(graph, rounded, bits, wide)

        wide = self._wide(narrow, self.matrices, _wanted_db(precision), most=5)
        return Rounded(narrow(wide), wide)

    def static(self, precision: Precision) -> Rounded:
        bits = 16 if precision == "a16w8" else 8
        graph = to_static(self.model.origin)
        calls = walk(graph, self.model.origin)
        found = onnx_qdq.calibrate(graph, calls)

        def narrow(wide: tuple[str, ...]) -> onnx.ModelProto:
            return onnx_qdq.quantize_static(graph, found, bits, wide)

        kinds = tuple(onnx_qdq.WIDE_KINDS) if bits == 8 else (*onnx_qdq.ENDS, *self.matrices)
        wide = chosen_wide(narrow, kinds, calls, _wanted_db(precision), most=5)
        return Rounded(narrow(wide), wide)


_MAKERS: Mapping[Precision, Callable[[Precisions], Rounded]] = {
    "fp32": Precisions.fp32,
    "fp16": Precisions.fp16,
    "int8": Precisions.int8,
    "int8-qdq": functools.partial(Precisions.static, precision="int8-qdq"),
    "a16w8": functools.partial(Precisions.static, precision="a16w8"),
    "int8-weights": functools.partial(Precisions.blocks, precision="int8-weights"),
    "int4": functools.partial(Precisions.blocks, precision="int4"),
}


def _wanted_db(precision: Precision, margin_db: float = MARGIN_DB) -> float:
    return PRECISIONS[precision].gate_db + margin_db  # a file that is as good as that needs no search
