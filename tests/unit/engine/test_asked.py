"""Everything that a request can ask for, alone and in company: drafts, families, formats, prompts, interjections."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
from asked import Guesser, ListFormats, list_grammar, random_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_runner import paged_engine

from workers.engine import FinishReason, Interjection, Probe, Request, Sampling, SequenceOutput
from workers.engine.core import EngineCore

VOCAB = 50
GREEDY = Sampling(temperature=0)


def run(engine: EngineCore, *requests: Request) -> dict[str, list[SequenceOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[SequenceOutput]] = {}
    for _ in range(20_000):
        if not engine.has_work():
            return outputs
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.check()
    raise AssertionError("the engine never became idle")


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def said(outputs: list[SequenceOutput]) -> dict[str, Any]:
    """All that must not depend on company."""
    return {
        "tokens": tokens(outputs),
        "logprobs": [p for o in outputs for p in o.logprobs or []],
        "traces": [t for o in outputs for t in o.traces or []],
        "prompt": outputs[0].prompt_logprobs,
        "finish": outputs[-1].finish,
        "error": outputs[-1].error,
        "field": outputs[-1].field,
    }


def alone(request: Request) -> dict[str, Any]:
    engine, _ = paged_engine(64, chunk_tokens=512, formats=ListFormats())
    result = said(run(engine, request)[request.id])
    engine.check_idle()
    engine.close()
    return result


def family(count: int, prompt: list[int], **more: Any) -> list[Request]:
    options = {"max_tokens": 6, "sampling": Sampling(seed=4), "family": "f"} | more
    return [Request(f"r{i}", prompt, index=i, **options) for i in range(count)]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1 << 30),
    blocks=st.integers(7, 24),
    chunk=st.integers(1, 80),
    running=st.integers(1, 8),
    prefix_cache=st.booleans(),
    drafting=st.booleans(),
)
def test_whatever_requests_ask_for_they_get_what_they_get_alone(seed, blocks, chunk, running, prefix_cache, drafting):
    dice = random.Random(seed)
    requests = [random_request(dice, f"r{i}", VOCAB) for i in range(dice.randint(1, 9))]
    if dice.random() < 0.5:
        first = msgspec.structs.replace(requests[0], family="f")
        siblings = [msgspec.structs.replace(first, id=f"s{i}", index=5 + i, prompt_logprobs=None) for i in range(3)]
        requests = [first, *siblings, *requests[1:]]
    expected = {r.id: alone(r) for r in requests}
    guesser = Guesser({id: a["tokens"] for id, a in expected.items()}, {r.id: len(r.prompt) for r in requests}, VOCAB)
    engine, _ = paged_engine(
        blocks,
        max_running=running,
        chunk_tokens=chunk,
        prefix_cache=prefix_cache,
        formats=ListFormats(),
        proposer=guesser if drafting else None,
    )
    together = run(engine, *requests)
    assert {id: said(o) for id, o in together.items()} == expected
    engine.check_idle()
    again, _ = paged_engine(blocks, chunk_tokens=chunk, formats=ListFormats())
    for request in requests[:3]:  # and going on elsewhere
        answer = expected[request.id]["tokens"]
        had = dice.randint(0, len(answer))
        (rest,) = run(again, msgspec.structs.replace(request, generated=answer[:had])).values()
        assert tokens(rest) == answer[had:]
        assert rest[-1].finish is expected[request.id]["finish"]
    engine.close()
    again.close()


# Drafts.


@pytest.mark.parametrize("windows", [[None], [None, 18]])
def test_drafts_change_the_steps_and_not_the_answer(windows):
    request = Request("a", list(range(20)), 60, Sampling(seed=7), logprobs=2)
    plain, _ = paged_engine(64, windows)
    expected = said(run(plain, request)["a"])
    guesser = Guesser({"a": expected["tokens"]}, {"a": 20}, VOCAB)
    engine, runner = paged_engine(64, windows, proposer=guesser)
    outputs = run(engine, request)["a"]
    assert said(outputs) == expected
    stats = engine.stats()
    assert stats.generated_tokens == 60
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert len(runner.plans) == 60 - stats.accepted_tokens
    assert any(len(o.token_ids) > 1 for o in outputs)
    assert guesser.forgotten == ["a"]
    engine.check_idle()
    engine.close()
    assert guesser.closed == 1


def test_no_drafted_token_is_published_before_it_is_accepted():
    """Whoever finds the answer's blocks later reads what was accepted."""
    request = Request("a", list(range(20)), 60, Sampling(seed=7))
    expected = tokens(run(paged_engine(64)[0], request)["a"])
    engine, _ = paged_engine(64, proposer=Guesser({"a": [49] * 60}, {"a": 20, "b": 60}, VOCAB))
    assert tokens(run(engine, request)["a"]) == expected
    engine._proposer = None
    more = run(engine, Request("b", [*range(20), *expected[:40]], 20, Sampling(seed=7)))["b"]
    fresh = run(paged_engine(64)[0], Request("b", [*range(20), *expected[:40]], 20, Sampling(seed=7)))["b"]
    assert more[0].cached_tokens == 48
    assert tokens(more) == tokens(fresh)


@pytest.mark.parametrize("guess", [[VOCAB], [-1], [1] * 99, []])
def test_a_proposer_may_say_anything(guess):
    class Odd(Guesser):
        def propose(self, asks):
            return [list(guess) for _ in asks]

    request = Request("a", [1, 2, 3], 12, Sampling(seed=1))
    expected = tokens(run(paged_engine(64)[0], request)["a"])
    assert tokens(run(paged_engine(64, proposer=Odd({}, {}, VOCAB))[0], request)["a"]) == expected


def test_a_proposer_that_fails_is_not_asked_again(caplog):
    class Broken(Guesser):
        def propose(self, asks):
            self.asked += 1
            raise RuntimeError("no idea")

    broken = Broken({}, {}, VOCAB)
    engine, _ = paged_engine(64, proposer=broken)
    assert len(tokens(run(engine, Request("a", [1, 2, 3], 12))["a"])) == 12
    assert broken.asked == 1
    assert "no idea" in caplog.text


# Families.


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("windows", [[None], [None, 18], [16]])
def test_a_family_computes_its_prompt_once(prefix_cache, windows):
    requests = family(4, list(range(45)), bypass_prefix_cache=not prefix_cache)
    engine, runner = paged_engine(64, windows, chunk_tokens=20, prefix_cache=prefix_cache)
    outputs = run(engine, *requests)
    prefill = [(id, start, rows) for plan in runner.plans for id, start, rows, _ in plan if start < 45]
    assert sum(rows for id, _, rows in prefill if id == "r0") == 45
    for i in range(1, 4):
        assert min(start for id, start, _ in prefill if id == f"r{i}") == 32
        assert sum(rows for id, _, rows in prefill if id == f"r{i}") == 13
    assert {o[0].cached_tokens for o in outputs.values()} == {0}
    for request in requests:
        single, _ = paged_engine(64, windows)
        assert tokens(outputs[request.id]) == tokens(run(single, request)[request.id])
    assert len({tuple(tokens(o)) for o in outputs.values()}) == 4
    engine.check_idle()


@pytest.mark.parametrize("after", [1, 2, 3, 6])
def test_the_first_of_a_family_may_be_cancelled(after):
    requests = family(3, list(range(45)), bypass_prefix_cache=True)
    engine, _ = paged_engine(64, chunk_tokens=20)
    for request in requests:
        engine.add(request)
    for _ in range(after):
        engine.step()
    engine.cancel("r0")
    outputs = run(engine)
    assert outputs["r0"][-1].finish is FinishReason.CANCELLED
    for id in ("r1", "r2"):
        expected = tokens(run(paged_engine(64)[0], requests[int(id[1])])[id])
        assert tokens(outputs[id]) == expected[-len(tokens(outputs[id])) :]
    assert engine.stats().blocks_in_use == 0
    engine.check_idle()


def test_a_family_shares_when_the_first_is_gone_before_the_others_run():
    requests = family(3, list(range(45)), bypass_prefix_cache=True)
    engine, runner = paged_engine(64, max_running=1, chunk_tokens=64)
    run(engine, *requests)
    starts = [(id, start) for plan in runner.plans for id, start, rows, _ in plan if rows > 1]
    assert starts == [("r0", 0), ("r1", 32), ("r2", 32)]
    engine.check_idle()


def test_a_family_lets_go_when_blocks_run_out():
    """Three of one prompt wait while another sequence of better rank needs all blocks."""
    requests = family(3, list(range(45)), bypass_prefix_cache=True, max_tokens=30)
    big = Request("big", list(range(60)), 60, priority=5)
    expected = {r.id: alone(r)["tokens"] for r in (*requests, big)}
    engine, _ = paged_engine(8, max_running=2, chunk_tokens=32)
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[SequenceOutput]] = {r.id: [] for r in (*requests, big)}
    for output in [o for _ in range(3) for o in engine.step()]:
        outputs[output.id].append(output)
    for id, later in run(engine, big).items():
        outputs[id] += later
    assert {id: tokens(o) for id, o in outputs.items()} == expected
    engine.check_idle()


def test_one_family_name_with_two_prompts_shares_nothing_wrong():
    one, two = family(2, list(range(45)))[0], Request("other", list(range(5, 50)), 6, Sampling(seed=4), family="f")
    salted = Request("salted", list(range(45)), 6, Sampling(seed=4), family="f", cache_salt="b")
    outputs = run(paged_engine(64, chunk_tokens=16)[0], one, two, salted)
    for request in (one, two, salted):
        assert tokens(outputs[request.id]) == alone(request)["tokens"]
    assert outputs["salted"][0].cached_tokens == 0


def test_siblings_tell_what_the_first_found_in_the_cache():
    engine, _ = paged_engine(64, chunk_tokens=64)
    run(engine, Request("before", list(range(20)), 1))
    outputs = run(engine, *family(3, list(range(45))))
    assert [outputs[f"r{i}"][0].cached_tokens for i in range(3)] == [16, 16, 16]
    assert engine.stats().hit_tokens == 16


# Prompts told.


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 512])
def test_prompt_logprobs_have_the_same_bits_however_they_are_cut(chunk):
    request = Request("a", [i % 47 for i in range(150)], 3, GREEDY, prompt_logprobs=2)
    expected = alone(request)["prompt"]
    engine, runner = paged_engine(64, chunk_tokens=chunk)
    run(engine, Request("warm", request.prompt, 1))
    runner.plans.clear()
    outputs = run(engine, request)["a"]
    assert outputs[0].prompt_logprobs == expected
    assert len(expected) == 149
    assert outputs[0].cached_tokens == 0
    assert all(o.prompt_logprobs is None for o in outputs[1:])
    assert max(wanted for plan in runner.plans for _, _, _, wanted in plan) <= min(64, chunk)
    first = expected[0]
    assert first.rank >= 1
    assert len(first.top) == 2


def test_prompt_logprobs_are_those_of_the_same_tokens_chosen():
    answer = run(paged_engine(64)[0], Request("a", [1, 2, 3], 30, Sampling(seed=3), logprobs=3))["a"]
    prompt = [1, 2, 3, *tokens(answer)]
    told = run(paged_engine(64)[0], Request("b", prompt, 1, prompt_logprobs=3))["b"][0].prompt_logprobs
    assert told[2:] == [p for o in answer for p in o.logprobs]


def test_a_prompt_of_one_token_has_nothing_to_tell():
    (output,) = run(paged_engine(64)[0], Request("b", [1], 1, prompt_logprobs=3))["b"]
    assert output.prompt_logprobs == []


# Interjections.


@pytest.mark.parametrize("drafting", [False, True])
def test_an_interjection_comes_at_its_place(drafting):
    request = Request("a", [1, 2], 12, Sampling(seed=5), interjection=Interjection(4, [7, 8, 9]), logprobs=0)
    answer = alone(request)["tokens"]
    assert answer[4:7] == [7, 8, 9]
    assert answer[:4] == alone(msgspec.structs.replace(request, interjection=None))["tokens"][:4]
    guesser = Guesser({"a": answer}, {"a": 2}, VOCAB)
    engine, _ = paged_engine(64, proposer=guesser if drafting else None)
    assert tokens(run(engine, request)["a"]) == answer
    for had in range(12):
        (rest,) = run(engine, msgspec.structs.replace(request, generated=answer[:had])).values()
        assert tokens(rest) == answer[had:]


def test_an_interjection_outside_the_vocabulary_is_refused():
    engine, _ = paged_engine(64)
    bad = Request("a", [1], 4, interjection=Interjection(0, [VOCAB]))
    outputs = run(engine, bad, Request("b", [1], 4))
    assert "interjection" in outputs["a"][-1].error
    assert len(tokens(outputs["b"])) == 4


# Formats.


def formatted(*words: list[int], **more: Any) -> Request:
    return Request("a", [1, 2], 12, **({"sampling": Sampling(seed=5), "grammar": list_grammar(*words)} | more))


def test_a_format_is_kept_and_ends_the_answer():
    outputs = run(paged_engine(64, formats=ListFormats())[0], formatted([9, 8, 7]))["a"]
    assert (tokens(outputs), outputs[-1].finish) == ([9, 8, 7], FinishReason.EOS)


def test_an_answer_may_end_where_its_format_may():
    request = formatted([9], [9, 8, 7], eos_ids=[3], sampling=Sampling(temperature=0, logit_bias=[(3, 100.0)]))
    answer = alone(request)
    assert (answer["tokens"], answer["finish"]) == ([9, 3], FinishReason.EOS)
    longer = alone(msgspec.structs.replace(request, min_tokens=2))
    assert longer["tokens"] == [9, 8, 7]
    cut = alone(msgspec.structs.replace(request, max_tokens=1))
    assert (cut["tokens"], cut["finish"]) == ([9], FinishReason.LENGTH)


def test_a_format_that_ends_early_ends_min_tokens_too():
    answer = alone(formatted([9, 8], min_tokens=5, eos_ids=[3]))
    assert (answer["tokens"], answer["finish"]) == ([9, 8], FinishReason.EOS)
    held = alone(formatted([9, 8], [9, 8, 7], sampling=Sampling(bad_words=[[7]])))
    assert (held["tokens"], held["finish"]) == ([9, 8], FinishReason.EOS), "whole, and the rest is barred"


def test_contradictions_end_with_the_reason():
    answer = alone(formatted([9, 8], sampling=Sampling(bad_words=[[9, 8]])))
    assert answer["finish"] is FinishReason.ERROR
    why = "leaves no token after 1 tokens of the answer, together with sampling.bad_words; relax one of them"
    assert (answer["field"], answer["error"]) == ("format", why)
    assert answer["tokens"] == [9]
    forced = alone(formatted([9, 8], interjection=Interjection(1, [7])))
    assert forced["finish"] is FinishReason.ERROR
    assert "does not allow token 7" in forced["error"]
    assert forced["field"] == ""
    every = alone(Request("a", [1, 2], 12, sampling=Sampling(bad_words=[[i] for i in range(VOCAB)])))
    assert (every["field"], every["tokens"]) == ("sampling.bad_words", [])
    words = [[i] for i in range(VOCAB) if i != 3]
    early = Request("a", [1, 2], 12, min_tokens=2, eos_ids=[3], sampling=Sampling(bad_words=words))
    why = "leaves no token after 0 tokens of the answer, together with stopping.min_tokens; relax one of them"
    assert (alone(early)["field"], alone(early)["error"]) == ("sampling.bad_words", why)


def test_a_format_that_cannot_be_held_ends_only_its_request():
    bad = msgspec.structs.replace(formatted([1]), id="bad", grammar=msgspec.structs.replace(list_grammar(), kind="x"))
    engine, _ = paged_engine(64, formats=ListFormats())
    outputs = run(engine, bad, Request("b", [1], 4))
    assert outputs["bad"][-1].finish is FinishReason.ERROR
    assert outputs["bad"][-1].error == "x cannot be held here"
    assert outputs["bad"][-1].field == "format"
    assert len(tokens(outputs["b"])) == 4
    none, _ = paged_engine(64)
    (output,) = run(none, formatted([1]))["a"]
    assert "without formats" in output.error
    none.check_idle()


def test_a_resumed_answer_that_is_not_of_its_format_is_the_callers_mistake():
    answer = alone(formatted([9, 8, 7], generated=[9, 7]))
    assert (answer["finish"], answer["field"], answer["tokens"]) == (FinishReason.ERROR, "resume.sequences", [])
    assert answer["error"] == "are not of this request: 7 does not follow [9]"


def test_a_fault_of_ours_while_a_format_is_opened_blames_no_field():
    class Broken(ListFormats):
        def open(self, grammar):
            raise RuntimeError("out of luck")

    (output,) = run(paged_engine(64, formats=Broken())[0], formatted([9]))["a"]
    assert (output.finish, output.field, output.error) == (FinishReason.ERROR, "", "RuntimeError: out of luck")


def test_a_format_that_is_given_up_on_its_way_says_why():
    class GivenUp(ListFormats):
        def open(self, grammar):
            matcher = super().open(grammar)

            class Tired:
                error = "cannot be held: too much work"
                finished = False
                accept, rollback = matcher.accept, matcher.rollback

                def mask_into(self, row):
                    row[:] = 0
                    return False

            return Tired()

    (output,) = run(paged_engine(64, formats=GivenUp())[0], formatted([9]))["a"]
    assert (output.field, output.error) == ("format", "cannot be held: too much work")


def test_a_sequence_can_be_cancelled_while_its_format_is_opened():
    import threading

    gate = threading.Event()

    class Slow(ListFormats):
        def open(self, grammar):
            assert gate.wait(30)
            return super().open(grammar)

    engine, _ = paged_engine(64, formats=Slow())
    engine.add(formatted([9, 8]))
    engine.add(Request("b", [1], 4))
    assert len(engine.step()) == 1, "nobody waits for a format"
    engine.cancel("a")
    gate.set()
    outputs = run(engine)
    assert outputs["a"][-1].finish is FinishReason.CANCELLED
    engine.check_idle()
    engine.close()


# Traces.


def test_candidates_before_and_after():
    request = Request("a", [1, 2], 5, Sampling(temperature=0.7, top_k=2, seed=3), probe=Probe(candidates=4), logprobs=4)
    answer = alone(request)
    for token, trace, logprob in zip(answer["tokens"], answer["traces"], answer["logprobs"], strict=True):
        assert token in [c.token for c in trace.candidates]
        assert [c.token for c in trace.candidates][:4] == [id for id, _ in logprob.top]
        assert [c.before for c in trace.candidates] == pytest.approx([np.exp(v) for _, v in logprob.top], rel=1e-6)
        assert [c.after > 0 for c in trace.candidates] == [True, True, False, False]
        assert sum(c.after for c in trace.candidates) == pytest.approx(1)
    greedy = alone(msgspec.structs.replace(request, sampling=GREEDY))
    assert [[c.after for c in t.candidates] for t in greedy["traces"]] == [[1.0, 0.0, 0.0, 0.0]] * 5
