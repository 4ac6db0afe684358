"""The typed messages of a ChatRequest, checked, as templates take them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from google.protobuf.struct_pb2 import Struct, Value

from router.bounds import show
from understudy.errors import InvalidRequest
from understudy.v1 import inference_pb2 as pb

MAX_MESSAGES, MAX_PARTS, MAX_CALLS, MAX_TOOLS = 4096, 1024, 128, 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}
# A Struct has no order. What comes first in schemas that people write comes first here, the rest by name.
_FIRST = {name: i for i, name in enumerate(("type", "description", "enum", "items", "properties", "required"))}

Json = dict[str, Any]


def plain(value: Struct) -> Json:
    """A Struct as JSON's types, in an order that is always the same; whole numbers become integers."""
    keys = sorted(value.fields, key=lambda k: (_FIRST.get(k, len(_FIRST)), k))
    return {key: _value(value.fields[key]) for key in keys}


def _value(value: Value) -> Any:
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return plain(value.struct_value)
    if kind == "list_value":
        return [_value(v) for v in value.list_value.values]
    if kind == "number_value":
        number = value.number_value
        return int(number) if number.is_integer() else number
    return None if kind in (None, "null_value") else getattr(value, kind)


def _check(condition: bool, message: str, field: str) -> None:
    if not condition:
        raise InvalidRequest(message, field)


def messages(request: pb.ChatRequest) -> list[Json]:
    """Raises InvalidRequest."""
    given = request.messages
    _check(1 <= len(given) <= MAX_MESSAGES, f"has {len(given)} entries; give 1 to {MAX_MESSAGES}", "messages")
    names: dict[str, str] = {}
    out = [_message(m, f"messages[{i}]", names) for i, m in enumerate(given)]
    if request.continue_final_message:
        last = given[-1]
        goes_on = last.role == pb.ROLE_ASSISTANT and not last.tool_calls and bool(out[-1]["content"])
        _check(
            goes_on,
            "needs a last message of the assistant's with text and without tool calls; leave it out",
            "continue_final_message",
        )
    return out


def _message(m: pb.ChatMessage, field: str, names: dict[str, str]) -> Json:
    _check(m.role in _ROLES, "is not set; it must be system, user, assistant or tool", f"{field}.role")
    _check(len(m.content) <= MAX_PARTS, f"has {len(m.content)} parts; at most {MAX_PARTS}", f"{field}.content")
    for i, part in enumerate(m.content):
        _check(part.WhichOneof("part") == "text", "has no text; only text is served", f"{field}.content[{i}]")
    role = _ROLES[m.role]
    out: Json = {"role": role, "content": "".join(part.text for part in m.content)}
    if m.role != pb.ROLE_ASSISTANT:
        for name in ("reasoning", "tool_calls"):
            _check(not getattr(m, name), f"belongs to the assistant, and this is {role}", f"{field}.{name}")
    if m.role != pb.ROLE_TOOL:
        for name in ("tool_call_id", "name"):
            _check(not getattr(m, name), f"belongs to a tool, and this is {role}", f"{field}.{name}")
    if m.reasoning:
        out |= {"reasoning_content": m.reasoning, "thinking": m.reasoning}
    if m.tool_calls:
        _check(len(m.tool_calls) <= MAX_CALLS, f"has more than {MAX_CALLS} entries", f"{field}.tool_calls")
        out["tool_calls"] = [_call(c, f"{field}.tool_calls[{i}]", names) for i, c in enumerate(m.tool_calls)]
    if m.role == pb.ROLE_TOOL:
        size = len(m.tool_call_id.encode())
        _check(size <= 128, f"has {size} bytes; at most 128", f"{field}.tool_call_id")
        name = m.name or names.get(m.tool_call_id, "")
        out |= {"tool_call_id": m.tool_call_id} if m.tool_call_id else {}
        out |= {"name": name} if name else {}
    return out


def _call(call: pb.ToolCall, field: str, names: dict[str, str]) -> Json:
    _check(bool(call.name), "is empty", f"{field}.name")
    if call.id:
        names[call.id] = call.name
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": plain(call.arguments)},
    }


def tools(request: pb.ChatRequest) -> list[Json]:
    """Tools that the model is told of. Raises InvalidRequest."""
    given = request.tools
    _check(len(given) <= MAX_TOOLS, f"has {len(given)} entries; at most {MAX_TOOLS}", "tools")
    seen: set[str] = set()
    out = []
    for i, tool in enumerate(given):
        bad = f"is {show(tool.name)}; it must be 1 to 64 letters, digits, `_`, `-` and `.`, and no other tool's"
        _check(bool(_NAME.fullmatch(tool.name)) and tool.name not in seen, bad, f"tools[{i}].name")
        seen.add(tool.name)
        parameters = plain(tool.parameters) or {"type": "object", "properties": {}}
        function = {"name": tool.name, "description": tool.description, "parameters": parameters}
        out.append({"type": "function", "function": function})
    choice = request.tool_choice
    if choice.WhichOneof("choice") == "name":
        known = f"the request's tools are {', '.join(seen)}" if seen else "the request has no tools"
        _check(choice.name in seen, f"is {show(choice.name)}; {known}", "tool_choice.name")
    _check(
        choice.mode != pb.TOOL_CHOICE_MODE_REQUIRED or bool(seen),
        "is required, but the request has no tools; give some", "tool_choice.mode",
    )  # fmt: skip
    return [] if choice.mode == pb.TOOL_CHOICE_MODE_NONE else out


def template_kwargs(request: pb.ChatRequest) -> Mapping[str, Any]:
    """Raises InvalidRequest."""
    given = plain(request.template_kwargs)
    for name in ("messages", "tools", "add_generation_prompt"):
        _check(name not in given, f"{name} cannot be set here; the request has a field for it", "template_kwargs")
    return given
