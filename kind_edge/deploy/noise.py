"""The initial noise of an image: the same numbers in Python, JavaScript, Kotlin and Swift.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11) turns a counter into
four 32-bit words, and Box-Muller turns those into four normal values. There is no state: image i depends on (seed, i)
alone, whatever the batch. `docs/noise.md` specifies every step, with test vectors.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kind_edge.errors import UsageError

UInt32Array = npt.NDArray[np.uint32]
FloatArray = npt.NDArray[np.float32]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF
_TWO_PI = 6.283185307179586


def philox4x32(counter: UInt32Array, key: tuple[int, int]) -> UInt32Array:
    """Ten rounds of Philox4x32: counter uint32 [..., 4] and one key of two 32-bit words to uint32 [..., 4]."""
    c0, c1, c2, c3 = (counter[..., word].astype(np.uint64) for word in range(4))
    shift, mask = np.uint64(32), np.uint64(_MASK)
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> shift) ^ c1 ^ np.uint64(k0),
            product1 & mask,
            (product0 >> shift) ^ c3 ^ np.uint64(k1),
            product0 & mask,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def normals(words: UInt32Array) -> npt.NDArray[np.float64]:
    """Box-Muller: uint32 [..., 4] to four independent standard normal values, float64 [..., 4].

    Words (a, b) give r cos(v) and r sin(v) with r = sqrt(-2 ln((a + 0.5) / 2^32)) and v = 2 pi (b + 0.5) / 2^32, and so
    do words (c, d). The half keeps the logarithm finite; the largest magnitude is sqrt(66 ln 2) = 6.764.
    """
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(uniform[..., 0::2]))
    angle = _TWO_PI * uniform[..., 1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return pairs.reshape(words.shape)


def gaussian_noise(seed: int, first_image: int, count: int, shape: tuple[int, ...]) -> FloatArray:
    """Noise of images `first_image` to `first_image + count - 1` of a run: float32 [count, *shape], standard normal.

    Value v of an image, in row-major order over `shape`, is number v mod 4 of block v div 4; a block is Philox4x32-10
    of the counter (block, image, 0, 0) under the key (low 32 bits of the seed, high 32 bits).
    Raises `UsageError` if the seed is not in 0..2^64-1 or an image number not in 0..2^32-1.
    """
    if not 0 <= seed < 2**64:
        raise UsageError(f"seed: got {seed}, want an integer from 0 to 2^64 - 1")
    if first_image < 0 or count < 0 or first_image + count > 2**32:
        raise UsageError(f"images {first_image}..{first_image + count - 1}: want numbers from 0 to 2^32 - 1")
    values = math.prod(shape)
    blocks = -(-values // 4)
    counter = np.zeros((count, blocks, 4), np.uint32)
    counter[:, :, 0] = np.arange(blocks, dtype=np.uint64)
    counter[:, :, 1] = np.arange(first_image, first_image + count, dtype=np.uint64)[:, None]
    words = philox4x32(counter, (seed & _MASK, seed >> 32))
    return normals(words).reshape(count, blocks * 4)[:, :values].astype(np.float32).reshape(count, *shape)
