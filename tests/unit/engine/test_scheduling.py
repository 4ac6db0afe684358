"""The scheduler, the cache and the core together, over a runner that reads what the tables say."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_runner import paged_engine

from workers.engine import FinishReason, Request, Sampling, SequenceOutput
from workers.engine.core import EngineCore


def run(engine: EngineCore, requests: list[Request], limit: int = 20_000) -> dict[str, list[SequenceOutput]]:
    """Adds all requests, steps until nothing is left, and returns every sequence's outputs."""
    outputs: dict[str, list[SequenceOutput]] = {r.id: [] for r in requests}
    for request in requests:
        engine.add(request)
    for _ in range(limit):
        if not engine.has_work():
            return outputs
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.check()
    raise AssertionError("the engine never became idle")


def answer(outputs: list[SequenceOutput]) -> tuple[list[int], list[float], FinishReason | None]:
    tokens = [t for o in outputs for t in o.token_ids]
    return tokens, [p.logprob for o in outputs for p in o.logprobs or []], outputs[-1].finish


sizes = st.tuples(st.integers(1, 70), st.integers(1, 40))
requests_strategy = st.lists(
    st.tuples(sizes, st.integers(0, 2), st.integers(-1, 1), st.booleans(), st.booleans(), st.integers(0, 3)),
    min_size=1,
    max_size=14,
)


def build_requests(shapes: list[tuple[tuple[int, int], int, int, bool, bool, int]]) -> list[Request]:
    """Prompts that share beginnings: family f counts up from f."""
    return [
        Request(
            id=f"r{i}",
            prompt=[(family * 7 + p) % 50 for p in range(prompt)],
            max_tokens=answer,
            sampling=Sampling(temperature=0.9 if sampled else 0.0, top_p=0.9, seed=i),
            eos_ids=[3],
            logprobs=1,
            priority=priority,
            bypass_prefix_cache=bypass,
            min_tokens=min(minimum, answer),
        )
        for i, ((prompt, answer), family, priority, sampled, bypass, minimum) in enumerate(shapes)
    ]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=requests_strategy,
    blocks=st.integers(7, 24),
    chunk=st.integers(1, 80),
    running=st.integers(1, 8),
    windows=st.sampled_from([[None], [None, 18], [34], [17, None, 1]]),
    prefix_cache=st.booleans(),
)
def test_answers_do_not_depend_on_company(shapes, blocks, chunk, running, windows, prefix_cache):
    """Whatever runs beside it, in whatever chunks, with whatever preemption: the answer it has alone."""
    requests = build_requests(shapes)
    alone = {}
    for request in requests:
        single, _ = paged_engine(64, windows, chunk_tokens=512)
        alone[request.id] = answer(run(single, [request])[request.id])
        single.check_idle()
    engine, runner = paged_engine(blocks, windows, max_running=running, chunk_tokens=chunk, prefix_cache=prefix_cache)
    together = run(engine, requests)
    assert {id: answer(o) for id, o in together.items()} == alone
    engine.check_idle()
    for plan in runner.plans:
        prefill = sum(rows for _, _, rows, _ in plan if rows > 1)
        decoding = sum(1 for _, _, rows, _ in plan if rows == 1)
        assert prefill + decoding <= max(chunk, decoding)
        assert prefill <= chunk
        assert len(plan) <= running


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    shapes=requests_strategy,
    cancels=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 13)), max_size=8),
    failures=st.lists(st.integers(0, 30), max_size=3),
)
def test_nothing_leaks_when_sequences_are_cancelled_or_fail(shapes, cancels, failures):
    requests = build_requests(shapes)
    engine, runner = paged_engine(12, [None, 18], chunk_tokens=24)
    finishes: dict[str, list[FinishReason]] = {r.id: [] for r in requests}
    for request in requests:
        engine.add(request)
    step = 0
    while engine.has_work():
        for at, which in cancels:
            if at == step:
                engine.cancel(f"r{which}")
        if step in failures:
            runner.fail_with = ValueError("on demand")
        for output in engine.step():
            if output.finish is not None:
                finishes[output.id].append(output.finish)
        engine.check()
        step += 1
    assert all(len(f) == 1 for f in finishes.values()), "every sequence ends exactly once"
    engine.check_idle()


def test_decoding_never_waits_for_a_long_prompt():
    engine, runner = paged_engine(64, chunk_tokens=16)
    engine.add(Request("short", [1, 2, 3], 40))
    engine.step()
    engine.add(Request("long", list(range(49)) * 10, 4))
    run(engine, [])
    mine = [i for i, plan in enumerate(runner.plans) if any(c[0] == "short" for c in plan)]
    assert mine == list(range(40)), "the short one has a row in every step until it is over"
    assert any(c[0] == "long" and c[2] > 1 for c in runner.plans[1]), "and the long one advances beside it"


def test_several_prompts_share_a_step():
    engine, runner = paged_engine(64, chunk_tokens=64)
    run(engine, [Request(f"r{i}", [i] * 20, 2) for i in range(4)])
    assert [(c[0], c[2]) for c in runner.plans[0]] == [("r0", 20), ("r1", 20), ("r2", 20), ("r3", 4)]
    assert [(c[0], c[2]) for c in runner.plans[1]] == [("r0", 1), ("r1", 1), ("r2", 1), ("r3", 16)]


def test_prompts_get_half_of_a_step_while_anybody_decodes():
    engine, runner = paged_engine(64, chunk_tokens=64)
    engine.add(Request("short", [1, 2, 3], 4))
    engine.step()
    run(engine, [Request("long", list(range(49)) * 4, 1)])
    assert [plan[-1][2] for plan in runner.plans] == [3, 32, 32, 32, 64, 36]


def test_larger_priority_goes_first():
    engine, runner = paged_engine(64, max_running=1, chunk_tokens=64)
    run(engine, [Request("low", [1] * 5, 2, priority=-1), Request("high", [2] * 5, 2, priority=5)])
    assert [plan[0][0] for plan in runner.plans] == ["high", "high", "low", "low"]


def test_the_youngest_is_preempted_and_goes_on():
    engine, _ = paged_engine(6, max_running=4, chunk_tokens=64)
    outputs = run(engine, [Request(f"r{i}", [i] * 15, 60) for i in range(3)])
    assert engine.stats().preemptions > 0
    assert all(len(answer(o)[0]) == 60 for o in outputs.values())
    assert all(o[0].cached_tokens == 0 and o[1].cached_tokens is None for o in outputs.values())
    engine.check_idle()


def test_rows_already_planned_are_taken_back_from_whoever_is_preempted():
    """A prompt of better rank runs out of blocks after the decoding one has got its row of this step."""
    low, high = Request("low", [1] * 16, 90, priority=0), Request("high", [2] * 80, 3, priority=1)
    alone = {r.id: answer(run(paged_engine(64)[0], [r])[r.id]) for r in (low, high)}
    engine, runner = paged_engine(8, chunk_tokens=4)
    engine.add(low)
    outputs = [engine.step() for _ in range(12)]
    together = run(engine, [high])
    low_outputs = [o for step in outputs for o in step] + together["low"]
    assert engine.stats().preemptions == 1
    assert {"low": answer(low_outputs), "high": answer(together["high"])} == alone
    at = next(i for i, plan in enumerate(runner.plans) if i > 12 and [c[0] for c in plan] == ["high"])
    assert [c[0] for c in runner.plans[at - 1]] == ["low", "high"], "until then low had its row in every step"
    assert runner.plans[at][0][2] > 1, "and high was still computing its prompt"
    engine.check_idle()


def test_a_sequence_that_can_never_fit_is_refused_with_the_reason():
    engine, _ = paged_engine(4, max_context=1000)
    (output,) = run(engine, [Request("big", [1] * 60, 20)])["big"]
    assert output.finish is FinishReason.ERROR
    assert "60 prompt tokens and 20 more" in output.error
    (output,) = run(engine, [Request("long", [1] * 990, 20)])["long"]
    assert "exceed the context of 1000" in output.error
    engine.check_idle()


def test_a_failed_forward_ends_only_its_sequences():
    engine, runner = paged_engine(64, max_running=1, chunk_tokens=64)
    engine.add(Request("a", [1] * 20, 5))
    engine.add(Request("b", [2] * 20, 5))
    engine.step()
    runner.fail_with = RuntimeError("a bad day")
    (failed,) = engine.step()
    assert (failed.id, failed.finish, failed.error) == ("a", FinishReason.ERROR, "RuntimeError: a bad day")
    outputs = run(engine, [Request("c", [1] * 20, 5)])
    assert answer(outputs["c"])[2] is FinishReason.LENGTH
    assert engine.stats().generated_tokens == 1 + 5 + 5
    engine.check_idle()


def test_blocks_behind_the_window_are_given_back_while_running():
    engine, _ = paged_engine([64, 64], [16, 40], chunk_tokens=16)
    engine.add(Request("a", list(range(49)) * 8, 30))
    while not (outputs := engine.step()):
        pass
    assert outputs[0].finish is None
    assert engine.stats().blocks_in_use <= (16 + 16) // 16 + 1 + (40 + 16) // 16 + 1
    run(engine, [Request("b", [1], 1)])


def test_answers_join_the_prefix_tree():
    engine, _ = paged_engine(64, chunk_tokens=64)
    prompt = list(range(30))
    first = answer(run(engine, [Request("a", prompt, 40)])["a"])[0]
    second = run(engine, [Request("b", prompt + first, 4)])["b"]
    assert second[0].cached_tokens == (30 + 40 - 1) // 16 * 16
    assert engine.stats().hit_tokens == second[0].cached_tokens
    assert engine.stats().queried_tokens == 30 + 70
    third = run(engine, [Request("c", prompt, 4, cache_salt="another tenant")])["c"]
    fourth = run(engine, [Request("d", prompt, 4, bypass_prefix_cache=True)])["d"]
    assert third[0].cached_tokens == fourth[0].cached_tokens == 0


def test_a_prompt_that_is_wholly_cached_still_computes_one_row():
    engine, runner = paged_engine(64, chunk_tokens=64)
    run(engine, [Request("a", [5] * 32, 1)])
    outputs = run(engine, [Request("b", [5] * 32, 1)])["b"]
    assert outputs[0].cached_tokens == 16
    assert runner.plans[-1] == [("b", 16, 16, 1)]


@pytest.mark.parametrize(
    ("name", "arguments"), [("max_running", {"max_running": 0}), ("chunk_tokens", {"chunk_tokens": 0})]
)
def test_sizes_are_checked(name, arguments):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        paged_engine(4, **arguments)
