"""Philox4x32-10: a counter-based generator (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2,
3", SC 2011). Integers in, integers out, no state: a draw is a function of its key, so that it does not matter who
draws, when, or beside whom.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)

Words = NDArray[np.uint64]  # 32-bit values, held in 64 bits so that products are exact


def philox4x32(counter: Words, key: Words, rounds: int = ROUNDS) -> Words:
    """counter: [N, 4], key: [N, 2], each value below 2^32 -> [N, 4] random values below 2^32."""
    c0, c1, c2, c3 = (counter[:, i] for i in range(4))
    k0, k1 = key[:, 0], key[:, 1]
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return np.stack((c0, c1, c2, c3), axis=1)


def uniforms(draws: Sequence[tuple[int, int, int]]) -> NDArray[np.float64]:
    """One number in [0, 1), of 53 bits, per (seed, sequence index, position in the answer).

    The key is the seed modulo 2^64, low word first; the counter is (position, sequence index, 0, 0), each modulo
    2^32. The number is made of the first two words: 27 and 26 bits of them.
    """
    seeds = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed, _, _ in draws], dtype=np.uint64)
    counter = np.zeros((len(draws), 4), dtype=np.uint64)
    counter[:, 0] = [position & 0xFFFFFFFF for _, _, position in draws]
    counter[:, 1] = [index & 0xFFFFFFFF for _, index, _ in draws]
    words = philox4x32(counter, np.stack((seeds & _LOW, seeds >> _SHIFT), axis=1))
    mantissa = ((words[:, 0] >> np.uint64(5)) << np.uint64(26)) | (words[:, 1] >> np.uint64(6))
    return mantissa.astype(np.float64) * 2.0**-53
