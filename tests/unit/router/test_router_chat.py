"""Chat over real gRPC, with engines that say what they are told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import grpc
import pytest
from router_stage import VOCAB, Stage, left, problem, says, tokenizer_json, until

from router.chat.formats import ChatFormats
from router.chat.templates import ChatTemplate
from router.text import ModelText
from understudy.v1 import inference_pb2 as pb

THINK, END_THINK = 270, 271
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if enable_thinking %}[on]{% endif %}{% if add_generation_prompt %}[assistant]{% endif %}"
    "{# <tool_call> </think> #}"
)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'
ANSWER = f"<think>\nLet me see.\n</think>\n\nI look.{CALL}"


def text_side() -> ModelText:
    """That of the router's tests, with the markers of thoughts."""
    tree = json.loads(tokenizer_json())
    for token, id in (("<think>", THINK), ("</think>", END_THINK)):
        tree["model"]["vocab"][token] = id
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tree["added_tokens"].append({"id": id, "content": token} | flags)
    return ModelText(json.dumps(tree).encode(), {}, VOCAB)


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    stage = Stage(text_side())
    before = asyncio.all_tasks()
    try:
        yield stage
    finally:
        await stage.close()
    await until(lambda: not left(before))


async def opened(stage: Stage, script: Any = None, template: str = TEMPLATE, **engine: Any) -> Stage:
    stage.add_replica(**({"answer": script} if script is not None else {}), max_context=2048, **engine)
    gateway = await stage.open()
    model = gateway.models.all()[0]
    chat = ChatTemplate({"default": template} if template else {})
    gateway.put_model(replace(model, chat=chat, chat_formats=ChatFormats.detect(chat)))
    return stage


def asked(text: str = "Weather?", tools: bool = True, **fields: Any) -> pb.ChatRequest:
    message = pb.ChatMessage(role=pb.ROLE_USER, content=[pb.ContentPart(text=text)])
    request = pb.ChatRequest(messages=[message], sampling=pb.Sampling(seed=7), **fields)
    if tools:
        tool = request.tools.add(name="weather", description="Of a city.")
        tool.parameters.update({"type": "object", "properties": {"city": {"type": "string"}}})
    return request


async def chat(stage: Stage, request: pb.ChatRequest) -> list[pb.ChatResponse]:
    return [m async for m in stage.stub.Chat(request)]


def deltas(messages: list[pb.ChatResponse], index: int = 0) -> list[pb.ChatDelta]:
    return [m.delta for m in messages if m.HasField("delta") and m.delta.index == index]


def summary(found: list[pb.ChatDelta]) -> tuple[str, str, str, list[pb.ToolCall], list[int]]:
    """Text, thought, arguments as they streamed, whole calls, ids."""
    pieces = [c for d in found for c in d.tool_calls]
    return (
        "".join(d.text for d in found),
        "".join(d.reasoning for d in found),
        "".join(c.arguments for c in pieces),
        [c.call for c in pieces if c.HasField("call")],
        [i for d in found for i in d.token_ids],
    )


async def test_thought_speech_and_a_call(stage: Stage) -> None:
    await opened(stage, says(ANSWER))
    messages = await chat(stage, asked())
    text, thought, arguments, calls, ids = summary(deltas(messages))
    assert (text, thought) == ("I look.", "Let me see.")
    assert arguments == '{"city": "Paris", "days": 2}'
    assert [(c.name, dict(c.arguments)) for c in calls] == [("weather", {"city": "Paris", "days": 2.0})]
    assert bytes(ids[:-1]) == ANSWER.encode()
    info, finish = messages[0].prompt_info, messages[-1].finish
    assert finish.reason == pb.FINISH_REASON_TOOL_CALLS
    assert finish.usage.reasoning_tokens == ANSWER.index("I look.") - 2  # the line breaks after it are no thought
    prompt = bytes(info.prompt_token_ids).decode()
    assert prompt.startswith("[user]Weather?")
    assert prompt.endswith("[assistant]")
    assert '{"type": "object", "properties": {"city": {"type": "string"}}}' in prompt
    first = next(c for d in deltas(messages) for c in d.tool_calls)
    assert first.id == calls[0].id
    assert len(first.id) == 9
    assert first.id.isalnum()
    again = summary(deltas(await chat(stage, asked())))
    assert again[3][0].id == first.id


async def test_resumed_anywhere_it_is_the_same(stage: Stage) -> None:
    """Mid thought, mid marker, mid call: what comes after is what would have come."""
    await opened(stage, says(ANSWER))
    request = asked()
    whole = await chat(stage, request)
    info = whole[0].prompt_info
    found = deltas(whole)
    for cut in range(0, len(found) + 1, 7):
        had = summary(found[:cut])
        request.resume.CopyFrom(
            pb.Resume(
                model_fingerprint=info.model_fingerprint, numerics_id=info.numerics_id, seed=info.seed,
                prompt_token_ids=info.prompt_token_ids,
                sequences=[pb.SequenceState(index=0, token_ids=had[4])] if cut else [],
            )
        )  # fmt: skip
        rest = await chat(stage, request)
        more = summary(deltas(rest))
        assert [a + b for a, b in zip(had, more, strict=True)] == list(summary(found)), cut
        at = len(had[4])
        for delta in deltas(rest):
            assert delta.HasField("position")
            assert delta.position == at
            at += len(delta.token_ids)
        assert rest[-1].finish == whole[-1].finish


async def test_hidden_thought_keeps_its_ids(stage: Stage) -> None:
    await opened(stage, says(ANSWER))
    text, thought, _, calls, ids = summary(deltas(await chat(stage, asked(reasoning=pb.Reasoning(hidden=True)))))
    assert (text, thought, len(calls)) == ("I look.", "", 1)
    assert bytes(ids[:-1]) == ANSWER.encode()


async def test_without_tools_markers_are_text(stage: Stage) -> None:
    await opened(stage, says(CALL))
    messages = await chat(stage, asked(tools=False))
    assert summary(deltas(messages))[0] == CALL
    assert messages[-1].finish.reason == pb.FINISH_REASON_EOS
    none = asked(tool_choice=pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_NONE))
    messages = await chat(stage, none)
    assert b"Of a city." not in bytes(messages[0].prompt_info.prompt_token_ids)


async def test_a_call_that_is_none_is_text(stage: Stage) -> None:
    broken = '<tool_call>{"name": "weather", "arguments": {"city": oops}}</tool_call>'
    await opened(stage, says(broken))
    messages = await chat(stage, asked())
    text, _, _, calls, _ = summary(deltas(messages))
    assert (text, calls) == (broken, [])
    assert [c.dropped for d in deltas(messages) for c in d.tool_calls][-1]
    assert messages[-1].finish.reason == pb.FINISH_REASON_EOS


async def test_several_answers(stage: Stage) -> None:
    await opened(stage, says(ANSWER))
    request = asked()
    request.sampling.n = 2
    messages = await chat(stage, request)
    one, two = summary(deltas(messages)), summary(deltas(messages, 1))
    assert one[:3] == two[:3]
    assert one[3][0].id != two[3][0].id


async def test_budget_opens_the_thought_and_ends_it(stage: Stage) -> None:
    """The engine is told when the thought must end; the thought itself is opened in the prompt."""
    seen: list[Any] = []

    def script(request: Any) -> list[int]:
        seen.append(request)
        return [*b"hm", END_THINK, *b"Hi"]

    await opened(stage, script)
    reasoning = pb.Reasoning(budget_tokens=2)
    messages = await chat(stage, asked(tools=False, reasoning=reasoning))
    text, thought, *_ = summary(deltas(messages))
    assert (text, thought) == ("Hi", "hm")
    assert (seen[-1].interjection.after, seen[-1].interjection.ids) == (2, [END_THINK])
    assert seen[-1].prompt[-2:] == [THINK, ord("\n")]
    assert messages[-1].finish.usage.reasoning_tokens == 3
    low = await chat(stage, asked(tools=False, reasoning=pb.Reasoning(effort=pb.REASONING_EFFORT_LOW)))
    assert seen[-1].interjection.after == 512
    assert b"[on]" in bytes(low[0].prompt_info.prompt_token_ids[:-2])
    await chat(stage, asked(tools=False, reasoning=pb.Reasoning(effort=pb.REASONING_EFFORT_NONE)))
    assert seen[-1].interjection is None


def _with(change: Callable[[pb.ChatRequest], Any]) -> pb.ChatRequest:
    request = asked()
    change(request)
    return request


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.ClearField("messages"), "messages: has 0 entries"),
        (lambda r: r.messages.add(), "messages[1].role: is not set"),
        (lambda r: r.messages.add(role=2, reasoning="x"), "messages[1].reasoning: belongs to the assistant"),
        (lambda r: r.messages.add(role=2, tool_call_id="x"), "messages[1].tool_call_id: belongs to a tool"),
        (lambda r: r.messages[0].content.add(), "messages[0].content[1]: has no text"),
        (lambda r: r.tools.add(name="weather"), "tools[1].name: is 'weather'"),
        (lambda r: r.tools.add(name="a b"), "tools[1].name: is 'a b'"),
        (lambda r: setattr(r.tool_choice, "name", "x"), "tool_choice.name: is 'x'; the request's tools are weather"),
        (lambda r: r.template_kwargs.update({"tools": 1}), "template_kwargs: tools cannot be set"),
        (lambda r: setattr(r.response, "echo", True), "response.echo: does not exist"),
        (lambda r: setattr(r, "continue_final_message", True), "continue_final_message: needs a last message"),
        (lambda r: setattr(r.format, "regex", "a"), "format: goes not with tools"),
        (lambda r: setattr(r.sampling, "temperature", -1), "sampling.temperature: is -1"),
    ],
)
async def test_refusals_name_the_field(stage: Stage, change: Any, said: str) -> None:
    await opened(stage)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat(stage, _with(change))
    code, message, _, _ = problem(caught.value)
    assert code == "INVALID_ARGUMENT"
    assert message.startswith(said)


async def test_without_template_and_without_thought(stage: Stage) -> None:
    await opened(stage, template="{{ messages[0].content }}")
    with pytest.raises(grpc.aio.AioRpcError, match=r"reasoning\.effort: is set, but this model's template knows no"):
        await chat(stage, asked(tools=False, reasoning=pb.Reasoning(effort=pb.REASONING_EFFORT_HIGH)))
    gateway = stage.gateway
    assert gateway is not None
    gateway.put_model(replace(gateway.models.all()[0], chat=ChatTemplate({})))
    with pytest.raises(grpc.aio.AioRpcError, match="model: has no chat template: put one into"):
        await chat(stage, asked(tools=False))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: setattr(r.tool_choice, "name", "weather"), "tool_choice: cannot be kept: this model's template"),
        (lambda r: setattr(r.tools[0], "strict", True), "tools[0].strict: cannot be kept: this model's template"),
    ],
)  # fmt: skip
async def test_calls_of_an_unknown_format_cannot_be_forced(stage: Stage, change: Any, said: str) -> None:
    await opened(stage, template="{{ messages[0].content }}<tool_call><function=")
    request = asked()
    change(request)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await chat(stage, request)
    assert problem(caught.value)[:1] == ("INVALID_ARGUMENT",)
    assert problem(caught.value)[1].startswith(said)
