"""A gateway tells the router what its prompts' blocks are called, and requests go to where they lie."""

from __future__ import annotations

import random
from typing import Any

import pytest
from router_stage import Stage, until

from router import stream
from router.policy import choose_of_two
from router.port import Query
from understudy.v1 import inference_pb2 as pb
from workers.cache.events import HINT_BYTES, hints
from workers.cache.keys import block_keys, prompt_root, root_key
from workers.engine import EngineStats
from workers.engine.fake import FakeEngine

PROMPT = "x" * 100  # six full blocks, and a tail


def asked(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[Query]:
    """Every query that reaches the router from now on."""
    queries, assign = [], stage.router.router.assign
    monkeypatch.setattr(stage.router.router, "assign", lambda query: queries.append(query) or assign(query))
    return queries


async def two(stage: Stage, **engine: Any) -> None:
    for name in ("r0", "r1"):
        stage.add_replica(name, **engine)
    gateway = await stage.open()
    await gateway.refresh()
    await until(lambda: len(gateway.pool.alive()) == 2)


def names(text: str, salt: str = "") -> bytes:
    return hints(block_keys(root_key("fake", "float32", "fake", salt), list(text.encode())[:-1], 16))


async def test_the_second_request_goes_where_its_prefix_is(stage: Stage) -> None:
    await two(stage, step_s=lambda rows: 0.0002 * rows)  # so that a hiccup of this machine decides nothing
    holds = (await stage.generate(text=PROMPT, stopping=pb.Stopping(max_tokens=2))).infos
    assert holds[0].cached_tokens.device == 0
    for turn in range(1, 6):
        other = await stage.generate(text=str(turn) * 100, stopping=pb.Stopping(max_tokens=2))
        again = await stage.generate(text=PROMPT + "y" * turn, stopping=pb.Stopping(max_tokens=2))
        assert other.infos[0].cached_tokens.device == 0
        assert again.infos[0].cached_tokens.device == 96
    figures = stage.router.router.figures()
    assert figures.decisions["device"] == 5
    assert figures.reused_tokens["device"] == 5 * 96
    assert figures.decisions["least_work"] == 6
    assert figures.index.gaps == 0


async def test_what_the_blocks_of_a_prompt_are_called(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    await two(stage)
    queries = asked(stage, monkeypatch)
    short = pb.Stopping(max_tokens=2)
    await stage.generate(text=PROMPT, stopping=short, priority=-7)
    await stage.generate(text=PROMPT, stopping=short, kv=pb.KvOptions(cache_salt="s"))
    await stage.generate(text=PROMPT, stopping=short, kv=pb.KvOptions(bypass_prefix_cache=True))
    await stage.generate(text=PROMPT, stopping=short, response=pb.ResponseOptions(prompt_logprobs=0))
    await stage.generate(text="x" * 96, stopping=short)
    assert [q.priority for q in queries] == [-7, 0, 0, 0, 0]
    assert [q.keys for q in queries] == [names(PROMPT), names(PROMPT, "\x1fs"), b"", b"", names("x" * 96)]
    assert [len(q.keys) // HINT_BYTES for q in queries] == [6, 6, 0, 0, 5]


async def test_long_prompts_are_hashed_beside_the_streams(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_INLINE_TOKENS", 50)
    await two(stage)
    queries = asked(stage, monkeypatch)
    await stage.generate(text=PROMPT, stopping=pb.Stopping(max_tokens=2))
    assert queries[0].keys == names(PROMPT)


async def test_one_replica_is_no_choice_and_costs_no_hashing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    await stage.open()
    queries = asked(stage, monkeypatch)
    await stage.generate(text=PROMPT, stopping=pb.Stopping(max_tokens=2))
    assert queries[0].keys == b""
    assert stage.router.router.figures().decisions["only"] == 1


async def test_a_stream_that_goes_on_is_known_by_prompt_and_answer(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await two(stage)
    queries = asked(stage, monkeypatch)
    ids = list(PROMPT.encode())
    resume = pb.Resume(model_fingerprint="fake", numerics_id="fake", prompt_token_ids=ids, seed=1)
    resume.sequences.add(index=0, token_ids=[7] * 30)
    await stage.generate(text=PROMPT, stopping=pb.Stopping(max_tokens=40, ignore_eos=True), resume=resume)
    root = root_key("fake", "float32", "fake", "")
    assert queries[0].keys == hints(block_keys(root, [*ids, *[7] * 30][:-1], 16))


def test_a_gateway_and_an_engine_call_long_prompts_alike() -> None:
    place = ("model", "bfloat16", "numerics", "salt")
    short, long = prompt_root(*place, 100, 100), prompt_root(*place, 101, 100)
    assert short == prompt_root(*place, 101, 0) == root_key(*place)
    assert long == root_key("model", "bfloat16", "numerics/long-prompt", "salt")


# Without the router.


async def test_without_the_router_gateways_choose_of_two(stage: Stage) -> None:
    gates = [stage.gate() for _ in range(3)]
    for i, gate in enumerate(gates):
        stage.add_replica(f"r{i}", step_s=1.0, sleep=gate)
    gateway = await stage.open()
    await gateway.refresh()
    await until(lambda: len(gateway.pool.alive()) == 3)
    stage.router.reachable = False
    import asyncio

    calls = [
        asyncio.create_task(stage.generate(text=PROMPT, stopping=pb.Stopping(max_tokens=2, ignore_eos=True)))
        for _ in range(30)
    ]
    await until(lambda: sum(link.attempts for link in gateway.pool.alive()) == 30)
    busy = sorted(link.attempts for link in gateway.pool.alive())
    assert busy[-1] <= 14, "the less loaded of two each time: far from one having all"
    for gate in gates:
        gate.open()
    await asyncio.gather(*calls)
    stage.router.reachable = True
    await gateway.refresh()
    assert gateway.metrics.alone._value.get() == 30


def test_the_less_loaded_of_two_by_prompts_and_sequences() -> None:
    info, rng = FakeEngine().info, random.Random(0)
    idle, queued = EngineStats(), EngineStats(waiting=1, waiting_prefill_tokens=4000)
    running, full = EngineStats(running=60), EngineStats(running=64, waiting=9)
    for worse in (queued, running, full):
        for pair in ([idle, worse], [worse, idle]):
            assert pair[choose_of_two(pair, [info] * 2, 500, rng)] is idle
    drawn = {choose_of_two([idle] * 5, [info] * 5, 10, rng) for _ in range(100)}
    assert drawn == set(range(5)), "equal ones take turns"
    assert choose_of_two([full], [info], 10, rng) == 0
