"""Grammars of tool calls: whatever they let through is parsed as calls whose arguments match the tools' schemas."""

from __future__ import annotations

import json
import random
import re
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest

from router.chat.calls import Held, Wanted, calls_grammar
from router.chat.formats import ChatFormats
from router.chat.lark import Marks, harmony_final
from router.chat.parser import Kind
from workers.engine.contract import Grammar, Thought
from workers.engine.formats import Matcher, mask_words
from workers.grammar.formats import TokenFormats
from workers.grammar.vocabulary import Vocabulary

MARKERS = [
    "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    *(f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")),
    *(f"<|{name}|>" for name in ("channel", "message", "end", "start", "constrain")),
]  # fmt: skip
MORE = ['{"', '"}', '": "', "}}", '{"name": "', ', "arguments": ', "\n</", "<tool"]
SIZE = 256 + len(MARKERS) + len(MORE)
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/name"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"name": {"enum": ["Rome", "Oslo", 'a "b"']}},
}
TIME = {"type": "object", "properties": {"zone": {"enum": [1, 2]}}, "required": ["zone"], "additionalProperties": False}
SCHEMAS = {"weather": CITY, "weather.now": TIME}
TOOLS = [Held(name, json.dumps(schema)) for name, schema in SCHEMAS.items()]


class Side(NamedTuple):
    """A text side of bytes, markers and a few longer tokens."""

    formats: TokenFormats
    text: Any


def side(special: bool) -> Side:
    spoken = [b"" if special else m.encode() for m in MARKERS] + [m.encode() for m in MORE]

    class Text:
        class tokenizer:
            token_to_id = staticmethod(lambda m: 256 + MARKERS.index(m) if m in MARKERS else None)

        special_ids = set(range(256, 256 + len(MARKERS))) if special else set()

    vocabulary = Vocabulary(tuple([bytes([i]) for i in range(256)] + spoken), SIZE)
    return Side(TokenFormats(vocabulary), Text)


SIDES = {True: side(True), False: side(False)}
SHOWN = [*[bytes([i]) for i in range(256)], *(m.encode() for m in (*MARKERS, *MORE))]
FAMILIES = [
    ("hermes", "", True), ("hermes", "", False), ("llama3", "", True), ("llama3", "", False), ("mistral", "", True),
    ("mistral", "[ARGS]", True), ("mistral", "[ARGS] [CALL_ID]", True), ("mistral", "[ARGS]", False),
    ("deepseek", "", True), ("deepseek", "```json", True), ("deepseek", "```json", False), ("harmony", "", True),
]  # fmt: skip


def ids_of(text: str) -> list[int]:
    parts = re.split("(" + "|".join(map(re.escape, MARKERS)) + ")", text)
    return [i for p in parts for i in ([256 + MARKERS.index(p)] if p in MARKERS else p.encode())]


def allowed(matcher: Matcher) -> tuple[list[int], bool]:
    row = np.zeros(mask_words(SIZE), np.uint32)
    may_end = matcher.mask_into(row)
    return [int(i) for i in np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))], may_end


def follow(matcher: Matcher, ids: list[int]) -> bool:
    """Whether the grammar lets them through, one after the other."""
    for id in ids:
        if id not in allowed(matcher)[0]:
            return False
        matcher.accept(id)
    return True


def wander(matcher: Matcher, rng: random.Random, prefix: str = "") -> str:
    """Any whole answer that the grammar allows, beginning with `prefix`."""
    ids = ids_of(prefix)
    assert follow(matcher, ids)
    while True:
        found, may_end = allowed(matcher)
        if may_end and (not found or rng.random() < 0.3):
            return b"".join(SHOWN[i] for i in ids).decode()
        quiet = [i for i in found if SHOWN[i] != b"\n"] or found
        # Closing brackets and markers are rare among all the bytes that free text may hold.
        leave = [i for i in quiet if i >= 256 or SHOWN[i] in b'}"']
        ids.append(rng.choice(leave if leave and rng.random() < 0.5 else quiet))
        assert len(ids) < 4000
        matcher.accept(ids[-1])


def calls_of(formats: ChatFormats, text: str, thinking: bool = False) -> tuple[list[tuple[str, Any]], str]:
    """Calls and speech."""
    parser = formats.parser(True, thinking)
    parser.feed(text)
    parser.finish()
    names: dict[int, str] = {}
    calls = []
    for event in parser.events:
        if event.kind is Kind.CALL:
            names[event.call] = event.text
        elif event.kind is Kind.DONE:
            calls.append((names[event.call], event.value))
    assert not [e for e in parser.events if e.kind is Kind.DROPPED]
    return calls, "".join(e.text for e in parser.events if e.kind is Kind.TEXT)


def opened(family: str, marks: str, special: bool, wanted: Wanted, tools: list[Held]) -> tuple[ChatFormats, Matcher]:
    formats = ChatFormats(family, "harmony" if family == "harmony" else "", marks=frozenset(marks.split()))
    grammar = calls_grammar(formats, SIDES[special].text, tools, wanted)
    return formats, SIDES[special].formats.open(Grammar("calls", grammar))


@pytest.mark.parametrize(("family", "marks", "special"), FAMILIES)
def test_whatever_a_forced_answer_is_it_is_calls(family: str, marks: str, special: bool) -> None:
    rng = random.Random(1)
    counts = set()
    for one in (False, True) * 8:
        tools = TOOLS[1:] if one else TOOLS
        formats, matcher = opened(family, marks, special, Wanted(must=True, one=one), tools)
        thought = "<|channel|>analysis<|message|>Well…<|end|><|start|>assistant" if family == "harmony" else ""
        calls, said = calls_of(formats, wander(matcher, rng, thought))
        assert said == "" or family == "harmony"  # which may speak on the way to its call
        counts.add(len(calls))
        assert len(calls) == 1 if one else calls
        for name, arguments in calls:
            assert name in [t.name for t in tools]
            jsonschema.validate(arguments, SCHEMAS[name])
    assert (max(counts) > 1) == (family not in ("llama3", "harmony"))


@pytest.mark.parametrize(("family", "marks", "special"), FAMILIES)
def test_where_the_model_decides_its_calls_are_held(family: str, marks: str, special: bool) -> None:
    begin = {
        "hermes": "Hm <too.<tool_call>", "llama3": "{", "mistral": "Hm [T[TOOL_CALLS]",
        "deepseek": "Hm <｜tool▁calls▁begin｜>",
        "harmony": "<|channel|>commentary<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to",
    }[family]  # fmt: skip
    rng = random.Random(2)
    for _ in range(6):
        formats, matcher = opened(family, marks, special, Wanted(must=False), TOOLS)
        text = wander(matcher, rng, begin)
        calls, _ = calls_of(formats, text)
        assert calls, text
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMAS[name])
    speech = "<|channel|>final<|message|>No {call}." if family == "harmony" else "No {call}."
    formats, matcher = opened(family, marks, special, Wanted(must=False), TOOLS)
    assert follow(matcher, ids_of(speech))
    assert allowed(matcher)[1]
    assert calls_of(formats, speech) == ([], "No {call}.")


def test_forced_calls_let_nothing_else_through() -> None:
    for family, marks, special in FAMILIES:
        _, matcher = opened(family, marks, special, Wanted(must=True), TOOLS)
        assert not follow(matcher, ids_of("No call."))
        found, may_end = allowed(matcher)
        assert found
        assert not may_end


def test_llama3_may_begin_with_its_tag() -> None:
    formats, matcher = opened("llama3", "", True, Wanted(must=False), TOOLS)
    text = 'So: <|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}'
    assert follow(matcher, ids_of(text))
    assert calls_of(formats, text) == ([("weather", {"city": "Rome"})], "So: ")


@pytest.mark.parametrize("thinking", [False, True])
def test_harmonys_format_begins_with_its_final_message(thinking: bool) -> None:
    text, formats = SIDES[True].text, SIDES[True].formats
    thought = Thought(grammar=harmony_final(Marks(text), thinking))
    matcher = formats.open(Grammar("regex", "[a-c]{2}", thought))
    begun = "hm<|end|><|start|>assistant" if thinking else ""
    asides = "<|channel|>analysis<|message|>ab<|end|><|start|>assistant" * 2
    ids = ids_of(f"{begun}{asides}<|channel|>final<|message|>ab")
    assert follow(matcher, ids[:-2])
    assert allowed(matcher) == ([97, 98, 99], False)
    matcher.rollback(40)
    assert follow(matcher, ids[-42:])
    assert matcher.finished
    assert not follow(formats.open(Grammar("regex", "[a-c]{2}", thought)), ids_of(f"{begun}ab<|end|>x"))
