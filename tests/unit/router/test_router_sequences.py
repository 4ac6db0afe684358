"""Several sequences of one prompt, what is told of the prompt, and how tokens were chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from router_stage import EOS, VOCAB, Stage, problem, says, until

from router.admission import Limits
from router.answer import Answer
from router.clock import LoopClock
from router.dispatch import Patience
from router.models import SamplingDefaults, ServedModel
from router.port import Query
from router.state import Router
from router.stream import Batch
from router.text import ModelText
from router.validate import validate
from understudy.v1 import inference_pb2 as pb
from workers.engine import FinishReason, Request
from workers.engine.fake import FakeEngine

N = 4
LENGTH = 24
OPEN_END = pb.Stopping(max_tokens=LENGTH, ignore_eos=True)


def four(**fields: Any) -> pb.GenerateRequest:
    given: dict[str, Any] = {"text": "hi", "stopping": OPEN_END, "sampling": pb.Sampling(seed=11, n=N)}
    return pb.GenerateRequest(**(given | fields))


async def take(call: Any, received: list[Any]) -> None:
    """Puts what comes into `received`, whatever the end."""
    async for message in call:
        received.append(message)


class Split:
    """A stream's messages by sequence; every one has exactly one Finish, and nothing comes after it."""

    def __init__(self, messages: Sequence[pb.GenerateResponse], n: int = N) -> None:
        assert messages[0].HasField("prompt_info")
        assert sum(m.HasField("prompt_info") for m in messages) == 1
        self.info = messages[0].prompt_info
        self.deltas: list[list[pb.Delta]] = [[] for _ in range(n)]
        self.finishes: dict[int, pb.Finish] = {}
        for message in messages[1:]:
            if message.HasField("finish"):
                assert message.finish.index not in self.finishes
                self.finishes[message.finish.index] = message.finish
            else:
                assert message.delta.index not in self.finishes
                self.deltas[message.delta.index].append(message.delta)
        self.echoes = [[d for d in deltas if d.echo] for deltas in self.deltas]
        answers = [[d for d in deltas if not d.echo] for deltas in self.deltas]
        self.ids = [[i for d in deltas for i in d.token_ids] for deltas in answers]
        self.texts = ["".join(d.text for d in deltas) for deltas in answers]
        self.logprobs = [[p.token_id for d in deltas for p in d.logprobs] for deltas in answers]

    def reasons(self) -> list[str]:
        names = {i: pb.FinishReason.Name(f.reason).removeprefix("FINISH_REASON_") for i, f in self.finishes.items()}
        return [names[i] for i in sorted(names)]


async def whole(stage: Stage, request: pb.GenerateRequest) -> Split:
    n = request.sampling.n or 1
    return Split([m async for m in stage.stub.Generate(request)], n)


async def until_each(call: Any, messages: list[pb.GenerateResponse], each: int) -> None:
    """Takes messages until at least so many tokens of each sequence have come. Let some more steps be made, for
    sequences need not begin in one step."""
    while not messages or min(map(len, Split(messages).ids)) < each:
        messages.append(await call.read())


async def begin(stage: Stage, request: pb.GenerateRequest, each: int) -> tuple[Any, list[pb.GenerateResponse]]:
    """A stream of which that has come."""
    call = stage.stub.Generate(request)
    messages: list[pb.GenerateResponse] = []
    await until_each(call, messages, each)
    return call, messages


async def rest_of(call: Any, messages: list[pb.GenerateResponse]) -> Split:
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return Split(messages)


def sent(stage: Stage, name: str = "r0") -> list[Request]:
    return [m for m in stage.replicas[name].channels[0].sent if isinstance(m, Request)]


def per_index(request: Request) -> Sequence[int]:
    return [b"zero", b"one", b"two", b"three"][request.index]


async def test_every_sequence_has_its_answer_its_finish_and_its_usage(stage: Stage) -> None:
    stage.add_replica(answer=per_index)
    await stage.open()
    split = await whole(stage, four(stopping=pb.Stopping()))
    assert split.texts == ["zero", "one", "two", "three"]
    assert split.ids == [[*t.encode(), EOS] for t in split.texts]
    assert split.reasons() == ["EOS"] * N
    assert [split.finishes[i].usage.completion_tokens for i in range(N)] == [5, 4, 4, 6]
    assert {f.usage.prompt_tokens for f in split.finishes.values()} == {2}


async def test_one_family_at_one_replica(stage: Stage) -> None:
    for name in ("r0", "r1"):
        stage.add_replica(name)
    gateway = await stage.open()
    await until(lambda: len(gateway.pool.alive()) == 2)
    split = await whole(stage, four())
    requests = [*sent(stage, "r0"), *sent(stage, "r1")]
    assert [r.index for r in requests] == [0, 1, 2, 3]
    assert not (sent(stage, "r0") and sent(stage, "r1"))
    assert len({r.family for r in requests}) == 1
    assert requests[0].family
    assert len({r.id for r in requests}) == N
    assert len({tuple(ids) for ids in split.ids}) == N
    # A sequence is what it would be alone.
    assert (await whole(stage, four(sampling=pb.Sampling(seed=11)))).ids[0] == split.ids[0]
    other = await whole(stage, four())
    assert other.ids == split.ids
    families = {r.family for r in [*sent(stage, "r0"), *sent(stage, "r1")]}
    assert len(families) == 3  # of the two with several sequences, and none of the one


async def test_a_grant_counts_for_all_its_sequences(stage: Stage) -> None:
    stage.router.router = Router(LoopClock(), limits=Limits(max_waiting=3))
    stage.add_replica(max_running=1)
    router = stage.router.router
    router.assign(Query("fake", 10, sequences=4))
    assert router.leases == 1
    with pytest.raises(Exception, match="queue is full"):
        router.assign(Query("fake", 10))
    router.release([1])


@pytest.mark.parametrize("losses", [1, 2])
async def test_a_replica_lost_under_four_sequences(stage: Stage, losses: int) -> None:
    """Every sequence goes on exactly once, nothing comes twice, and they stay together."""
    gates = {f"r{i}": stage.gate() for i in range(losses + 1)}
    for name, gate in gates.items():
        stage.add_replica(name, step_s=1.0, sleep=gate)
    gateway = await stage.open()
    await until(lambda: len(gateway.pool.alive()) == len(gates))
    request = four(response=pb.ResponseOptions(logprobs=1, prompt_logprobs=1, echo=True))
    call = stage.stub.Generate(request)
    messages: list[pb.GenerateResponse] = []

    def running_on() -> str:
        return next((n for n, r in stage.replicas.items() if len(r.loop._owners) == N and not r.dead), "")

    for loss in range(losses):
        await until(running_on)
        name = running_on()
        gates[name].let(8)
        await until_each(call, messages, 5 * (loss + 1))
        stage.replicas[name].kill()
    for gate in gates.values():
        gate.open()
    split = await rest_of(call, messages)
    assert gateway.dispatcher.failovers == losses
    assert split.reasons() == ["LENGTH"] * N
    assert [len(ids) for ids in split.ids] == [LENGTH] * N
    assert split.logprobs == split.ids
    assert [len(e) for e in split.echoes] == [1] * N
    again = await whole(stage, request)
    assert again.ids == split.ids
    assert again.texts == split.texts
    assert again.info.prompt_logprobs == split.info.prompt_logprobs


async def test_one_sequence_fails_and_goes_on_alone(stage: Stage) -> None:
    gates = {name: stage.gate() for name in ("r0", "r1")}
    for name, gate in gates.items():
        stage.add_replica(name, step_s=1.0, sleep=gate)
    gateway = await stage.open()
    await until(lambda: len(gateway.pool.alive()) == 2)
    for gate in gates.values():
        gate.let(6)
    call, messages = await begin(stage, four(), 4)
    (name,) = [n for n, r in stage.replicas.items() if r.loop._owners]
    inner = [i for i, owner in stage.replicas[name].loop._owners.items() if owner.id == sent(stage, name)[2].id]
    stage.replicas[name].engine.fail_sequence(inner[0], "the forward failed")  # type: ignore[attr-defined]
    for gate in gates.values():
        gate.open()
    split = await rest_of(call, messages)
    assert split.reasons() == ["LENGTH"] * N
    assert gateway.dispatcher.failovers == 1
    (other,) = {"r0", "r1"} - {name}
    (moved,) = sent(stage, other)
    assert (moved.index, moved.family) == (2, sent(stage, name)[0].family)
    assert moved.generated == split.ids[2][: len(moved.generated)]
    assert (await whole(stage, four())).ids == split.ids


async def test_a_sequence_that_has_stopped_is_cancelled_alone(stage: Stage) -> None:
    gate = stage.gate()
    replica = stage.add_replica(answer=lambda r: b"a STOP" if r.index == 1 else b"x" * 40, step_s=1.0, sleep=gate)
    await stage.open()
    gate.let(8)
    call = stage.stub.Generate(four(stopping=pb.Stopping(stop=["STOP"], max_tokens=30)))
    messages = []
    while not messages or not messages[-1].HasField("finish"):
        messages.append(await call.read())
    assert (messages[-1].finish.index, messages[-1].finish.stop) == (1, "STOP")
    assert messages[-1].finish.usage.completion_tokens == 6
    cancels = [m for m in replica.channels[0].sent if not isinstance(m, Request)]
    assert [c.id for c in cancels] in ([], [sent(stage)[1].id])
    gate.open()
    split = await rest_of(call, messages)
    assert split.reasons() == ["LENGTH", "STOP_SEQUENCE", "LENGTH", "LENGTH"]
    assert split.texts == ["x" * 30, "a ", "x" * 30, "x" * 30]


async def test_a_deadline_ends_every_sequence(stage: Stage) -> None:
    gate = stage.gate()
    replica = stage.add_replica(step_s=1.0, sleep=gate)
    await stage.open()
    gate.let(3)
    messages: list[pb.GenerateResponse] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await take(stage.stub.Generate(four(), timeout=2.0), messages)
    assert problem(caught.value)[0] == "DEADLINE_EXCEEDED"
    split = Split(messages)
    assert split.reasons() == ["TIMEOUT"] * N
    assert all(2 <= len(ids) <= 3 for ids in split.ids)  # they need not begin in one step
    assert [split.finishes[i].usage.completion_tokens for i in range(N)] == [len(ids) for ids in split.ids]
    gate.open()
    await until(lambda: not replica.loop._owners)


async def test_a_client_that_goes_away_frees_all_sequences(stage: Stage) -> None:
    gate = stage.gate()
    replica = stage.add_replica(step_s=1.0, sleep=gate)
    gateway = await stage.open()
    gate.let(4)
    call, _ = await begin(stage, four(), 2)
    call.cancel()
    await until(lambda: not gateway.dispatcher.streams)
    gate.open()
    await until(lambda: not replica.loop._owners)
    assert len(replica.channels[0].sent) == 2 * N


async def test_a_slow_client_gets_every_sequence_whole(stage: Stage) -> None:
    replica = stage.add_replica(max_context=8_000)
    gateway = await stage.open(patience=Patience(retry=0.01, buffered_tokens=256))
    request = four(stopping=pb.Stopping(max_tokens=2_500, ignore_eos=True), response=pb.ResponseOptions(logprobs=10))
    call = stage.stub.Generate(request)
    messages = [await call.read()]
    await until(lambda: not replica.loop._owners, 60)
    split = await rest_of(call, messages)
    assert [len(ids) for ids in split.ids] == [2_500] * N
    request.ClearField("response")
    assert (await whole(stage, request)).ids == split.ids
    assert gateway.dispatcher.failovers == 0


# Going on.


def resume(split: Split, states: dict[int, int], **fields: Any) -> pb.GenerateRequest:
    """The request again, after so many tokens of each sequence in `states`."""
    sequences = [pb.SequenceState(index=i, token_ids=split.ids[i][:have]) for i, have in states.items()]
    info = split.info
    return four(
        resume=pb.Resume(
            model_fingerprint=info.model_fingerprint,
            numerics_id=info.numerics_id,
            prompt_token_ids=info.prompt_token_ids,
            seed=info.seed,
            sequences=sequences,
        ),
        **fields,
    )


@pytest.mark.parametrize(
    "states", [{}, {0: 3}, {1: 0, 3: 7}, {0: 1, 1: LENGTH, 2: 23, 3: 24}, dict.fromkeys(range(4), 24)]
)
async def test_resume_with_several_sequences(stage: Stage, states: dict[int, int]) -> None:
    replica = stage.add_replica()
    await stage.open()
    first = await whole(stage, four())
    before = len(replica.channels[0].sent)
    rest = await whole(stage, resume(first, states))
    assert rest.ids == [ids[states.get(i, 0) :] for i, ids in enumerate(first.ids)]
    assert rest.reasons() == ["LENGTH"] * N
    assert [rest.finishes[i].usage for i in range(N)] == [first.finishes[i].usage for i in range(N)]
    made = [m.index for m in replica.channels[0].sent[before:] if isinstance(m, Request)]
    assert made == [i for i in range(N) if states.get(i, 0) < LENGTH]


async def test_resume_tells_the_echo_of_new_sequences_only(stage: Stage) -> None:
    replica = stage.add_replica()
    await stage.open()
    asked = pb.ResponseOptions(echo=True, prompt_logprobs=0)
    first = await whole(stage, four(response=asked))
    assert [[(d.text, list(d.token_ids)) for d in e] for e in first.echoes] == [[("hi", [*b"hi"])]] * N
    assert all(d[0].echo for d in first.deltas)
    assert [f.usage.completion_tokens for f in first.finishes.values()] == [LENGTH] * N
    rest = await whole(stage, resume(first, {0: 0, 2: 5}, response=asked))
    assert [len(e) for e in rest.echoes] == [0, 1, 0, 1]
    assert rest.ids == [ids[{2: 5}.get(i, 0) :] for i, ids in enumerate(first.ids)]
    assert len(first.info.prompt_logprobs) == 1
    assert not rest.info.prompt_logprobs  # told already
    assert [r.prompt_logprobs for r in sent(stage)] == [0, None, None, None] + [None] * N
    assert replica.loop.stats().generated_tokens > 0


# What is told.


async def test_echo_leaves_half_a_character_to_the_answer(stage: Stage) -> None:
    euro = "€".encode()
    stage.add_replica(answer=says(euro[1:], "!"))
    await stage.open()
    ids = pb.TokenIds(ids=[*b"a", euro[0]])
    answer = await stage.generate(text=None, token_ids=ids, response=pb.ResponseOptions(echo=True))
    assert (answer.deltas[0].text, answer.deltas[0].echo) == ("a", True)
    assert answer.text == "a€!"
    plain = pb.ResponseOptions(echo=True, token_ids=False)
    assert (await stage.generate(response=plain)).ids == []


async def test_prompt_logprobs_come_with_the_prompt_and_once(stage: Stage) -> None:
    replica = stage.add_replica()
    await stage.open()
    split = await whole(stage, four(text="héy", response=pb.ResponseOptions(prompt_logprobs=2)))
    told = split.info.prompt_logprobs
    assert [(p.token_id, p.text) for p in told] == [(i, t) for i, t in zip("éy".encode(), "\ufffd\ufffdy", strict=True)]
    assert [[(t.token_id, t.text) for t in p.top] for p in told][-1] == [(ord("y"), "y"), (ord("z"), "z")]
    assert all(p.rank == 1 and p.logprob == -0.25 for p in told)
    assert [r.prompt_logprobs for r in sent(stage)] == [2, None, None, None]
    assert not (await whole(stage, four())).info.prompt_logprobs
    one = await stage.generate(text="a", response=pb.ResponseOptions(prompt_logprobs=2))
    assert not one.infos[0].prompt_logprobs
    long = await stage.generate(text="x" * 250, response=pb.ResponseOptions(prompt_logprobs=20))
    assert len(long.infos[0].prompt_logprobs) == 249
    assert all(len(p.top) == 20 for p in long.infos[0].prompt_logprobs)
    assert replica.loop.stats().hit_tokens == 0


async def test_the_sequence_that_tells_the_prompt_is_lost_first(stage: Stage) -> None:
    """What came of the others waits; the next place tells it."""
    gates = {name: stage.gate() for name in ("r0", "r1")}
    for name, gate in gates.items():
        stage.add_replica(name, step_s=1.0, sleep=gate)
    gateway = await stage.open()
    await until(lambda: len(gateway.pool.alive()) == 2)
    call = stage.stub.Generate(four(response=pb.ResponseOptions(prompt_logprobs=1)))
    await until(lambda: any(len(r.loop._owners) == N for r in stage.replicas.values()))
    (name,) = [n for n, r in stage.replicas.items() if r.loop._owners]
    stage.replicas[name].engine.fail_sequence(sent(stage, name)[0].id, "failed")  # type: ignore[attr-defined]
    for gate in gates.values():
        gate.open()
    split = await rest_of(call, [])
    assert len(split.info.prompt_logprobs) == 1
    assert split.reasons() == ["LENGTH"] * N
    assert [len(ids) for ids in split.ids] == [LENGTH] * N


async def test_traces_tell_candidates_experts_and_attention(stage: Stage) -> None:
    stage.add_replica(answer=says("a€"))
    await stage.open()
    options = pb.TraceOptions(candidates=2, attention_layers=[3])
    answer = await stage.generate(response=pb.ResponseOptions(trace=True, trace_options=options))
    tokens = [t for d in answer.deltas for t in d.trace.tokens]
    assert [t.token_id for t in tokens] == answer.ids
    first = tokens[0]
    assert [(c.token_id, c.text, c.before, c.after) for c in first.candidates] == [
        (97, "a", 0.5, 1),
        (98, "b", 0.25, 0),
    ]
    assert [(e.layer, list(e.experts), list(e.weights)) for e in first.experts] == [(1, [1, 5], [0.75, 0.25])]
    assert [(a.layer, a.start, list(a.weights)) for a in first.attention] == [(3, 0, [0.5, 0.5])]
    assert len(tokens[1].attention[0].weights) == 3
    assert all(len(d.trace.tokens) == len(d.token_ids) for d in answer.deltas)


async def test_many_at_once_with_several_sequences_each(stage: Stage) -> None:
    await stage.open()
    requests = [four(sampling=pb.Sampling(seed=i, n=1 + i % 5)) for i in range(10)]
    alone = [await whole(stage, r) for r in requests]
    together = await asyncio.gather(*(whole(stage, r) for r in requests))
    assert [a.ids for a in together] == [a.ids for a in alone]


async def test_a_hundred_and_twenty_eight(stage: Stage) -> None:
    await stage.open()
    split = await whole(stage, four(sampling=pb.Sampling(n=128), stopping=pb.Stopping(max_tokens=2, ignore_eos=True)))
    assert [len(ids) for ids in split.ids] == [2] * 128


@pytest.mark.parametrize(("ids", "said"), [([*b"ab"], "ab"), ([*b"ab", EOS], "ab"), ([], "")])
def test_an_answer_may_end_without_a_token_that_ends_it(text: ModelText, ids: list[int], said: str) -> None:
    """As one whose format is whole does."""
    model = ServedModel(FakeEngine(vocab_size=VOCAB).info, text, SamplingDefaults(eos_token_ids=(EOS,)))
    answer = Answer(validate(pb.GenerateRequest(text="hi"), model), model, 0.0)
    split = Split(answer.add(Batch(token_ids=ids, finish=FinishReason.EOS), 0.0), 1)
    assert (split.texts, split.ids, split.reasons()) == ([said], [ids], ["EOS"])
    assert split.finishes[0].usage.completion_tokens == len(ids)
