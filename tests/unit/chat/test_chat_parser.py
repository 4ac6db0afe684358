"""Answers of every format to events: in any pieces the same, nothing lost, nothing half."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.chat.harmony import HarmonyParser
from router.chat.parser import Kind, Parser

ARGS = '{"city": "Paris", "days": [1, -2.5e3], "deep": {"a": "}\\"<"}}'
CALL = '{"name": "weather", "arguments": ' + ARGS + "}"
VALUE = {"city": "Paris", "days": [1, -2500.0], "deep": {"a": '}"<'}}


def make(tools: str, thoughts: str = "think", thinking: bool = False) -> Parser:
    return HarmonyParser(thinking) if tools == "harmony" else Parser(tools, thoughts, thinking)


def told(parser: Parser) -> list[tuple[Any, ...]]:
    """Events with neighbours put together."""
    out: list[tuple[Any, ...]] = []
    for e in parser.events:
        if out and e.kind in (Kind.TEXT, Kind.THOUGHT, Kind.ARGUMENTS) and out[-1][0] is e.kind:
            out[-1] = (e.kind, out[-1][1] + e.text, *out[-1][2:])
        else:
            out.append((e.kind, e.text, e.call, e.value))
    return out


def run(tools: str, pieces: list[str], thoughts: str = "think", thinking: bool = False) -> list[tuple[Any, ...]]:
    parser = make(tools, thoughts, thinking)
    for piece in pieces:
        before = parser.decided
        parser.feed(piece)
        assert before <= parser.decided
    parser.finish()
    assert parser.decided == sum(map(len, pieces))
    return told(parser)


def short(events: list[tuple[Any, ...]]) -> list[tuple[str, Any]]:
    return [(k.value, v if k is Kind.DONE else t) for k, t, _, v in events if k is not Kind.ARGUMENTS]


SEP = "<｜tool▁sep｜>"
BEGIN, END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
CASES = [
    ("hermes", f"Hm.<tool_call>\n{CALL}\n</tool_call>", [("text", "Hm."), ("call", "weather"), ("done", VALUE)]),
    (
        "hermes",
        f"<think>\nI think.\n</think>\n\n<tool_call>{CALL}</tool_call>\n<tool_call>\n{CALL}\n</tool_call>",
        [("thought", "I think."), ("call", "weather"), ("done", VALUE), ("call", "weather"), ("done", VALUE)],
    ),
    ("hermes", '<tool_call>{"arguments": {}, "name": "f"}</tool_call>!', [("call", "f"), ("done", {}), ("text", "!")]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        [("call", "f"), ("done", {"a": 1})],
    ),
    ("llama3", CALL.replace("arguments", "parameters"), [("call", "weather"), ("done", VALUE)]),
    ("llama3", f"<|python_tag|>{CALL}; {CALL}", [("call", "weather"), ("done", VALUE)] * 2),
    ("llama3", "Plain {text}", [("text", "Plain {text}")]),
    ("mistral", f"[TOOL_CALLS] [{CALL}, {CALL}]", [("call", "weather"), ("done", VALUE)] * 2),
    ("mistral", f"a[TOOL_CALLS]weather[ARGS]{ARGS}", [("text", "a"), ("call", "weather"), ("done", VALUE)]),
    (
        "mistral",
        f"[TOOL_CALLS]f[CALL_ID]x1[ARGS]{{}}[TOOL_CALLS]g{ARGS}",
        [("call", "f"), ("done", {}), ("call", "g"), ("done", VALUE)],
    ),
    (
        "deepseek",
        f"So.<｜tool▁calls▁begin｜>{BEGIN}function{SEP}weather\n```json\n{ARGS}\n```{END}\n"
        f"{BEGIN}function{SEP}f\n```json\n{{}}\n```{END}<｜tool▁calls▁end｜>",
        [("text", "So."), ("call", "weather"), ("done", VALUE), ("call", "f"), ("done", {})],
    ),
    (
        "deepseek",
        f"<｜tool▁calls▁begin｜>{BEGIN}weather{SEP}{ARGS}{END}<｜tool▁calls▁end｜>",
        [("call", "weather"), ("done", VALUE)],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>",
        [("thought", "Think."), ("text", "Hello.")],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>T<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        f"<|constrain|>json<|message|>{ARGS}<|call|>",
        [("thought", "T"), ("call", "weather"), ("done", VALUE)],
    ),
    (
        "harmony",
        " to=functions.f<|channel|>commentary json<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>x",
        [("call", "f"), ("done", {}), ("text", "x")],
    ),
    ("harmony", "No channel at all", [("text", "No channel at all")]),
    # What is no call after all comes out as it was.
    ("hermes", "<tool_call>nothing</tool_call>", [("text", "<tool_call>nothing</tool_call>")]),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}', [("text", '<tool_call>{"name": 3, "arguments": {}}')]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("text", '<tool_call>{"name": "f"}</tool_call>')]),
    ("hermes", '<tool_call>{"name": "f", "arg', [("text", '<tool_call>{"name": "f", "arg')]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"a": oops}}',
        [("call", "f"), ("dropped", ""), ("text", '<tool_call>{"name": "f", "arguments": {"a": oops}}')],
    ),
    ("hermes", "<think>cut", [("thought", "cut")]),
    ("hermes", "a < b <tool", [("text", "a < b <tool")]),
    ("llama3", '{"a": 1}', [("text", '{"a": 1}')]),
    ("mistral", "[TOOL_CALLS] no", [("text", "[TOOL_CALLS] no")]),
]


@pytest.mark.parametrize(("tools", "text", "expected"), CASES, ids=[f"{c[0]}{i}" for i, c in enumerate(CASES)])
def test_formats_whole_and_by_characters(tools: str, text: str, expected: list[tuple[str, Any]]) -> None:
    whole = run(tools, [text])
    assert short(whole) == expected
    assert run(tools, list(text)) == whole
    done = [i for i, e in enumerate(whole) if e[0] is Kind.DONE]
    assert all(whole[i - 1][0] is Kind.ARGUMENTS for i in done)


def test_a_prompt_that_opens_the_thought() -> None:
    assert short(run("hermes", ["\nso", "\n</thi", "nk>\n\nHi"], thinking=True)) == [("thought", "so"), ("text", "Hi")]
    assert short(run("harmony", ["so<|e", "nd|>"], thinking=True)) == [("thought", "so")]
    assert short(run("mistral", ["[THINK]a[/THINK]b"], "mistral")) == [("thought", "a"), ("text", "b")]


def test_arguments_stream_before_they_are_whole() -> None:
    parser = Parser("hermes")
    parser.feed('<tool_call>{"name": "f", "arguments": {"a": "b')
    assert [e.kind for e in parser.events] == [Kind.CALL, Kind.ARGUMENTS]
    assert parser.events[-1].text == '{"a": "b'
    assert parser.decided == len('<tool_call>{"name": "f", "arguments": {"a": "b')


def test_arguments_that_a_struct_cannot_hold_are_text() -> None:
    for bad in ('{"a": 1e999}', '{"a": "\\ud800"}', '{"a":' * 30 + "1" + "}" * 30):
        text = '<tool_call>{"name": "f", "arguments": ' + bad + "}</tool_call>"
        events = run("hermes", list(text))
        assert events == run("hermes", [text])
        assert "".join(e[1] for e in events if e[0] is Kind.TEXT) == text


MARKS = ["<think>", "</think>", "<|end|>", "<|message|>", "<|channel|>", "<tool_call>", "[TOOL_CALLS]", CALL]
PARTS = {c for case in CASES for c in (case[1], case[1][:40], case[1][-25:])}
BITS = st.sampled_from([*sorted(PARTS), *MARKS, "{", "}", '"', "\n", "<", "[", "a", "🙂"])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(["", "hermes", "llama3", "mistral", "deepseek", "harmony"]),
    st.lists(BITS, max_size=6).map("".join),
    st.lists(st.integers(0, 400), max_size=8),
    st.booleans(),
)
def test_any_split_gives_the_same_events(tools: str, text: str, cuts: list[int], thinking: bool) -> None:
    at = sorted({min(c, len(text)) for c in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(at)]
    whole = run(tools, [text], thinking=thinking)
    assert run(tools, pieces, thinking=thinking) == whole
    assert run(tools, list(text), thinking=thinking) == whole
