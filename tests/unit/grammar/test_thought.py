"""A format after a thought: what may follow at every place, and every step taken back."""

from __future__ import annotations

import random

import numpy as np
import pytest

from workers.engine.contract import Grammar, Thought
from workers.engine.formats import Matcher, mask_words
from workers.grammar.formats import TokenFormats
from workers.grammar.thought import MAX_BREAKS
from workers.grammar.vocabulary import Vocabulary

OPEN, CLOSE, BREAKS, SPECIAL, SIZE = 256, 257, 258, 259, 263
TABLE = [*[bytes([i]) for i in range(256)], b"<think>", b"</think>", b"\n\n", b"<|x|>"]
FORMATS = {seen: TokenFormats(Vocabulary.of(TABLE, seen, SIZE)) for seen in ((SPECIAL,), (SPECIAL, OPEN, CLOSE))}
BEGUN, MAY_BEGIN = Thought(CLOSE, begun=True), Thought(CLOSE, open=OPEN)
TEN = ord("\n")


@pytest.fixture(params=FORMATS, ids=["markers are text", "markers are special"])
def formats(request: pytest.FixtureRequest) -> TokenFormats:
    return FORMATS[request.param]


def allowed(matcher: Matcher) -> tuple[set[int], bool]:
    row = np.full(mask_words(SIZE), 0xFFFFFFFF, np.uint32)
    may_end = matcher.mask_into(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    assert not bits[SIZE:].any()
    return {int(i) for i in np.flatnonzero(bits)}, may_end


def take(matcher: Matcher, *ids: int) -> Matcher:
    for id in ids:
        assert id in allowed(matcher)[0], id
        matcher.accept(id)
    return matcher


def test_a_thought_that_is_begun_holds_anything_until_its_end(formats: TokenFormats) -> None:
    matcher = formats.open(Grammar("choice", '["yes"]', BEGUN))
    found, may_end = allowed(matcher)
    assert {*range(256), CLOSE, BREAKS} <= found
    assert SPECIAL not in found
    assert not may_end
    take(matcher, *b"yes", TEN, 0xFF)
    assert not matcher.finished
    take(matcher, CLOSE)
    assert allowed(matcher) == ({ord("y"), TEN, BREAKS}, False)
    take(matcher, *[TEN, BREAKS][:MAX_BREAKS])
    assert allowed(matcher) == ({ord("y")}, False)
    take(matcher, *b"yes")
    assert matcher.finished
    with pytest.raises(ValueError, match="does not allow"):
        matcher.accept(ord("n"))


def test_it_may_begin_or_not(formats: TokenFormats) -> None:
    matcher = formats.open(Grammar("choice", '["yes"]', MAY_BEGIN))
    assert allowed(matcher) == ({ord("y"), OPEN}, False)
    take(matcher, *b"yes")
    assert matcher.finished
    matcher = take(formats.open(Grammar("choice", '["yes"]', MAY_BEGIN)), OPEN, *b"hm", CLOSE, *b"yes")
    assert matcher.finished
    matcher = take(formats.open(Grammar("choice", '["yes"]', MAY_BEGIN)), ord("y"))
    assert allowed(matcher) == ({ord("e")}, False)


def test_line_breaks_of_a_format_are_its_own_after_two(formats: TokenFormats) -> None:
    matcher = take(formats.open(Grammar("regex", r"\n{3}a", BEGUN)), CLOSE, TEN, TEN)
    assert allowed(matcher)[0] == {TEN, BREAKS}
    take(matcher, TEN, TEN, TEN, ord("a"))
    assert matcher.finished


@pytest.mark.parametrize("thought", [BEGUN, MAY_BEGIN, Thought(grammar='start: "("  /[a-z]+/ ")"')], ids=str)
def test_steps_taken_back_leave_no_trace(formats: TokenFormats, thought: Thought) -> None:
    """A walk with steps back comes to where a straight one comes."""
    grammar = Grammar("regex", r"(ab|\n)+[0-9]{2,}", thought)
    rng = random.Random(3)
    for _ in range(12):
        matcher, taken = formats.open(grammar), list[int]()
        for _ in range(60):
            if taken and rng.random() < 0.25:
                count = rng.randint(1, len(taken))
                matcher.rollback(count)
                del taken[-count:]
            else:
                found = sorted(allowed(matcher)[0])
                leave = [i for i in found if i in (CLOSE, OPEN, BREAKS, TEN, ord(")"))]
                taken.append(rng.choice(leave if leave and rng.random() < 0.4 else found))
                matcher.accept(taken[-1])
            straight = take(formats.open(grammar), *taken)
            assert allowed(matcher) == allowed(straight)
            assert matcher.finished == straight.finished


def test_the_vocabulary_knows_text_and_line_breaks() -> None:
    vocabulary = Vocabulary.of(TABLE, {SPECIAL}, SIZE)

    def ids(bits: np.ndarray) -> set[int]:
        return {int(i) for i in np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))}

    assert ids(vocabulary.spoken) == set(range(SPECIAL))
    assert ids(vocabulary.breaks) == {TEN, BREAKS}
