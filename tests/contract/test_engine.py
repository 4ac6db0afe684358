"""One suite over everything that keeps the contract `workers.engine.Engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from paged_runner import paged_engine

from workers.engine import Engine, EngineConfig, FinishReason, Interjection, Probe, Request, Sampling, SequenceOutput
from workers.engine.build import build_engine
from workers.engine.fake import FakeEngine

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=199,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
    )
    path = tmp_path_factory.mktemp("tiny_llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def fake(_: Path) -> Engine:
    return FakeEngine(max_context=256, max_running=4, chunk_tokens=32, vocab_size=199)


def paged(_: Path) -> Engine:
    return paged_engine(16, vocab=199, max_running=4, chunk_tokens=32)[0]


def tiny(path: Path) -> Engine:
    return build_engine(EngineConfig(str(path), max_running=4, chunk_tokens=32, cache_bytes=1 << 18))


@dataclass
class Case:
    """An engine, and another like it that shares nothing with it."""

    engine: Engine
    another: Callable[[], Engine]


@pytest.fixture(params=[fake, paged, tiny], ids=lambda make: make.__name__)
def case(request: pytest.FixtureRequest, tiny_llama: Path) -> Iterator[Case]:
    made: list[Engine] = []

    def make() -> Engine:
        made.append(request.param(tiny_llama))
        return made[-1]

    yield Case(make(), make)
    for engine in made:  # nothing may be left over, whatever the test did
        while engine.has_work():
            engine.step()
        engine.check_idle()
        assert engine.stats().blocks_in_use == 0
        engine.close()
        engine.close()


def finish(engine: Engine, *requests: Request) -> dict[str, list[SequenceOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work():
        step = engine.step()
        assert len({o.id for o in step}) == len(step), "at most one entry per sequence and step"
        for output in step:
            outputs.setdefault(output.id, []).append(output)
    return outputs


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


def test_an_idle_engine_has_nothing_to_do(case: Case):
    assert not case.engine.has_work()
    assert case.engine.step() == []
    case.engine.check_idle()


def test_length(case: Case):
    outputs = finish(case.engine, Request("a", [1, 2, 3], 7, GREEDY))["a"]
    assert len(tokens(outputs)) == 7
    assert [o.finish for o in outputs] == [None] * (len(outputs) - 1) + [FinishReason.LENGTH]
    assert all(0 <= t < case.engine.info.vocab_size for t in tokens(outputs))


def test_the_same_request_has_the_same_answer(case: Case):
    requests = [Request(f"r{i}", [5, 6, 7], 12, Sampling(seed=3)) for i in range(3)]
    together = finish(case.engine, *requests)
    later = finish(case.engine, requests[0])
    elsewhere = finish(case.another(), requests[0])
    assert len({tuple(tokens(o)) for o in (*together.values(), *later.values(), *elsewhere.values())}) == 1


def test_index_and_seed_make_different_answers(case: Case):
    requests = [Request("base", [5, 6, 7], 24, Sampling(seed=3)), Request("seed", [5, 6, 7], 24, Sampling(seed=4))]
    requests += [Request(f"index{i}", [5, 6, 7], 24, Sampling(seed=3), index=i) for i in (1, 2)]
    assert len({tuple(tokens(o)) for o in finish(case.engine, *requests).values()}) == 4


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_p=0.9, seed=11)], ids=["greedy", "drawn"])
@pytest.mark.parametrize("had", [1, 5, 19])
def test_a_broken_stream_goes_on_identically(case: Case, sampling: Sampling, had: int):
    whole = Request("a", list(range(40)), 20, sampling, logprobs=2, index=1)
    (outputs,) = finish(case.engine, whole).values()
    answer, logprobs = tokens(outputs), [p for o in outputs for p in o.logprobs or []]
    rest = Request("b", list(range(40)), 20, sampling, logprobs=2, index=1, generated=answer[:had])
    (resumed,) = finish(case.another(), rest).values()
    assert tokens(resumed) == answer[had:]
    assert [p for o in resumed for p in o.logprobs or []] == logprobs[had:]
    assert resumed[-1].finish is FinishReason.LENGTH


def test_a_stream_that_broke_after_its_last_token_only_ends(case: Case):
    (outputs,) = finish(case.engine, Request("a", [1], 3, GREEDY, generated=[4, 5, 6])).values()
    assert (tokens(outputs), outputs[-1].finish) == ([], FinishReason.LENGTH)
    (outputs,) = finish(case.engine, Request("b", [1], 9, GREEDY, generated=[4, 5], eos_ids=[5])).values()
    assert (tokens(outputs), outputs[-1].finish) == ([], FinishReason.EOS)


def test_eos_and_stop_tokens_end_and_are_reported(case: Case):
    prompt = [3, 1, 4]
    answer = tokens(finish(case.engine, Request("a", prompt, 12, GREEDY))["a"])
    for name, field, reason in (("b", "eos_ids", FinishReason.EOS), ("c", "stop_ids", FinishReason.STOP_TOKEN)):
        outputs = finish(case.engine, Request(name, prompt, 12, GREEDY, **{field: [answer[4]]}))[name]
        assert tokens(outputs) == answer[: answer.index(answer[4]) + 1]
        assert outputs[-1].finish is reason
    both = finish(case.engine, Request("d", prompt, 12, GREEDY, eos_ids=[answer[4]], stop_ids=[answer[4]]))["d"]
    assert both[-1].finish is FinishReason.EOS


def test_min_tokens_holds_eos_and_stop_tokens_back(case: Case):
    prompt = [3, 1, 4]
    answer = tokens(finish(case.engine, Request("a", prompt, 10, GREEDY))["a"])
    held = Request("b", prompt, 10, GREEDY, min_tokens=6, eos_ids=[answer[0]], stop_ids=[answer[2]])
    got = tokens(finish(case.engine, held)["b"])
    assert len(got) > 6
    assert not {answer[0], answer[2]} & set(got[:6])
    resumed = Request(
        "c", prompt, 10, GREEDY, min_tokens=6, eos_ids=[answer[0]], stop_ids=[answer[2]], generated=got[:4]
    )
    assert tokens(finish(case.engine, resumed)["c"]) == got[4:]


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs(case: Case, count: int):
    outputs = finish(case.engine, Request("a", [9, 8], 6, Sampling(seed=2), logprobs=count))["a"]
    logprobs = [p for o in outputs for p in o.logprobs or []]
    assert len(logprobs) == len(tokens(outputs)) == 6
    for token, entry in zip(tokens(outputs), logprobs, strict=True):
        assert entry.logprob <= 0
        assert entry.rank >= 1
        assert len(entry.top) == count
        assert [v for _, v in entry.top] == sorted((v for _, v in entry.top), reverse=True)
        if entry.rank <= count:
            assert entry.top[entry.rank - 1] == (token, entry.logprob)
    assert all(o.logprobs is None for o in finish(case.engine, Request("b", [9, 8], 6))["b"])


def test_cached_tokens_are_told_once(case: Case):
    prompt = list(range(50))
    first = finish(case.engine, Request("a", prompt, 3, GREEDY))["a"]
    assert [o.cached_tokens for o in first] == [0, None, None]
    second = finish(case.engine, Request("b", prompt, 3, GREEDY))["b"]
    assert second[0].cached_tokens == 48
    assert tokens(second) == tokens(first)
    other = finish(case.engine, Request("c", prompt, 3, GREEDY, cache_salt="other"))["c"]
    bypass = finish(case.engine, Request("d", prompt, 3, GREEDY, bypass_prefix_cache=True))["d"]
    assert other[0].cached_tokens == bypass[0].cached_tokens == 0
    assert tokens(other) == tokens(bypass) == tokens(first)


def test_cancel_while_waiting_and_while_running(case: Case):
    engine = case.engine
    for i in range(6):  # four run, two wait
        engine.add(Request(f"r{i}", [i, i], 60, GREEDY))
    for _ in range(3):
        engine.step()
    engine.cancel("r1")
    engine.cancel("r5")
    engine.cancel("nobody")
    ended = {o.id: o.finish for o in engine.step() if o.finish is not None}
    assert ended == {"r1": FinishReason.CANCELLED, "r5": FinishReason.CANCELLED}
    rest = finish(engine)
    assert set(rest) == {"r0", "r2", "r3", "r4"}
    assert {o[-1].finish for o in rest.values()} == {FinishReason.LENGTH}
    engine.cancel("r0")
    assert engine.step() == []


def test_cancelled_blocks_are_free_at_once(case: Case):
    engine = case.engine
    engine.add(Request("a", list(range(100)), 50, GREEDY))
    while not engine.step():
        pass
    assert engine.stats().blocks_in_use >= 6
    engine.cancel("a")
    engine.step()
    assert engine.stats().blocks_in_use == 0
    assert engine.stats().running == 0


def test_more_than_can_run_wait_their_turn(case: Case):
    requests = [Request(f"r{i}", [i], 5, GREEDY) for i in range(11)]
    outputs = finish(case.engine, *requests)
    assert set(outputs) == {f"r{i}" for i in range(11)}
    assert {o[-1].finish for o in outputs.values()} == {FinishReason.LENGTH}
    assert case.engine.stats().generated_tokens == 55
    assert case.engine.stats().waiting == case.engine.stats().running == 0


def test_what_can_never_fit_ends_with_the_reason(case: Case):
    context = case.engine.info.max_context
    outputs = finish(case.engine, Request("a", [1] * context, 5, GREEDY), Request("b", [1], 2, GREEDY))
    assert outputs["a"][-1].finish is FinishReason.ERROR
    assert str(context) in outputs["a"][-1].error
    assert outputs["b"][-1].finish is FinishReason.LENGTH


def test_the_whole_context_can_be_used(case: Case):
    context = case.engine.info.max_context
    outputs = finish(case.engine, Request("a", [i % 90 for i in range(context - 2)], 2, GREEDY))["a"]
    assert len(tokens(outputs)) == 2


def test_outputs_come_in_the_order_of_admission(case: Case):
    for i in range(4):
        case.engine.add(Request(f"r{i}", [i], 5, GREEDY))
    assert [o.id for o in case.engine.step()] == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=8)], ids=["greedy", "drawn"])
def test_a_family_gives_each_what_it_has_alone(case: Case, sampling: Sampling):
    prompt = list(range(40))
    members = [Request(f"r{i}", prompt, 6, sampling, index=i, family="f", priority=i % 2) for i in range(5)]
    together = finish(case.engine, *members)
    for member in members:
        (alone,) = finish(case.another(), member).values()
        assert tokens(together[member.id]) == tokens(alone)
    assert {o[0].cached_tokens for o in together.values()} == {0}
    case.engine.add(members[0])
    case.engine.add(members[1])
    case.engine.step()
    case.engine.cancel("r0")
    rest = finish(case.engine)
    assert rest["r0"][-1].finish is FinishReason.CANCELLED


@pytest.mark.parametrize("length", [1, 2, 50, 100])
def test_prompt_logprobs_come_first_and_once(case: Case, length: int):
    prompt = [i % 90 for i in range(length)]
    finish(case.engine, Request("warm", prompt, 1, GREEDY))
    outputs = finish(case.engine, Request("a", prompt, 3, GREEDY, prompt_logprobs=2))["a"]
    told = outputs[0].prompt_logprobs
    assert told is not None
    assert len(told) == length - 1
    assert all(len(p.top) == 2 and p.logprob <= 0 and p.rank >= 1 for p in told)
    assert outputs[0].cached_tokens == 0
    assert all(o.prompt_logprobs is None for o in outputs[1:])
    (elsewhere,) = finish(case.another(), Request("a", prompt, 3, GREEDY, prompt_logprobs=2)).values()
    assert elsewhere[0].prompt_logprobs == told


def test_a_probe_gives_one_trace_for_each_token(case: Case):
    request = Request("a", [1, 2, 3], 5, Sampling(seed=1), probe=Probe(candidates=3, attention=[0]))
    outputs = finish(case.engine, request, Request("b", [1, 2, 3], 5, Sampling(seed=1)))
    traces = [t for o in outputs["a"] for t in o.traces or []]
    assert tokens(outputs["a"]) == tokens(outputs["b"])
    assert len(traces) == 5
    for token, trace in zip(tokens(outputs["a"]), traces, strict=True):
        assert token in [c.token for c in trace.candidates]
        assert len(trace.candidates) in (3, 4)
    assert all(o.traces is None for o in outputs["b"])


def test_an_interjection_is_said_at_its_place(case: Case):
    request = Request("a", [1, 2, 3], 9, Sampling(seed=1), interjection=Interjection(3, [11, 12]))
    answer = tokens(finish(case.engine, request)["a"])
    assert answer[3:5] == [11, 12]
    resumed = Request("b", [1, 2, 3], 9, Sampling(seed=1), interjection=request.interjection, generated=answer[:4])
    assert tokens(finish(case.another(), resumed)["b"]) == answer[4:]


def test_barred_and_biased_tokens(case: Case):
    answer = tokens(finish(case.engine, Request("a", [1, 2, 3], 4, GREEDY))["a"])
    sampling = Sampling(temperature=0, bad_words=[[answer[0]]])
    barred = tokens(finish(case.engine, Request("b", [1, 2, 3], 4, sampling))["b"])
    assert answer[0] not in barred


def test_who_wants_spans_is_told_how_long_it_was_computed_by_its_first_output(case: Case):
    prompt = list(range(1, 80))  # three steps at least
    outputs = finish(
        case.engine,
        Request("told", prompt, 4, GREEDY, bypass_prefix_cache=True, traceparent="00-1-2-01"),
        Request("plain", prompt, 4, GREEDY, bypass_prefix_cache=True),
    )
    told = [o.computing_us for o in outputs["told"]]
    assert told[0] > 0
    assert not any(told[1:])
    assert not any(o.computing_us for o in outputs["plain"])
    case.engine.add(Request("gone", prompt, 4, GREEDY, traceparent="00-1-2-01"))
    case.engine.cancel("gone")
    assert [o.computing_us for o in case.engine.step()] == [0]
