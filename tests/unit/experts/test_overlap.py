"""Steps in two halves: what they are, and when the engine computes a step so."""

from __future__ import annotations

import random
from array import array

import pytest

from workers.engine.plan import Chunk, halved
from workers.experts.overlap import LEAST_ROWS, Overlap


def rows_of(chunks: list[Chunk]) -> list[tuple[str, int, int, bool]]:
    """(sequence, position, token, whether it is wanted) of each."""
    return [
        (c.id, c.start + i, token, i >= len(c.tokens) - c.wanted) for c in chunks for i, token in enumerate(c.tokens)
    ]


def test_halves_are_the_rows_of_the_whole() -> None:
    dice = random.Random(0)
    for _ in range(300):
        chunks = []
        for i in range(dice.randrange(1, 6)):
            tokens = [dice.randrange(100) for _ in range(dice.randrange(1, 9))]
            wanted = dice.randrange(len(tokens) + 1)
            chunks.append(Chunk(f"s{i}", dice.randrange(50), tokens, (array("i", [i]),), wanted, whole=i % 2 == 0))
        rows = rows_of(chunks)
        if len(rows) < 2:
            continue
        first, second = halved(chunks)
        assert rows_of(first) + rows_of(second) == rows
        assert len(rows_of(first)) == len(rows) // 2
        assert all(c.whole == (int(c.id[1:]) % 2 == 0) and c.tokens for c in first + second)


def test_one_row_has_no_halves() -> None:
    with pytest.raises(ValueError, match="fewer than two rows"):
        halved([Chunk("s", 0, [1], (array("i", [0]),), 1)])


def played(overlap: Overlap, whole: float, halves: float, steps: int, rows: int = 512) -> list[bool]:
    """What it chose, where a step takes so long either way."""
    chosen = []
    for _ in range(steps):
        way = overlap.halves(rows)
        overlap.took(rows, way, halves if way else whole)
        chosen.append(way)
    return chosen


@pytest.mark.parametrize(("whole", "halves", "better"), [(1.0, 0.8, True), (1.0, 0.99, False), (1.0, 1.3, False)])
def test_it_keeps_to_the_faster_way_and_tries_the_other_now_and_then(whole: float, halves: float, better: bool) -> None:
    chosen = played(Overlap(), whole, halves, 640)
    assert chosen[:6] == [False] * 3 + [True] * 3
    assert chosen[6:].count(not better) == 10


def test_it_notices_what_has_changed() -> None:
    overlap = Overlap()
    assert played(overlap, 1.0, 0.8, 100)[-1] is True
    assert played(overlap, 1.0, 1.5, 100)[-1] is False, "while in use it is seen at once"
    assert played(overlap, 1.0, 0.8, 300)[-1] is True, "and otherwise by trials"


def test_small_steps_stay_whole_and_other_sizes_are_judged_by_themselves() -> None:
    overlap = Overlap()
    assert not any(played(overlap, 1.0, 0.5, 100, rows=LEAST_ROWS - 1))
    assert played(overlap, 1.0, 0.5, 20, rows=64)[-1] is True
    assert played(overlap, 1.0, 2.0, 20, rows=512)[-1] is False
    assert played(overlap, 1.0, 0.5, 1, rows=65) == [True]
    overlap.forced = True
    assert [overlap.halves(rows) for rows in (1, 2, 64)] == [False, True, True]
