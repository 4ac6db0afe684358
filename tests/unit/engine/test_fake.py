"""What the fake engine adds to the contract: scripts, time, failures on demand."""

from __future__ import annotations

import pytest

from workers.engine import FinishReason, Request, Sampling, SequenceOutput
from workers.engine.fake import FakeEngine


def finish(engine: FakeEngine, *requests: Request) -> dict[str, list[SequenceOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
    engine.check_idle()
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def test_a_script_is_said_word_for_word_and_ends_with_eos():
    engine = FakeEngine(answer=lambda request: [*request.prompt, 7, 8])
    outputs = finish(engine, Request("a", [1, 2], 50, eos_ids=[99]))["a"]
    assert tokens(outputs) == [1, 2, 7, 8, 99]
    assert outputs[-1].finish is FinishReason.EOS
    resumed = finish(engine, Request("b", [1, 2], 50, eos_ids=[99], generated=[1, 2, 7]))["b"]
    assert tokens(resumed) == [8, 99]
    assert len(tokens(finish(engine, Request("c", [1, 2], 20))["c"])) == 20, "without an EOS id it goes on"


def test_time_is_spent_by_rows():
    spent: list[float] = []
    engine = FakeEngine(step_s=lambda rows: rows / 1000, sleep=spent.append, chunk_tokens=100)
    finish(engine, Request("a", [1] * 250, 3))
    assert spent == [0.1, 0.1, 0.05, 0.001, 0.001]
    assert engine.stats().steps == 5


def test_a_step_can_be_made_to_raise():
    engine = FakeEngine()
    engine.add(Request("a", [1], 5))
    engine.fail_next_step(OSError("the cable"))
    with pytest.raises(OSError, match="the cable"):
        engine.step()
    assert len(tokens(engine.step())) == 1, "and goes on"


@pytest.mark.parametrize("inner", ["a", "3:a"])
def test_a_sequence_can_be_made_to_fail(inner):
    engine = FakeEngine()
    engine.fail_sequence("a", "a bad page")
    outputs = finish(engine, Request(inner, [1], 5), Request("3:b", [1], 5))
    assert (outputs[inner][-1].finish, outputs[inner][-1].error) == (FinishReason.ERROR, "a bad page")
    assert outputs["3:b"][-1].finish is FinishReason.LENGTH


def test_its_cache_forgets_what_is_oldest():
    engine = FakeEngine(blocks=2)
    finish(engine, Request("a", [1] * 33, 1))
    assert finish(engine, Request("b", [1] * 33, 1))["b"][0].cached_tokens == 32
    finish(engine, Request("c", [2] * 17, 1))
    assert finish(engine, Request("d", [1] * 33, 1))["d"][0].cached_tokens == 0


def test_not_idle_names_who_is_there():
    engine = FakeEngine()
    engine.add(Request("left over", [1], 5, Sampling(temperature=0)))
    with pytest.raises(RuntimeError, match="left over"):
        engine.check_idle()
