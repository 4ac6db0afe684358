"""Larger priorities go first, and nobody waits for ever."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import paged_engine

from workers.engine import FinishReason, Request
from workers.engine.core import EngineCore
from workers.engine.fake import FakeEngine
from workers.engine.turns import SHARE


class Flood:
    """Keeps `depth` requests of a class waiting, and tells in which order sequences got their first token."""

    def __init__(
        self, engine: EngineCore | FakeEngine, priority: int, prompt: int, depth: int = 12, answer: int = 2
    ) -> None:
        self.engine, self.priority, self.prompt, self.depth, self.answer = engine, priority, prompt, depth, answer
        self.order: list[str] = []
        self.finished: set[str] = set()
        self._made = 0

    def step(self) -> None:
        while self.engine.stats().waiting < self.depth:
            self.engine.add(
                Request(f"flood{self._made}", [self._made % 50] * self.prompt, self.answer, priority=self.priority)
            )
            self._made += 1
        for output in self.engine.step():
            if output.id not in self.order and output.token_ids:
                self.order.append(output.id)
            if output.finish is not None:
                self.finished.add(output.id)
        if isinstance(self.engine, EngineCore):
            self.engine.check()

    def until(self, *names: str, steps: int = 20_000) -> None:
        for _ in range(steps):
            if self.finished.issuperset(names):
                return
            self.step()
        raise AssertionError(f"{set(names) - self.finished} never ended")

    def end(self) -> None:
        while self.engine.has_work():
            self.engine.step()
        self.engine.check_idle()


@pytest.mark.parametrize("fake", [False, True])
def test_one_in_eight_is_whoever_has_waited_longest(fake):
    engine = FakeEngine(max_running=1) if fake else paged_engine(64, max_running=1, chunk_tokens=64)[0]
    for i in range(3):
        engine.add(Request(f"low{i}", [i] * 5, 2, priority=-1))
    flood = Flood(engine, 5, prompt=5)
    flood.until("low0", "low1", "low2")
    places = [flood.order.index(f"low{i}") for i in range(3)]
    assert places == [SHARE - 1, 2 * SHARE - 1, 3 * SHARE - 1]
    flood.end()


def test_a_long_prompt_of_a_low_class_waits_until_the_others_had_as_many_times_its_tokens():
    engine, _ = paged_engine(64, max_running=1, chunk_tokens=64)
    engine.add(Request("low", [1] * 50, 2, priority=-1))
    flood = Flood(engine, 5, prompt=5)
    flood.until("low")
    assert flood.order.index("low") == 50 // 5 * (SHARE - 1)
    flood.end()


def test_who_was_admitted_in_its_turn_is_not_overtaken_inside_the_engine():
    """Prompts of larger priority would else take every row of a step that does not decode."""
    engine, runner = paged_engine(64, max_running=4, chunk_tokens=8)
    engine.add(Request("low", [1] * 60, 2, priority=-1))
    flood = Flood(engine, 5, prompt=60, answer=1)
    flood.until("low")
    first = next(i for i, plan in enumerate(runner.plans) if any(c[0] == "low" for c in plan))
    own = [c for plan in runner.plans[first:] for c in plan if c[0] == "low" and c[2] > 1]
    assert len(own) <= 60 // 8 + 2, "its prompt had nearly all rows from its first on"
    flood.end()


def test_nobody_is_overtaken_where_all_have_the_same_priority():
    engine, _ = paged_engine(64, max_running=2, chunk_tokens=64)
    names = [f"r{i}" for i in range(40)]
    for i, name in enumerate(names):
        engine.add(Request(name, [i] * 5, 2))
    order = []
    while engine.has_work():
        order += [o.id for o in engine.step() if o.id not in order]
    assert order == names


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 60), st.integers(-3, 2)), min_size=1, max_size=5),
    prompt=st.integers(1, 30),
    running=st.integers(1, 6),
    blocks=st.integers(8, 30),
    chunk=st.integers(4, 64),
)
def test_under_a_flood_everybody_ends(prompts, prompt, running, blocks, chunk):
    engine, _ = paged_engine(blocks, max_running=running, chunk_tokens=chunk)
    for i, (tokens, priority) in enumerate(prompts):
        engine.add(Request(f"r{i}", [i] * tokens, 5, priority=priority))
    flood = Flood(engine, 3, prompt)
    flood.until(*(f"r{i}" for i in range(len(prompts))))
    flood.end()


@pytest.mark.parametrize("how", ["cancelled", "ended"])
def test_turns_survive_that_the_oldest_goes_away(how):
    engine, _ = paged_engine(64, max_running=1, chunk_tokens=64)
    engine.add(Request("low0", [1] * 5, 2, priority=-1))
    engine.add(Request("low1", [1] * 5, 2, priority=-1))
    flood = Flood(engine, 5, prompt=5)
    for _ in range(9):
        flood.step()
    if how == "cancelled":
        engine.cancel("low0")
        (output,) = (o for o in engine.step() if o.id == "low0")
        assert output.finish is FinishReason.CANCELLED
        flood.until("low1")
    else:
        flood.until("low0", "low1")
    flood.end()
