"""Chat with the bundled model: its own template, markers and engine."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import pytest
from google.protobuf.json_format import MessageToDict
from router_stage import Stage, problem

from router.fakes import FakeReplica
from router.models import TEXT_FILES, ServedModel
from understudy.v1 import inference_pb2 as pb
from workers.engine import EngineConfig
from workers.engine.build import build_engine

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "note": {"type": "string", "maxLength": 8},
    },
    "required": ["city", "days", "note"],
    "additionalProperties": False,
}
TIME = {
    "type": "object",
    "properties": {"zone": {"enum": ["A", "B"]}},
    "required": ["zone"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "time": TIME}
REQUIRED = pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)


@pytest.fixture
async def demo(stage: Stage, demo_model: Path) -> AsyncIterator[Stage]:
    """The bundled model behind a gateway."""
    engine = build_engine(EngineConfig(str(demo_model), "demo", dtype="float32", threads=1, cache_bytes=64 << 20))
    replica = FakeReplica("real", engine)
    stage.router.add(replica)
    gateway = await stage.open(serve_models=False)
    files = {n: (demo_model / n).read_bytes() for n in (*TEXT_FILES, "chat_template.jinja")}
    gateway.put_model(ServedModel.from_files(engine.info, files))
    yield stage
    replica.stop()
    engine.check_idle()


def asked(text: str = "Who are you?", tools: bool = False, max_tokens: int = 200, **fields: Any) -> pb.ChatRequest:
    message = pb.ChatMessage(role=pb.ROLE_USER, content=[pb.ContentPart(text=text)])
    request = pb.ChatRequest(messages=[message], **fields)
    request.stopping.max_tokens = max_tokens
    for name, schema in SCHEMAS.items() if tools else ():
        request.tools.add(name=name, description=f"The {name}.").parameters.update(schema)
    return request


async def chat(stage: Stage, request: pb.ChatRequest) -> list[pb.ChatResponse]:
    return [m async for m in stage.stub.Chat(request)]


def told(messages: list[pb.ChatResponse], index: int = 0) -> tuple[str, str, list[pb.ToolCall], pb.Finish]:
    """Text, thought, calls, and how it ended."""
    deltas = [m.delta for m in messages if m.HasField("delta") and m.delta.index == index]
    calls = [c.call for d in deltas for c in d.tool_calls if c.HasField("call")]
    finish = next(m.finish for m in messages if m.HasField("finish") and m.finish.index == index)
    return "".join(d.text for d in deltas), "".join(d.reasoning for d in deltas), calls, finish


def check(calls: list[pb.ToolCall]) -> None:
    for call in calls:
        arguments = {k: int(v) if isinstance(v, float) else v for k, v in MessageToDict(call.arguments).items()}
        jsonschema.validate(arguments, SCHEMAS[call.name])


async def test_the_bundled_model_talks_and_thinks(demo: Stage) -> None:
    assert demo.gateway is not None
    formats = demo.gateway.models.all()[0].chat_formats
    assert (formats.tools, formats.reasoning, formats.switch) == ("hermes", "think", True)

    async def said(effort: int, budget: int | None = None) -> tuple[str, str, pb.Finish]:
        request = asked(max_tokens=60, sampling=pb.Sampling(temperature=0), reasoning=pb.Reasoning(effort=effort))
        if budget is not None:
            request.reasoning.budget_tokens = budget
        text, thought, _, finish = told(await chat(demo, request))
        return text, thought, finish

    text, thought, finish = await said(pb.REASONING_EFFORT_NONE)
    assert "Understudy" in text
    assert (thought, finish.usage.reasoning_tokens, finish.reason) == ("", 0, pb.FINISH_REASON_EOS)
    text, thought, finish = await said(pb.REASONING_EFFORT_HIGH)
    assert text
    assert thought
    assert "<think>" not in text + thought
    assert 0 < finish.usage.reasoning_tokens < finish.usage.completion_tokens
    cut, short, finish = await said(pb.REASONING_EFFORT_HIGH, budget=3)
    assert cut
    assert 0 < len(short) < len(thought)
    assert finish.usage.reasoning_tokens == 4  # three, and the marker that was forced


async def test_calls_that_must_be_made_parse_and_validate(demo: Stage) -> None:
    """Four answers each to several seeds, at a temperature at which the model hardly knows what it says."""
    seen = set()
    for seed in range(6):
        request = asked(tools=True, tool_choice=REQUIRED, sampling=pb.Sampling(seed=seed, temperature=1.5, n=4))
        request.reasoning.effort = pb.REASONING_EFFORT_NONE
        messages = await chat(demo, request)
        for index in range(4):
            text, _, calls, finish = told(messages, index)
            assert finish.reason == pb.FINISH_REASON_TOOL_CALLS, text
            assert text == ""
            assert calls
            check(calls)
            seen |= {(len(calls) > 1, c.name) for c in calls}
    assert {name for _, name in seen} == set(SCHEMAS)
    for seed in range(4):
        request = asked(tools=True, tool_choice=pb.ToolChoice(name="time"), sampling=pb.Sampling(seed=seed))
        request.reasoning.effort = pb.REASONING_EFFORT_NONE
        text, _, calls, _ = told(await chat(demo, request))
        assert (text, [c.name for c in calls]) == ("", ["time"])
        check(calls)


async def test_a_call_that_must_be_made_comes_after_the_thought(demo: Stage) -> None:
    for budget, seed in ((3, 1), (0, 2), (40, 3)):
        request = asked(tools=True, tool_choice=REQUIRED, sampling=pb.Sampling(seed=seed))
        request.reasoning.budget_tokens = budget
        text, thought, calls, finish = told(await chat(demo, request))
        assert text == ""
        assert bool(thought) == bool(budget)
        assert finish.usage.reasoning_tokens <= budget + 1
        assert calls
        check(calls)
    # <think> is what it likes best, though its prompt does not say so, and once it thinks, </think>.
    sampling = pb.Sampling(seed=1, temperature=0, logit_bias={3: 50.0, 4: 100.0})
    request = asked(tools=True, tool_choice=REQUIRED, sampling=sampling)
    text, _, calls, finish = told(await chat(demo, request))
    assert finish.usage.reasoning_tokens > 0
    assert calls
    request.reasoning.effort = pb.REASONING_EFFORT_NONE
    text, _, calls, finish = told(await chat(demo, request))
    assert (text, finish.usage.reasoning_tokens, len(calls) > 0) == ("", 0, True)


async def test_strict_tools_are_held_where_the_model_calls_them(demo: Stage) -> None:
    """`<tool_call>` is made likely; what follows it is the grammar's doing."""
    for seed in range(4):
        request = asked(tools=True, sampling=pb.Sampling(seed=seed, temperature=1.5))
        for tool in request.tools:
            tool.strict = True
        request.sampling.logit_bias[5] = 25.0
        request.reasoning.effort = pb.REASONING_EFFORT_NONE
        _, _, calls, _ = told(await chat(demo, request))
        assert calls
        check(calls)
    free = asked("What is the capital of France?", tools=True, sampling=pb.Sampling(temperature=0))
    free.tools[0].strict = True
    text, _, calls, _ = told(await chat(demo, free))
    assert text
    assert not calls


async def test_a_call_that_is_cut_goes_on_as_it_would_have(demo: Stage) -> None:
    request = asked(tools=True, tool_choice=REQUIRED, sampling=pb.Sampling(seed=4, temperature=1.2))
    request.reasoning.budget_tokens = 6
    whole = await chat(demo, request)
    info, ids = whole[0].prompt_info, [i for m in whole if m.HasField("delta") for i in m.delta.token_ids]
    for cut in range(1, len(ids), 5):
        request.resume.CopyFrom(
            pb.Resume(
                model_fingerprint=info.model_fingerprint, numerics_id=info.numerics_id, seed=info.seed,
                prompt_token_ids=info.prompt_token_ids, sequences=[pb.SequenceState(index=0, token_ids=ids[:cut])],
            )
        )  # fmt: skip
        rest = await chat(demo, request)
        assert [i for m in rest if m.HasField("delta") for i in m.delta.token_ids] == ids[cut:]
        assert rest[-1].finish == whole[-1].finish


async def test_a_format_holds_for_what_follows_the_thought(demo: Stage) -> None:
    request = asked(sampling=pb.Sampling(seed=5), format=pb.Format(regex="[0-9]{4}"))
    request.reasoning.budget_tokens = 5
    text, thought, _, finish = told(await chat(demo, request))
    assert re.fullmatch("[0-9]{4}", text)
    assert thought
    assert finish.usage.reasoning_tokens <= 6
    request.reasoning.ClearField("budget_tokens")
    request.reasoning.effort = pb.REASONING_EFFORT_NONE
    text, thought, _, _ = told(await chat(demo, request))
    assert re.fullmatch("[0-9]{4}", text)
    assert thought == ""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.tools[0].parameters.update({"not": {}}), "tools[0].parameters: cannot be held"),
        (lambda r: r.tools[1].parameters.update({"type": "string"}), "tools[1].parameters: is not the schema of an"),
        (lambda r: r.ClearField("tools"), "tool_choice.mode: is required, but the request has no tools"),
        (lambda r: setattr(r.tool_choice, "name", "tome"), "tool_choice.name: is 'tome'; the request's tools are"),
    ],
)  # fmt: skip
async def test_calls_that_cannot_be_held_are_refused_by_name(demo: Stage, change: Any, said: str) -> None:
    request = asked(tools=True, tool_choice=REQUIRED)
    change(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat(demo, request)
    code, message, _, _ = problem(caught.value)
    assert code == "INVALID_ARGUMENT"
    assert message.startswith(said), message


async def test_rules_that_leave_no_token_are_told_to_the_client(demo: Stage) -> None:
    """Which rule, where, and the way out; after the text that was made until then."""
    request = asked(sampling=pb.Sampling(seed=1, bad_words=["7"]), format=pb.Format(regex="1237[0-9]*"))
    request.reasoning.effort = pb.REASONING_EFFORT_NONE
    messages = []

    async def listen() -> None:
        async for message in demo.stub.Chat(request):
            messages.append(message)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await listen()
    code, message, _, (bad,) = problem(caught.value)
    assert (code, bad.field_violations[0].field) == ("INVALID_ARGUMENT", "format")
    why = r"format: leaves no token after [1-3] tokens of the answer, together with sampling\.bad_words; relax one"
    assert re.match(why, message)
    assert "".join(m.delta.text for m in messages) == "123"
    assert demo.gateway is not None
    assert demo.gateway.dispatcher.failovers == 0
