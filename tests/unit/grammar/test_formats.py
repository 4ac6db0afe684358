"""Formats over a small vocabulary, where every mask can be checked by brute force."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from understudy.errors import CheckpointError, InvalidRequest
from workers.engine.contract import Grammar
from workers.engine.formats import mask_words
from workers.grammar.formats import FIELDS, KEPT, CheckpointFormats, TokenFormats, TokenMatcher
from workers.grammar.vocabulary import Vocabulary, vocabulary_of

BYTES = [bytes([i]) for i in range(256)]
MORE = [b"ab", b"abc", b"bc", b'{"', b'":', b'"}', b"12", b", ", "é".encode(), "é".encode() + b"a", "€".encode()[:2]]
TABLE = [*BYTES, *MORE]
SPECIAL = len(TABLE)  # one special token, then a hole, then padding of the model
SIZE = SPECIAL + 20


@pytest.fixture(scope="module")
def formats() -> TokenFormats:
    return TokenFormats(Vocabulary.of([*TABLE, b"<|x|>", b""], {SPECIAL}, SIZE))


def allowed(matcher: TokenMatcher, size: int = SIZE) -> tuple[set[int], bool]:
    row = np.full(mask_words(size), 0xFFFFFFFF, dtype=np.uint32)
    may_end = matcher.mask_into(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    assert not bits[size:].any()
    return {int(i) for i in np.flatnonzero(bits)}, may_end


def follow(matcher: TokenMatcher, text: bytes) -> bool:
    """Byte by byte; whether the format lets it through."""
    for byte in text:
        if byte not in allowed(matcher)[0]:
            return False
        matcher.accept(byte)
    return True


def matches(formats: TokenFormats, grammar: Grammar, text: str | bytes) -> bool:
    matcher = formats.open(grammar)
    return follow(matcher, text if isinstance(text, bytes) else text.encode()) and allowed(matcher)[1]


@pytest.mark.parametrize(
    ("kind", "text", "whole", "others"),
    [
        ("choice", '["abc", "ab", "\\u00e9", "a\\"\\n\\\\"]', ["abc", "ab", "é", 'a"\n\\'], ["a", "abcd", "", "b"]),
        ("regex", "[a-c]{2,3}|é+", ["ab", "abc", "é", "éé"], ["a", "abcd", "aé", b"\xc3"]),
        ("regex", r"\d+/\d+", ["1/2", "12/3"], ["1", "/"]),
        ("regex", "", [""], ["a"]),
        ("json", "", ["{}", '{"a": [1, null]}', '{\n  "a": "é"\n}'], ["[]", "1", " {}", '{"a":1', "{}\n"]),
        ("json_schema", '{"enum": ["a", 12, null]}', ['"a"', "12", "null"], ["1", '"b"', "nul"]),
        ("json_schema", "true", ["[1]", "{}", '"x"'], ["[1", ""]),
        ("ebnf", 'root ::= "ab" "d" | [a-z] "bc"', ["abd", "abc", "zbc"], ["ab", "abdc"]),
        ("ebnf", 'root ::= x{2} (y | "-")?\nx ::= [^a\\n]  # no a\ny ::= "é"+', ["bb", "bb-", "xyéé"], ["ab", "b"]),
        ("ebnf", 'root ::= my-Rule\n  | "😀" .\nmy-Rule ::= "\\x41\\u00e9"', ["Aé", "😀x"], ["A", "😀\n"]),
        ("ebnf", 'start: "a" WORD?\nWORD: /[0-9]+/', ["a", "a12"], ["12", "aa"]),
    ],
)
def test_what_matches(formats: TokenFormats, kind: str, text: str, whole: list[str], others: list[str]) -> None:
    grammar = Grammar(kind, text)
    assert [w for w in whole if not matches(formats, grammar, w)] == []
    assert [o for o in others if matches(formats, grammar, o)] == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(ab|abc)(é|€)*[12]{0,3}"),
        ("json_schema", '{"type":"object","properties":{"ab":{"type":"integer"}},"required":["ab"]}'),
        ("ebnf", 'root ::= ("ab" | "a" "é") root? | "12"'),
        ("choice", '["abc", "abé", "a€", "12", "121"]'),
    ],
)
def test_a_mask_holds_exactly_the_tokens_whose_bytes_may_follow(formats: TokenFormats, kind: str, text: str) -> None:
    """Against the same grammar fed byte by byte, on random ways through it."""
    draw, grammar = random.Random(7), Grammar(kind, text)
    for _ in range(3):
        matcher, said = formats.open(grammar), b""
        for _ in range(7):
            bits, _may_end = allowed(matcher)
            fitting = set()
            for id, token in enumerate(TABLE):
                trial = formats.open(grammar)
                assert follow(trial, said)
                if follow(trial, token):
                    fitting.add(id)
            assert bits == fitting
            if not bits:
                assert matcher.finished
                break
            long = [i for i in sorted(bits) if i > 255] or sorted(bits)
            chosen = draw.choice(long if draw.random() < 0.5 else sorted(bits))
            matcher.accept(chosen)
            said += TABLE[chosen]


def test_special_unknown_and_padding_ids_are_never_allowed(formats: TokenFormats) -> None:
    bits, may_end = allowed(formats.open(Grammar("regex", r"(?s).*")))
    assert max(bits) < SPECIAL
    assert may_end
    with pytest.raises(ValueError, match="does not allow"):
        formats.open(Grammar("regex", "a")).accept(SPECIAL)


@pytest.mark.parametrize("size", [288, 289, 319, 320])
def test_masks_of_any_length(size: int) -> None:
    formats = TokenFormats(Vocabulary.of(TABLE, (), size))
    bits, may_end = allowed(formats.open(Grammar("regex", "[ab]*")), size)
    assert bits == {97, 98, 256}
    assert may_end


def test_a_refused_token_and_a_rollback_leave_the_matcher_as_before(formats: TokenFormats) -> None:
    matcher = formats.open(Grammar("regex", "abc?"))
    before = allowed(matcher)
    with pytest.raises(ValueError, match="does not allow token 120"):
        matcher.accept(ord("x"))
    assert allowed(matcher) == before
    for token in b"abc":
        matcher.accept(token)
    assert matcher.finished
    matcher.rollback(3)
    assert not matcher.finished
    assert allowed(matcher) == before
    matcher.accept(256)
    assert allowed(matcher) == ({ord("c")}, True)


def test_a_character_may_be_split_over_tokens(formats: TokenFormats) -> None:
    matcher = formats.open(Grammar("choice", '["€"]'))
    matcher.accept(SPECIAL - 1)
    assert allowed(matcher) == ({0xAC}, False)
    matcher.accept(0xAC)
    assert matcher.finished


def test_two_answers_in_one_grammar_do_not_meet(formats: TokenFormats) -> None:
    one, other = (formats.open(Grammar("regex", "a*b")) for _ in range(2))
    one.accept(ord("b"))
    assert one.finished
    assert allowed(other)[0] == {97, 98, 256}


def test_random_answers_under_a_schema_validate(formats: TokenFormats) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 3, "maximum": 42},
            "tags": {"type": "array", "items": {"enum": ["ab", "é"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    }
    draw = random.Random(3)
    for _ in range(20):
        matcher, said = formats.open(Grammar("json_schema", json.dumps(schema))), b""
        while not matcher.finished:
            chosen = draw.choice(sorted(allowed(matcher)[0]))
            matcher.accept(chosen)
            said += TABLE[chosen]
        jsonschema.validate(json.loads(said), schema)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", "{", "is not JSON"),
        ("json_schema", "NaN", "is not JSON"),
        ("json_schema", "[1]", "is not a JSON Schema"),
        ("json_schema", "false", "no answer can match"),
        ("json_schema", '{"not": {"const": 3}}', "not"),
        ("json_schema", '{"if": {"const": 1}, "then": false}', "if"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "example.com"),
        ("json_schema", '{"type": "string", "minLength": 5, "maxLength": 3}', "minLength"),
        ("json_schema", '{"type": "string", "pattern": "(?!a)b"}', "look-around"),
        ("json_schema", '{"type": "strin"}', "strin"),
        ("json_schema", '{"oneOf": [{"type": "integer"}, {"type": "number"}]}', "write anyOf"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"type": "string", "format": "iban"}', "iban"),
        ("json_schema", '{"x-guidance": {"lenient": true}}', "x-guidance"),
        ("json_schema", '{"items":' * 100 + "{}" + "}" * 100, "deeper than 64"),
        ("json_schema", '{"a":' * 30_000 + "{}" + "}" * 30_000, "deeper than 64"),
        ("json_schema", '"' + "a" * (256 << 10) + '"', "at most 262,144"),
        ("regex", "a(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", r"(a)\1", "backreference"),
        ("regex", r"[^\s\S]", "no answer of this model"),
        ("regex", "(" * 100 + "a" + ")" * 100, "deeper than 64"),
        ("regex", "a" * (64 << 10) + "b", "at most 65,536"),
        ("ebnf", 'root ::= "' + "ab" * 120_000 + '"', "cannot be held"),
        ("choice", "[]", "has 0 strings"),
        ("choice", '["a", ""]', "[1] has 0 bytes"),
        ("choice", '["a", 1]', "list of strings"),
        ("choice", json.dumps(["é" * 600]), "has 1200 bytes"),
        ("choice", json.dumps([str(i) for i in range(1025)]), "has 1025 strings"),
        ("ebnf", "", "is empty"),
        ("ebnf", 'x ::= "a"', "has no rule root"),
        ("ebnf", 'x: "a"', "has no rule root"),
        ("ebnf", 'root ::= "a"\nroot ::= "b"', "line 2: rule root is defined twice"),
        ("ebnf", 'root ::= "a"\n  x', "line 2: rule x is not defined"),
        ("ebnf", 'root ::= "a" (\n "b"', "bracket is not closed"),
        ("ebnf", 'root ::= "a" ! "b"', "is not expected here"),
        ("ebnf", 'root ::= "\\q"', "no escape"),
        ("ebnf", "root ::= [z-a]", "no range"),
        ("ebnf", 'root ::= "a"{2,100000}', "more than 10,000"),
        ("ebnf", 'start: "a" b', 'line 1: unknown name: "b"'),
        ("ebnf", 'start: "a" b\n\nb: "c" <|x|>', "special token"),
        ("ebnf", 'start: "a" <[267]>', "names tokens by id"),
        ("ebnf", 'start: "a"\n%llguidance {}', "%llguidance"),
        ("ebnf", "start: " + "(" * 100 + '"a"' + ")" * 100, "deeper than 64"),
        ("ebnf", "root ::= " + "(" * 100 + '"a"' + ")" * 100, "deeper than 64"),
        ("ebnf", "\n".join(["start: a1", *(f'a{i}: "x"' for i in range(3000))]), "at most 2,000"),
        ("yaml", "a", "kind 'yaml'"),
    ],
)
def test_what_cannot_be_held_is_refused_with_field_and_reason(
    formats: TokenFormats, kind: str, text: str, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(reason)) as refused:
        formats.open(Grammar(kind, text))
    assert refused.value.field == FIELDS.get(kind, "format")
    assert len(str(refused.value)) < 700


def test_a_format_that_becomes_too_much_work_is_a_dead_end_and_no_crash(formats: TokenFormats) -> None:
    matcher = formats.open(Grammar("regex", "(a|b|[^c]{1,3000}){1,3000}(.*a.{20})"))
    draw = random.Random(1)
    for _ in range(3000):
        bits, may_end = allowed(matcher)
        if not bits:
            break
        matcher.accept(draw.choice((97, 98)))
    assert matcher.error
    assert (bits, may_end, matcher.finished) == (set(), False, False)
    matcher.rollback(1)


def test_compiled_grammars_are_kept_and_bounded(formats: TokenFormats) -> None:
    for i in range(KEPT + 5):
        formats.open(Grammar("choice", json.dumps([f"a{i}"])))
    assert len(formats._compiled) == KEPT
    assert matches(formats, Grammar("choice", '["a0"]'), "a0")


def test_a_checkpoint_without_a_usable_tokenizer_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"tokenizer.json: not in the checkpoint"):
        CheckpointFormats(tmp_path, 10).open(Grammar("json"))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is not JSON"):
        vocabulary_of({"tokenizer.json": b"{"}, 10)
    word = {"model": {"vocab": {"a": 0}}, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(word))
    formats = CheckpointFormats(tmp_path, 10)
    formats.prepare()  # nobody has asked for a format yet: it is no failure
    with pytest.raises(InvalidRequest, match="no bytes of their own"):
        formats.open(Grammar("json"))


def test_what_a_first_grammar_needs_is_prepared(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    formats = CheckpointFormats(demo_model, 4096)
    formats.prepare()
    monkeypatch.setattr("workers.grammar.formats.vocabulary_of", None)
    monkeypatch.setattr("llguidance.LLTokenizer", None)
    assert formats.open(Grammar("choice", '["yes"]')).mask_into(np.zeros(mask_words(4096), np.uint32)) is False
