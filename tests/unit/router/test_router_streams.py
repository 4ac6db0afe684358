"""Streams over a real socket, from engines in memory."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from router_stage import BOS, EOS, VOCAB, Answer, Stage, problem, says, until

from router.dispatch import Patience
from router.gateway import SERVICE
from router.models import SamplingDefaults
from router.server import GatewayConfig
from understudy.v1 import inference_pb2 as pb


async def take(call: Any, received: list[Any]) -> None:
    """Puts what comes into `received`, whatever the end."""
    async for message in call:
        received.append(message)


OPEN_END = pb.Stopping(max_tokens=20, ignore_eos=True)


async def test_an_answer_from_prompt_info_to_finish(stage: Stage) -> None:
    stage.add_replica(answer=says("Hello, wörld 🙂!"))
    await stage.open()
    answer = await stage.generate(request_id="mine", sampling=pb.Sampling(seed=5))
    assert answer.text == "Hello, wörld 🙂!"
    assert answer.reason == "EOS"
    assert answer.ids == [*"Hello, wörld 🙂!".encode(), EOS]
    assert answer.finish.usage.completion_tokens == len(answer.ids)
    assert answer.finish.usage.prompt_tokens == 2
    info = answer.infos[0]
    assert (info.request_id, info.model, list(info.prompt_token_ids)) == ("mine", "fake", [*b"hi"])
    assert (info.model_fingerprint, info.numerics_id, info.seed) == ("fake", "fake", 5)
    for delta in answer.deltas:
        if EOS not in delta.token_ids:
            assert bytes(delta.token_ids).decode() == delta.text


async def test_length_and_seeds(stage: Stage) -> None:
    await stage.open()
    first = await stage.generate(stopping=OPEN_END)
    assert (first.reason, len(first.ids)) == ("LENGTH", 20)
    seed = first.infos[0].seed
    again = await stage.generate(stopping=OPEN_END, sampling=pb.Sampling(seed=seed))
    other = await stage.generate(stopping=OPEN_END, sampling=pb.Sampling(seed=seed + 1))
    assert again.ids == first.ids
    assert again.text == first.text
    assert other.ids != first.ids
    rest = await stage.generate(stopping=pb.Stopping(ignore_eos=True))
    assert len(rest.ids) == 256 - 2


async def test_many_at_once_each_get_their_own(stage: Stage) -> None:
    await stage.open()
    alone = [await stage.generate(text=f"p{i}", stopping=OPEN_END, sampling=pb.Sampling(seed=i)) for i in range(16)]
    together = await asyncio.gather(
        *(stage.generate(text=f"p{i}", stopping=OPEN_END, sampling=pb.Sampling(seed=i)) for i in range(16))
    )
    assert [a.ids for a in together] == [a.ids for a in alone]
    assert [a.text for a in together] == [a.text for a in alone]


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_string_that_straddles_tokens(stage: Stage, include: bool) -> None:
    stage.add_replica(answer=says("one STO", "P two"))
    await stage.open()
    answer = await stage.generate(stopping=pb.Stopping(stop=["STOP", "x"], include_stop=include))
    assert answer.text == ("one STOP" if include else "one ")
    assert (answer.reason, answer.finish.stop) == ("STOP_SEQUENCE", "STOP")
    assert answer.ids == [*b"one STOP"]
    assert answer.finish.usage.completion_tokens == 8


@pytest.mark.parametrize("include", [False, True])
async def test_a_stop_token(stage: Stage, include: bool) -> None:
    stage.add_replica(answer=says("ab.cd"))
    await stage.open()
    answer = await stage.generate(stopping=pb.Stopping(stop_token_ids=[ord(".")], include_stop=include))
    assert answer.text == ("ab." if include else "ab")
    assert (answer.reason, answer.finish.stop_token_id) == ("STOP_TOKEN", ord("."))
    assert answer.ids == [*b"ab."]


async def test_half_a_character_at_the_end(stage: Stage) -> None:
    stage.add_replica(answer=says("a", "€".encode()[:2]))
    await stage.open()
    answer = await stage.generate(stopping=pb.Stopping(max_tokens=3))
    assert (answer.text, answer.ids, answer.reason) == ("a\ufffd", [97, 0xE2, 0x82], "LENGTH")


async def test_logprobs_trace_and_no_ids(stage: Stage) -> None:
    stage.add_replica(answer=says("héy"))
    await stage.open()
    options = pb.ResponseOptions(logprobs=2, trace=True, token_ids=False)
    answer = await stage.generate(response=options)
    assert answer.ids == []
    logprobs = [p for d in answer.deltas for p in d.logprobs]
    assert [p.token_id for p in logprobs] == [*"héy".encode(), EOS]
    assert [p.text for p in logprobs] == ["h", "\ufffd", "\ufffd", "y", "<eos>"]
    assert all(len(p.top) == 2 and p.top[0].token_id == p.token_id and p.rank == 1 for p in logprobs)
    assert all(d.trace.server_us > 0 and d.trace.step > 0 for d in answer.deltas)


async def test_greedy_defaults_and_tenantless_salt_reach_the_engine(stage: Stage) -> None:
    replica = stage.add_replica()
    await stage.open(defaults=SamplingDefaults(temperature=0.0, eos_token_ids=(EOS,)))
    await stage.generate(stopping=OPEN_END, kv=pb.KvOptions(cache_salt="s", bypass_prefix_cache=True), priority=3)
    request = replica.channels[0].sent[0]
    assert (request.sampling.temperature, request.cache_salt) == (0.0, "\x1fs")
    assert (request.bypass_prefix_cache, request.priority, request.eos_ids) == (True, 3, [])


async def test_tokenize_and_detokenize(stage: Stage) -> None:
    await stage.open()
    made = await stage.stub.Tokenize(pb.TokenizeRequest(text="hé"))
    assert (list(made.token_ids), list(made.texts), made.max_context) == (
        [*"hé".encode()],
        ["h", "\ufffd", "\ufffd"],
        256,
    )
    ids = [BOS, *"hé".encode(), EOS]
    assert (await stage.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == "hé"
    kept = await stage.stub.Detokenize(pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False))
    assert kept.text == "<bos>hé<eos>"
    long = "word " * 2000
    assert len((await stage.stub.Tokenize(pb.TokenizeRequest(text=long))).token_ids) == len(long)
    with pytest.raises(grpc.aio.AioRpcError, match=r"token_ids: \[1\] is 300"):
        await stage.stub.Detokenize(pb.DetokenizeRequest(token_ids=[1, 300]))


async def test_models_are_listed(stage: Stage) -> None:
    await stage.open()
    (model,) = (await stage.stub.ListModels(pb.ListModelsRequest())).models
    assert (model.name, model.max_context, model.vocab_size) == ("fake", 256, VOCAB)
    assert (list(model.eos_token_ids), model.architecture, model.dtype) == ([EOS], "Fake", "float32")


async def test_a_client_that_goes_away_frees_its_sequence(stage: Stage) -> None:
    gate = stage.gate()
    replica = stage.add_replica(step_s=1.0, sleep=gate)
    gateway = await stage.open()
    call = stage.stub.Generate(pb.GenerateRequest(text="hi", stopping=OPEN_END))
    await until(lambda: replica.loop._owners)  # it has reached the engine
    call.cancel()
    await until(lambda: not gateway.dispatcher.streams)
    gate.let(2)
    await until(lambda: not replica.loop._owners)
    assert [type(m).__name__ for m in replica.channels[0].sent] == ["Request", "Cancel"]
    await until(lambda: gateway.metrics.requests.labels("Generate", "CANCELLED")._value.get() == 1)


async def test_a_deadline_comes_after_the_tokens_made_so_far(stage: Stage) -> None:
    gate = stage.gate()
    replica = stage.add_replica(step_s=1.0, sleep=gate)
    await stage.open()
    gate.let(3)
    request = pb.GenerateRequest(text="hi", stopping=OPEN_END)
    received: list[Any] = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await take(stage.stub.Generate(request, timeout=2.0), received)
    answer = Answer(received)
    code, _, info, _ = problem(caught.value)
    assert (code, info.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
    assert (len(answer.ids), answer.reason) == (3, "TIMEOUT")
    assert answer.finish.usage.completion_tokens == 3
    gate.let(2)
    await until(lambda: not replica.loop._owners)


async def test_resume_goes_on_with_the_next_token(stage: Stage) -> None:
    await stage.open()
    whole = await stage.generate(stopping=OPEN_END)
    info = whole.infos[0]
    for have in (0, 1, 7, 20):
        state = [pb.SequenceState(token_ids=whole.ids[:have])]
        resume = pb.Resume(
            model_fingerprint=info.model_fingerprint,
            numerics_id=info.numerics_id,
            prompt_token_ids=info.prompt_token_ids,
            seed=info.seed,
            sequences=state,
        )
        rest = await stage.generate(stopping=OPEN_END, resume=resume)
        assert rest.ids == whole.ids[have:]
        for delta in rest.deltas:  # each says where it begins in the whole answer
            assert delta.HasField("position")
            assert [*delta.token_ids] == whole.ids[delta.position :][: len(delta.token_ids)]
            assert delta.position == have
            have += len(delta.token_ids)
        assert rest.reason == "LENGTH"
        assert rest.finish.usage.completion_tokens == 20
        assert rest.infos[0].seed == info.seed


@pytest.mark.parametrize(
    ("stopping", "said", "reason"),
    [
        (pb.Stopping(stop=["ll"]), b"hell", "STOP_SEQUENCE"),
        (pb.Stopping(), [*b"hello", EOS], "EOS"),
        (pb.Stopping(stop_token_ids=[ord("o")]), b"hello", "STOP_TOKEN"),
        (pb.Stopping(max_tokens=2), b"he", "LENGTH"),
    ],
)
async def test_resume_of_a_complete_answer_finishes_at_once(
    stage: Stage, stopping: pb.Stopping, said: list[int], reason: str
) -> None:
    replica = stage.add_replica(answer=says("hello"))
    await stage.open()
    first = await stage.generate(stopping=stopping)
    assert first.ids == list(said)
    resume = pb.Resume(
        model_fingerprint="fake",
        numerics_id="fake",
        prompt_token_ids=b"hi",
        seed=first.infos[0].seed,
        sequences=[pb.SequenceState(token_ids=said)],
    )
    sent = len(replica.channels[0].sent)
    rest = await stage.generate(stopping=stopping, resume=resume)
    assert (rest.ids, rest.text, rest.reason) == ([], "", reason)
    assert rest.finish == first.finish
    assert len(replica.channels[0].sent) == sent


async def test_resume_within_held_back_text(stage: Stage) -> None:
    """What the client has not received is made again, up to a stop string that began in what it has."""
    stage.add_replica(answer=says("one STOP two"))
    await stage.open()
    resume = pb.Resume(
        model_fingerprint="fake",
        numerics_id="fake",
        prompt_token_ids=b"hi",
        sequences=[pb.SequenceState(token_ids=b"one ")],
    )
    rest = await stage.generate(stopping=pb.Stopping(stop=["STOP"]), resume=resume)
    assert (rest.text, rest.ids, rest.reason) == ("", [*b"STOP"], "STOP_SEQUENCE")


async def test_a_slow_client_is_parked_and_gets_everything(stage: Stage) -> None:
    """Its stream leaves the engine while it does not read, and goes on where it stopped."""
    replica = stage.add_replica(max_context=8_000)
    gateway = await stage.open(patience=Patience(retry=0.01, buffered_tokens=64))
    request = pb.GenerateRequest(
        text="hi",
        stopping=pb.Stopping(max_tokens=6_000, ignore_eos=True),
        response=pb.ResponseOptions(logprobs=10),
        sampling=pb.Sampling(seed=3),
    )
    call = stage.stub.Generate(request)
    first = await call.read()
    await until(lambda: not replica.loop._owners, 60)
    (stream,) = gateway.dispatcher.streams
    assert len(stream._sequences[0].tokens) < 6_000
    messages = [first]
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    answer = Answer(messages)
    assert (len(answer.ids), answer.reason) == (6_000, "LENGTH")
    plain = await stage.generate(pb.GenerateRequest(text="hi", stopping=request.stopping, sampling=request.sampling))
    assert plain.ids == answer.ids
    assert gateway.dispatcher.failovers == 0


async def test_health_is_truthful(stage: Stage) -> None:
    replica = stage.add_replica()
    gateway = await stage.open(GatewayConfig(port=0, watch_s=0.01))
    assert stage.channel is not None
    health = health_pb2_grpc.HealthStub(stage.channel)

    async def state() -> str:
        answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)

    async def becomes(wanted: str) -> None:
        async with asyncio.timeout(10):
            while await state() != wanted:  # noqa: ASYNC110  # health is asked over the wire
                await asyncio.sleep(0.002)

    await becomes("SERVING")
    replica.kill()
    await becomes("NOT_SERVING")
    stage.add_replica(epoch=2)
    await becomes("SERVING")
    assert (await stage.generate(stopping=OPEN_END)).reason == "LENGTH"
    assert gateway.metrics.ready_replicas._value.get() == 1
    stage.router.router.drain("r0", 2)
    await becomes("NOT_SERVING")


async def test_reflection_names_the_services(stage: Stage) -> None:
    await stage.open()
    assert stage.channel is not None
    stub = reflection_pb2_grpc.ServerReflectionStub(stage.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    async for answer in call:
        assert {s.name for s in answer.list_services_response.service} >= {SERVICE, "grpc.health.v1.Health"}


async def test_metrics_count(stage: Stage) -> None:
    stage.add_replica(answer=says("abc"))
    gateway = await stage.open()
    await stage.generate()
    registry = gateway.metrics.registry
    value = registry.get_sample_value
    await until(lambda: value("understudy_requests_total", {"method": "Generate", "outcome": "OK"}) == 1)
    assert value("understudy_completion_tokens_total", {"model": "fake"}) == 4
    assert value("understudy_prompt_tokens_total", {"model": "fake"}) == 2
    assert value("understudy_time_to_first_token_seconds_count") == 1
    assert value("understudy_active_streams") == 0


async def test_one_line_per_call_in_the_log_without_what_was_said(stage: Stage) -> None:
    stage.add_replica(answer=says("secret answer"))
    await stage.open()
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    request = pb.GenerateRequest(text="secret prompt", request_id="mine")
    with structlog.testing.capture_logs() as lines:
        async for _ in stage.stub.Generate(request, metadata=(("traceparent", trace),)):
            pass
        await until(lambda: lines)
    (line,) = lines
    wanted = {"event": "call", "method": "Generate", "outcome": "OK", "request_id": "mine", "model": "fake"}
    wanted |= {"prompt_tokens": 13, "completion_tokens": 14, "finish": "EOS", "traceparent": trace}
    assert {k: line[k] for k in wanted} == wanted
    assert "secret" not in str(line)
