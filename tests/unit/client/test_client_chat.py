"""Both clients' chat, and the command, against the fake server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from typer.testing import CliRunner

from understudy import AsyncClient, Client, Message, Retry, ToolCall
from understudy._chat import chat_piece, chat_request
from understudy.cli.main import app
from understudy.errors import InvalidRequest
from understudy.testing import FakeServer
from understudy.v1 import inference_pb2 as pb

FAST = Retry(first_delay_s=0.001, max_delay_s=0.002)
TOOL = {"name": "weather", "description": "Of a city.", "parameters": {"type": "object"}}


def test_a_conversation_becomes_a_message() -> None:
    call = ToolCall("abc", "weather", {"city": "Paris", "days": 2})
    request = chat_request(
        [
            Message("system", "Be brief."),
            {"role": "user", "content": "Weather?"},
            Message("assistant", tool_calls=(call,), reasoning="hm"),
            Message("tool", "sunny", tool_call_id="abc"),
        ],
        {"tools": [TOOL, {"type": "function", "function": {"name": "f"}}], "effort": "low", "budget": 3, "seed": 4},
    )
    assert [m.role for m in request.messages] == [1, 2, 3, 4]
    assert [t.name for t in request.tools] == ["weather", "f"]
    assert (request.reasoning.effort, request.reasoning.budget_tokens, request.sampling.seed) == (2, 3, 4)
    assert request.messages[2].tool_calls[0].arguments["days"] == 2
    assert request.response.token_ids


@pytest.mark.parametrize(
    ("messages", "options", "field"),
    [
        ([{"role": "nobody"}], {}, "role"),
        ("Hi", {"effort": "much"}, "effort"),
        ("Hi", {"tool_choice": "perhaps"}, "tool_choice"),
        ("Hi", {"tool_choice": {"type": "function"}}, "tool_choice"),
        ("Hi", {"echo": True}, "echo"),
        ("Hi", {"budget": -1}, "reasoning.budget_tokens"),
    ],
)
def test_what_no_message_holds(messages: Any, options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat_request(messages, options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("required", pb.ToolChoice(mode=pb.TOOL_CHOICE_MODE_REQUIRED)),
        ({"name": "weather"}, pb.ToolChoice(name="weather")),
        ({"type": "function", "function": {"name": "weather"}}, pb.ToolChoice(name="weather")),
    ],
)
def test_calls_that_must_be_made(given: Any, meant: pb.ToolChoice) -> None:
    assert chat_request("Hi", {"tools": [TOOL], "tool_choice": given}).tool_choice == meant


def test_pieces_of_calls() -> None:
    delta = pb.ChatDelta(reasoning="hm", token_ids=[1])
    part = delta.tool_calls.add(position=1, id="x", name="f", arguments='{"a": 1}')
    part.call.name = "f"
    part.call.arguments.update({"a": 1, "b": [1.5]})
    piece = chat_piece(delta)
    assert piece.reasoning == "hm"
    assert piece.tool_calls[0].call == ToolCall("", "f", {"a": 1, "b": [1.5]})


def test_a_broken_chat_goes_on() -> None:
    with FakeServer("Hello, world") as server, Client(server.address, retry=FAST) as client:
        server.break_after(4)
        with client.chat("Hi") as stream:
            assert "".join(piece.text for piece in stream) == "Hello, world"
        assert stream.message == Message("assistant", "Hello, world")
        assert stream.messages() == (stream.message,)
        assert len(server.calls) == 2
        assert len(server.calls[1].message.resume.sequences[0].token_ids) == 3

        async def twin() -> str:
            async with AsyncClient(server.address, retry=FAST) as client:
                server.break_after(2)
                async with client.chat([Message("user", "Hi")]) as stream:
                    text = "".join([piece.text async for piece in stream])
                assert stream.message.content == text
                return text

        assert asyncio.run(twin()) == "Hello, world"


def test_the_command() -> None:
    def answer(request: pb.GenerateRequest, _index: int) -> str:
        return f"<{request.text}>"

    with FakeServer(answer) as server:
        one = CliRunner().invoke(app, ["chat", "Hi", "--system", "Be kind.", "--address", server.address])
        assert (one.exit_code, one.stdout) == (0, "<system: Be kind.\nuser: Hi>\n")
        lines = "A\nB\n/system S\n/reset\n/what\nC\n"
        many = CliRunner().invoke(app, ["chat", "--address", server.address], input=lines)
        assert many.exit_code == 0
        assert "<user: A>" in many.stdout
        assert "<user: A\nassistant: <user: A>\nuser: B>" in many.stdout
        assert "<system: S\nuser: C>" in many.stdout
