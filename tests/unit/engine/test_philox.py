"""Our Philox against the published known answers of Random123 (kat_vectors, philox4x32 with 10 rounds)."""

from __future__ import annotations

import numpy as np
import pytest

from workers.engine.philox import philox4x32, uniforms

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter, key, words):
    got = philox4x32(np.array([counter], dtype=np.uint64), np.array([key], dtype=np.uint64))
    assert tuple(int(word) for word in got[0]) == words


def test_a_batch_is_its_rows():
    counters = np.array([k[0] for k in KNOWN], dtype=np.uint64)
    keys = np.array([k[1] for k in KNOWN], dtype=np.uint64)
    assert philox4x32(counters, keys).tolist() == [list(k[2]) for k in KNOWN]


def test_numbers_are_made_of_the_first_two_words():
    first, second = KNOWN[0][2][:2]
    assert uniforms([(0, 0, 0)]).tolist() == [((first >> 5) * 2**26 + (second >> 6)) / 2**53]


def test_every_part_of_the_key_counts():
    draws = [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1 << 32, 0, 0), (1 + (1 << 63), 0, 0)]
    numbers = uniforms(draws)
    assert len(set(numbers.tolist())) == len(draws)
    assert uniforms(list(reversed(draws))).tolist() == numbers.tolist()[::-1]
    assert uniforms([(-1, 0, 0)]) == uniforms([((1 << 64) - 1, 0, 0)])


def test_numbers_are_uniform():
    numbers = uniforms(
        [(seed, index, position) for seed in range(20) for index in range(10) for position in range(100)]
    )
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
    expected = len(numbers) / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 103.4, "63 degrees of freedom: one in a thousand is above"
