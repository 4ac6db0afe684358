"""Conversations: what callers say and get, and the state of one answer. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict

from understudy import _request, errors
from understudy._attempts import Attempts
from understudy._channel import INFERENCE, Method
from understudy._request import GenerateOptions
from understudy._stream import StreamState
from understudy.types import Message, Piece, ToolCall
from understudy.v1 import inference_pb2 as pb

CHAT = Method(f"/{INFERENCE}/Chat", pb.ChatRequest, pb.ChatResponse)
Messages = str | Sequence[Message | Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class ChatOptions(GenerateOptions, total=False):
    """Keywords of `chat`: those of `generate` without `echo`, and these.

    `tools` are mappings with `name`, `description` and `parameters` (a JSON Schema), alone or as OpenAI wraps them.
    `tool_choice` is auto, none, required, or a mapping with the `name` of the tool to call. `effort` is none, low,
    medium or high, `budget` tokens of thought at most, and `hide_thought` leaves its text out. `template_kwargs` are
    more variables for the model's template.
    `continue_final_message` goes on with the last message instead of a new one.
    """

    tools: Tools | None
    tool_choice: str | Mapping[str, Any] | None
    effort: str | None
    budget: int | None
    hide_thought: bool | None
    template_kwargs: Mapping[str, Any] | None
    continue_final_message: bool | None


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A part of call number `position`. `id` and `name` come in its first part, `call` in its last; a `dropped` one
    was no call after all, and its text is in the same piece's."""

    position: int
    id: str = ""
    name: str = ""
    arguments: str = ""
    call: ToolCall | None = None
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class ChatPiece(Piece):
    """A part of an answer: `text` is said, `reasoning` is thought."""

    reasoning: str = ""
    tool_calls: tuple[ToolCallPiece, ...] = ()


_OWN = tuple(ChatOptions.__annotations__.keys() - GenerateOptions.__annotations__.keys())


def _enum(kind: Any, prefix: str, value: str, name: str) -> Any:
    try:
        return kind.Value(f"{prefix}_{value.upper()}")
    except (ValueError, AttributeError):
        known = ", ".join(k.removeprefix(prefix + "_").lower() for k in list(kind.keys())[1:])
        raise errors.InvalidRequest(f"is {value!r}; it must be one of {known}", name) from None


def chat_request(messages: Messages, options: ChatOptions) -> pb.ChatRequest:
    """The message. TypeError and InvalidRequest as in `generate_request`."""
    rest: Any = {k: v for k, v in options.items() if k not in _OWN}
    if rest.get("echo"):
        raise errors.InvalidRequest("does not exist in a chat; leave it out", "echo")
    plain = _request.generate_request("", rest)
    request = pb.ChatRequest(
        request_id=plain.request_id, model=plain.model, sampling=plain.sampling, stopping=plain.stopping,
        response=plain.response, kv=plain.kv, priority=plain.priority,
    )  # fmt: skip
    if plain.HasField("format"):
        request.format.CopyFrom(plain.format)
    given = [Message("user", messages)] if isinstance(messages, str) else messages
    request.messages.extend(_message(m if isinstance(m, Message) else Message(**m)) for m in given)
    request.tools.extend(_tool(t) for t in options.get("tools") or ())
    if choice := options.get("tool_choice"):
        request.tool_choice.CopyFrom(_tool_choice(choice))
    if effort := options.get("effort"):
        request.reasoning.effort = _enum(pb.ReasoningEffort, "REASONING_EFFORT", effort, "effort")
    if (budget := options.get("budget")) is not None:
        _request._set(request, ("reasoning", "budget_tokens"), budget)
    if options.get("hide_thought"):
        request.reasoning.hidden = True
    if kwargs := options.get("template_kwargs"):
        request.template_kwargs.update(dict(kwargs))
    request.continue_final_message = bool(options.get("continue_final_message"))
    return request


def _message(m: Message) -> pb.ChatMessage:
    out = pb.ChatMessage(
        role=_enum(pb.Role, "ROLE", m.role, "role"), reasoning=m.reasoning, tool_call_id=m.tool_call_id, name=m.name
    )
    if m.content:
        out.content.add(text=m.content)
    for call in m.tool_calls:
        out.tool_calls.add(id=call.id, name=call.name).arguments.update(call.arguments)
    return out


def _tool(given: Mapping[str, Any]) -> pb.Tool:
    inner = given.get("function", given)
    tool = pb.Tool(name=inner["name"], description=inner.get("description") or "", strict=bool(inner.get("strict")))
    tool.parameters.update(inner.get("parameters") or {})
    return tool


def _tool_choice(given: str | Mapping[str, Any]) -> pb.ToolChoice:
    if isinstance(given, str):
        return pb.ToolChoice(mode=_enum(pb.ToolChoiceMode, "TOOL_CHOICE_MODE", given, "tool_choice"))
    name = given.get("function", given).get("name")
    if not isinstance(name, str) or not name:
        raise errors.InvalidRequest(f"is {dict(given)!r}; a mapping must have the name of a tool", "tool_choice")
    return pb.ToolChoice(name=name)


def tool_call(m: pb.ToolCall) -> ToolCall:
    """The value; whole numbers are integers."""
    return ToolCall(m.id, m.name, _whole(MessageToDict(m.arguments)))


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def chat_piece(m: pb.ChatDelta) -> ChatPiece:
    shared = pb.Delta(index=m.index, text=m.text, token_ids=m.token_ids, logprobs=m.logprobs)
    if m.HasField("trace"):
        shared.trace.CopyFrom(m.trace)
    piece = _request.piece(shared)
    calls = tuple(
        ToolCallPiece(
            c.position, c.id, c.name, c.arguments, tool_call(c.call) if c.HasField("call") else None, c.dropped
        )
        for c in m.tool_calls
    )
    return ChatPiece(piece.text, piece.token_ids, piece.logprobs, piece.index, piece.trace, False, m.reasoning, calls)


@dataclass
class _Said:
    reasoning: list[str] = field(default_factory=list)
    calls: dict[int, ToolCall] = field(default_factory=dict)


class ChatState(StreamState):
    """`StreamState` of a chat."""

    def __init__(self, request: pb.ChatRequest, attempts: Attempts) -> None:
        super().__init__(request, attempts)
        self._said: dict[int, _Said] = {}

    def _piece(self, message: Any) -> Piece:
        piece = chat_piece(message)
        said = self._said.setdefault(piece.index, _Said())
        said.reasoning.append(piece.reasoning)
        said.calls |= {c.position: c.call for c in piece.tool_calls if c.call is not None}
        return piece

    def message(self, index: int) -> Message:
        """What one sequence has said so far, as the conversation's next message."""
        said = self._said.get(index, _Said())
        calls = tuple(call for _, call in sorted(said.calls.items()))
        return Message("assistant", self.text(index), "".join(said.reasoning), calls)
