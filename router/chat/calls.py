"""Answers that call tools under a grammar: what is written can be parsed, and arguments match the tools' schemas.

Calls that must be made are written as the model's template writes them. Where the model decides, an answer is any
text, in which a call's marker begins a call.

Compiling may take some tenths of a second: `grammar_of_calls` is called beside the event loop.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from router.chat.formats import HARMONY, ChatFormats
from router.chat.harmony import HarmonyParser
from router.chat.lark import TEXT, Marks, harmony_asides
from router.chat.messages import plain
from router.format import check
from router.models import ServedModel
from router.text import ModelText
from understudy.errors import InvalidRequest
from understudy.v1 import inference_pb2 as pb
from workers.engine.contract import Grammar, Thought

MAX_CALLS = 128  # in one answer


@dataclass(frozen=True)
class Held:
    """A tool whose arguments are held to `schema`, a JSON Schema as text."""

    name: str
    schema: str


@dataclass(frozen=True)
class Wanted:
    """`must`: the answer is calls and nothing else; `one`: of them, exactly one. `thinking`: it begins in a thought."""

    must: bool
    one: bool = False
    thinking: bool = False


def wanted_of(request: pb.ChatRequest) -> Wanted | None:
    """What the request's tools ask for beyond being told; None where that is nothing."""
    choice = request.tool_choice
    if choice.WhichOneof("choice") == "name":
        return Wanted(must=True, one=True)
    if choice.mode == pb.TOOL_CHOICE_MODE_REQUIRED:
        return Wanted(must=True)
    strict = choice.mode != pb.TOOL_CHOICE_MODE_NONE and any(tool.strict for tool in request.tools)
    return Wanted(must=False) if strict else None


def grammar_of_calls(request: pb.ChatRequest, model: ServedModel, wanted: Wanted, thought: Thought | None) -> Grammar:
    """For the engine. Raises InvalidRequest, with field and reason, where the calls cannot be held."""
    formats = model.chat_formats
    strict = [i for i, tool in enumerate(request.tools) if tool.strict]
    field = "tool_choice" if wanted.must else f"tools[{strict[0]}].strict"
    if why := _unknown(formats, model.text):
        raise InvalidRequest(f"cannot be kept: {why}; leave it out", field)
    tools = []
    for i, tool in enumerate(request.tools):
        if request.tool_choice.name not in ("", tool.name):
            continue
        schema = {"type": "object"} | (plain(tool.parameters) if wanted.must or tool.strict else {})
        if schema["type"] != "object":
            raise InvalidRequest("is not the schema of an object, as arguments are", f"tools[{i}].parameters")
        tools.append(Held(tool.name, json.dumps(schema)))
        check(Grammar("json_schema", tools[-1].schema), model, f"tools[{i}].parameters")
    grammar = Grammar("calls", calls_grammar(formats, model.text, tools, wanted))
    check(grammar, model, "tools")
    return Grammar(grammar.kind, grammar.text, None if formats.tools == HARMONY else thought)


def _unknown(formats: ChatFormats, text: ModelText) -> str:
    """Why the model's calls cannot be held to anything; empty where they can."""
    if not formats.tools:
        return "this model's template writes no calls, or in a format that is not known here"
    if formats.tools == HARMONY:
        for marker in HarmonyParser.MARKERS:
            if text.tokenizer.token_to_id(marker) not in text.special_ids:
                return f"{marker} is no special token of this model's tokenizer"
    return ""


def calls_grammar(formats: ChatFormats, text: ModelText, tools: Sequence[Held], wanted: Wanted) -> str:
    """In llguidance's Lark. `formats.tools` is not empty. Raises ValueError where a schema is none."""
    from workers.grammar.source import json_rule  # brings the library

    rules = [f"args_{i}: {json_rule(tool.schema)}" for i, tool in enumerate(tools)]
    return "\n".join([*_WRITERS[formats.tools](Marks(text, formats.marks), tools, wanted), *rules, TEXT])


def _start(marks: Marks, wanted: Wanted, marker: str, body: str, several: str = "") -> list[str]:
    """Rules of an answer in which `marker` begins `body`, once, or more often with `several` between."""
    again = f" ({several} call){{0,{MAX_CALLS - 1}}}" if several and not wanted.one else ""
    if wanted.must:
        return [f"start: call{again}", f"call: {marks(marker)} {body}"]
    if marks.is_special(marker):
        return ["start: (said call)* TEXT", f"said: TEXT {marks(marker)}", f"call: {body}"]
    return ["start: (said call)* TEXT", f"said[lazy]: TEXT {marks(marker)}", f"call: {body}"]


def _objects(tools: Sequence[Held], key: str) -> list[str]:
    """`object`: name and arguments as one JSON object."""
    heads = [json.dumps(f'{{"name": "{tool.name}", "{key}": ') for tool in tools]
    return ["object: " + " | ".join(f'{head} args_{i} "}}"' for i, head in enumerate(heads))]


def _hermes(marks: Marks, tools: Sequence[Held], wanted: Wanted) -> list[str]:
    body = rf'"\n"? object "\n"? {marks("</tool_call>")}'
    return [*_start(marks, wanted, "<tool_call>", body, r'"\n"?'), *_objects(tools, "arguments")]


def _llama3(marks: Marks, tools: Sequence[Held], wanted: Wanted) -> list[str]:
    """One call: the templates refuse more."""
    if wanted.must:
        return ["start: object", *_objects(tools, "parameters")]
    tag = marks("<|python_tag|>")
    said = "said" if marks.is_special("<|python_tag|>") else "said[lazy]"
    return [
        "start: object | PLAIN | said object",
        rf"{said}: PLAIN? {tag}",
        r"PLAIN: /\s*[^\s\{](.|\n)*|\s*/",
        *_objects(tools, "parameters"),
    ]


def _mistral(marks: Marks, tools: Sequence[Held], wanted: Wanted) -> list[str]:
    if "[ARGS]" not in marks.known:
        more = "" if wanted.one else rf' ("," " "? object){{0,{MAX_CALLS - 1}}}'
        body = rf'" "? "[" object{more} "]"'
        return [*_start(marks, wanted, "[TOOL_CALLS]", body), *_objects(tools, "arguments")]
    id = f"({marks('[CALL_ID]')} ID)? " if "[CALL_ID]" in marks.known else ""
    named = " | ".join(f"{json.dumps(tool.name)} {id}{marks('[ARGS]')} args_{i}" for i, tool in enumerate(tools))
    body = named if len(tools) == 1 else f"({named})"
    rules = ["ID: /[A-Za-z0-9]{9}/"] if id else []
    return [*_start(marks, wanted, "[TOOL_CALLS]", body, '""'), *rules]


def _deepseek(marks: Marks, tools: Sequence[Held], wanted: Wanted) -> list[str]:
    begin, sep, end = (marks(f"<｜tool▁{name}｜>") for name in ("call▁begin", "sep", "call▁end"))
    if "```json" in marks.known:
        heads = [rf'"function" {sep} {json.dumps(tool.name + chr(10) + "```json" + chr(10))}' for tool in tools]
        tail, between = rf'"\n```" {end}', r'"\n"? '
    else:
        heads = [f"{json.dumps(tool.name)} {sep}" for tool in tools]
        tail, between = end, ""
    more = "" if wanted.one else f" ({between}invoke){{0,{MAX_CALLS - 1}}}"
    body = f"invoke{more} {marks('<｜tool▁calls▁end｜>')}"
    invoke = " | ".join(f"{begin} {head} args_{i} {tail}" for i, head in enumerate(heads))
    return [*_start(marks, wanted, "<｜tool▁calls▁begin｜>", body), f"invoke: {invoke}"]


def _harmony(marks: Marks, tools: Sequence[Held], wanted: Wanted) -> list[str]:
    """One call, for it ends the turn; before it thought, and what is said to the user on the way."""
    channel, message = marks("<|channel|>"), marks("<|message|>")
    heads = [json.dumps(f"commentary to=functions.{tool.name} ") for tool in tools]
    call = " | ".join(
        f'{channel} {head} {marks("<|constrain|>")} "json" {message} args_{i}' for i, head in enumerate(heads)
    )
    final = "" if wanted.must else f' | {channel} "final" {message} TEXT'
    return [f"start: {harmony_asides(marks, wanted.thinking)} (call{final})", f"call: {call}"]


_WRITERS = {
    "hermes": _hermes,
    "llama3": _llama3,
    "mistral": _mistral,
    "deepseek": _deepseek,
    "harmony": _harmony,
}
