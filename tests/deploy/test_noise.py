"""The noise is what docs/noise.md says, in Python and in the page's own JavaScript."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kind_edge.deploy.noise import gaussian_noise, normals, philox4x32
from kind_edge.errors import UsageError

PAGE = (Path(__file__).parents[2] / "docs" / "noise.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if re.match(r"\| [0-9a-f]+ ", line)
]
KNOWN_ANSWERS = [row for row in ROWS if len(row) == 3]
NOISE_VECTORS = [row for row in ROWS if len(row) == 6]


def words(cell: str) -> list[int]:
    return [int(word, 16) for word in cell.split()]


def test_page_holds_both_tables() -> None:
    assert (len(KNOWN_ANSWERS), len(NOISE_VECTORS)) == (3, 6)


@pytest.mark.parametrize("row", KNOWN_ANSWERS, ids=lambda row: row[1])
def test_philox_known_answers(row: list[str]) -> None:
    key = words(row[1])
    assert philox4x32(np.array(words(row[0]), np.uint32), (key[0], key[1])).tolist() == words(row[2])


@pytest.mark.parametrize("row", NOISE_VECTORS, ids=lambda row: "-".join(row[:3]))
def test_noise_vectors(row: list[str]) -> None:
    seed, image, block = (int(cell) for cell in row[:3])
    assert philox4x32(np.array([block, image, 0, 0], np.uint32), (seed % 2**32, seed >> 32)).tolist() == words(row[3])
    noise = gaussian_noise(seed, image, 1, (4 * block + 4,))[0, -4:]
    bits = np.array(words(row[5]), np.uint32).view(np.float32)
    np.testing.assert_array_max_ulp(noise, bits, maxulp=1)
    np.testing.assert_array_equal(bits, np.array(row[4].split(), np.float32))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 9),
    st.integers(1, 8),
    st.sampled_from([(1, 3, 5), (2, 4, 4), (7,)]),
)
def test_image_does_not_depend_on_its_batch(seed: int, first: int, count: int, shape: tuple[int, ...]) -> None:
    together = gaussian_noise(seed, first, count, shape)
    alone = np.concatenate([gaussian_noise(seed, first + image, 1, shape) for image in range(count)])
    assert together.dtype == np.float32
    assert together.shape == (count, *shape)
    np.testing.assert_array_equal(together, alone)


def test_values_are_standard_normal() -> None:
    noise = gaussian_noise(1, 0, 64, (3, 32, 32)).astype(np.float64).reshape(64, -1)
    error = 1 / np.sqrt(noise.size)
    assert abs(noise.mean()) < 4 * error
    assert abs(noise.var() - 1) < 4 * np.sqrt(2) * error
    assert abs((noise**4).mean() - 3) < 4 * np.sqrt(96) * error
    correlation = np.corrcoef(noise) - np.eye(64)
    assert np.abs(correlation).max() < 6 / np.sqrt(noise.shape[1])


def test_extreme_words_stay_finite() -> None:
    extremes = normals(np.array([[0, 0, 2**32 - 1, 2**32 - 1]], np.uint32))
    assert np.isfinite(extremes).all()
    assert abs(np.abs(extremes).max() - np.sqrt(66 * np.log(2))) < 1e-6


@pytest.mark.parametrize(("seed", "first"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_out_of_range_is_refused(seed: int, first: int) -> None:
    with pytest.raises(UsageError, match="want"):
        gaussian_noise(seed, first, 1, (4,))


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_javascript_of_the_page_agrees() -> None:
    script = re.search(r"```js\n(.*?)```", PAGE, re.DOTALL)
    assert script is not None
    call = "console.log(JSON.stringify(Array.from(gaussianNoise(1311768467463790320n, 5, 3 * 28 * 28 - 1))))"
    output = subprocess.run(
        ["node", "-e", script[1] + call], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    expected = gaussian_noise(1311768467463790320, 5, 1, (3 * 28 * 28 - 1,))[0]
    np.testing.assert_array_max_ulp(np.array(json.loads(output), np.float32), expected, maxulp=1)
