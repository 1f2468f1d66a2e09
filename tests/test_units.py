"""Quantities: what people write, what is refused, and that text and numbers agree both ways."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kind_edge.errors import UsageError
from kind_edge.units import (
    Kind,
    Quantity,
    format_bytes,
    format_flops,
    format_flops_per_second,
    format_params,
    format_seconds,
    format_share,
    parse_quantity,
)

positive = st.floats(min_value=1e-9, max_value=1e18, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("300MiB", "bytes", 300 * 2**20),
        ("2MB", "bytes", 2e6),
        (" 2 mb ", "bytes", 2e6),
        ("1.5gib", "bytes", 1.5 * 2**30),
        ("512kb", "bytes", 512e3),
        ("4s", "seconds", 4.0),
        ("250ms", "seconds", 0.25),
        ("3µs", "seconds", 3e-6),
        ("2min", "seconds", 120.0),
        ("13.2GFLOPs", "flops", 13.2e9),
        ("13.2 gflops", "flops", 13.2e9),
        ("1e3FLOP", "flops", 1e3),
    ],
)
def test_what_people_write(text: str, kind: Kind, value: float) -> None:
    quantity = parse_quantity(text, kind)
    assert quantity.unit == kind
    assert quantity.value == pytest.approx(value, rel=1e-15)


def test_a_share_of_the_dense_model() -> None:
    assert parse_quantity("40%", "flops") == Quantity(0.4, "share")
    with pytest.raises(UsageError, match="nothing to refer to"):
        parse_quantity("40%", "seconds", allow_share=False, flag="--max-latency")


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("300", "bytes", r"--limit '300': a bare number says no unit; .*300MiB"),
        ("4", "seconds", "250ms"),
        ("5Mb", "bytes", "bits"),
        ("5M", "bytes", "MB or MiB"),
        ("6GMACs", "flops", "one MAC is two FLOPs"),
        ("4s", "bytes", "unknown unit 's'"),
        ("-4s", "seconds", "more than zero"),
        ("0%", "bytes", "more than zero"),
        ("1e999B", "bytes", "finite"),
        ("nan s", "seconds", "not a number"),
        ("1,5s", "seconds", "unknown unit"),
        ("", "bytes", "not a number"),
    ],
)
def test_refusals_teach(text: str, kind: Kind, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_quantity(text, kind, flag="--limit")


@given(positive, st.sampled_from(["bytes", "seconds", "flops"]))
def test_text_of_a_quantity_parses_back_exactly(value: float, kind: Kind) -> None:
    quantity = Quantity(value, kind)
    assert parse_quantity(str(quantity), kind) == quantity


@given(st.floats(min_value=1e-3, max_value=10))
def test_a_share_parses_back(share: float) -> None:
    assert parse_quantity(str(Quantity(share, "share")), "bytes").value == pytest.approx(share, rel=1e-15)


@given(positive)
def test_formatted_text_parses_back_to_three_digits(value: float) -> None:
    for kind, text in (("seconds", format_seconds(value)), ("flops", format_flops(value))):
        if value >= 1:
            assert parse_quantity(text, kind).value == pytest.approx(value, rel=0.006)  # type: ignore[arg-type]
    size = round(value) + 1
    for binary in (True, False):
        assert parse_quantity(format_bytes(size, binary), "bytes").value == pytest.approx(size, rel=0.006)


def test_formats() -> None:
    assert format_bytes(4.5 * 2**20) == "4.5 MiB"
    assert format_bytes(280_768_640, binary=False) == "281 MB"
    assert format_bytes(1023 * 2**20) == "1020 MiB"
    assert format_bytes(0) == "0 B"
    assert format_seconds(0.0123) == "12.3 ms"
    assert format_seconds(0.9996) == "1 s"
    assert format_flops(13_216_983_552) == "13.2 GFLOPs"
    assert format_flops_per_second(1.907e12) == "1.91 TFLOP/s"
    assert format_params(70_192_160) == "70.2 M"
    assert format_params(12) == "12"
    assert format_bytes(math.inf) == "inf B"
    assert [format_share(share) for share in (0.4, 0.00066, 9.996, 15.23)] == ["40 %", "0.066 %", "1,000 %", "1,520 %"]
