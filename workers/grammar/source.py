"""A format in its own notation becomes one grammar in llguidance's Lark, or a ValueError with the reason."""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import regex_to_lark

from workers.engine.contract import Grammar
from workers.grammar.gbnf import is_gbnf, to_lark
from workers.grammar.schema import simplified

MAX_DEPTH = 64  # of brackets and of JSON: the library's parsers recurse
MAX_BYTES = {
    "json_schema": 256 << 10,
    "regex": 64 << 10,
    "ebnf": 256 << 10,
    "choice": 2 << 20,
    "json": 0,
    "calls": 1 << 20,
}
MAX_CHOICES = 1024
MAX_CHOICE_BYTES = 1024
MAX_RULES = 2000

# Between the parts of a JSON value: nothing, one space, or a line's end with its indentation. Bounded, so that no model
# can fill its answer with blanks.
WHITESPACE = r" |\n[ \t]{0,32}"

# Forced text is not written as the tokenizer would write it: a mask holds every token that the grammar allows, and the
# choice stays the model's.
_OPTIONS = '%llguidance {"no_forcing": true}'

_JSON_OPTIONS = {"whitespace_pattern": WHITESPACE}


def lark_of(grammar: Grammar) -> str:
    """The whole grammar. Lines of a user's own grammar keep their numbers. Raises ValueError."""
    if grammar.kind not in MAX_BYTES:
        raise ValueError(f"kind {grammar.kind!r} is none of {', '.join(MAX_BYTES)}")
    size = len(grammar.text.encode())
    if size > MAX_BYTES[grammar.kind]:
        raise ValueError(f"has {size:,} bytes; at most {MAX_BYTES[grammar.kind]:,} are allowed")
    return f"{_BODY[grammar.kind](grammar.text)}\n{_OPTIONS}\n"


def _json_schema(text: str) -> str:
    return f"start: {json_rule(text)}"


def json_rule(text: str) -> str:
    """A JSON Schema as the body of a rule. Raises ValueError."""
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"is nested deeper than {MAX_DEPTH}") from None
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise ValueError("is not a JSON Schema: an object, true or false is")
    if schema is False:
        raise ValueError("false: no answer can match it")
    if isinstance(schema, bool):
        schema = {}
    if _depth(schema) > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH}")
    if "x-guidance" in schema:
        raise ValueError("x-guidance is not allowed; leave it out")
    return "%json " + json.dumps(simplified(schema) | {"x-guidance": _JSON_OPTIONS})


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _depth(value: Any) -> int:
    deepest, left = 0, [(value, 1)]
    while left:
        value, depth = left.pop()
        deepest = max(deepest, depth)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        left.extend((v, depth + 1) for v in inner)
    return deepest


def _json_object(_text: str) -> str:
    return _json_schema('{"type": "object"}')


def _regex(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character; write \\x00")
    _check_depth(text)
    # Non-Unicode shorthands would cut characters in two; \d, \w and \s mean Unicode's, as in Rust and Python.
    return f"start: /{regex_to_lark(text, '')}/" if text else 'start: ""'


def _check_depth(text: str) -> None:
    depth = deepest = 0
    for char in re.sub(r"\\.|\[(?:\\.|[^\]\\])*\]", "", text, flags=re.DOTALL):
        depth += (char == "(") - (char == ")")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise ValueError(f"brackets are nested deeper than {MAX_DEPTH}")


def _choice(text: str) -> str:
    try:
        choices = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
        raise ValueError("is not a JSON list of strings")
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise ValueError(f"has {len(choices)} strings; between 1 and {MAX_CHOICES:,} are allowed")
    for i, choice in enumerate(choices):
        if not 1 <= (size := len(choice.encode("utf-8", "replace"))) <= MAX_CHOICE_BYTES:
            raise ValueError(
                f"[{i}] has {size} bytes; each must have between 1 and {MAX_CHOICE_BYTES:,} bytes of UTF-8"
            )
    # One terminal of all: of several, the library takes the longest that fits so far.
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(c) for c in dict.fromkeys(choices))


def _ebnf(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty; it needs a rule root or start")
    if is_gbnf(text):
        lark = to_lark(text)
    else:
        lark = text
        bare = re.sub(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/|(?://|#)[^\n]*', " ", text)
        if "%llguidance" in bare:
            raise ValueError("%llguidance is not allowed; leave it out")
        if "<[" in bare:
            raise ValueError("<[...]> names tokens by id, which is not allowed; write the text")
        if not re.search(r"(?m)^\s*\??start(\.-?\d+)?\s*(\[[^\]]*\])?\s*:", bare):
            raise ValueError("has no rule root (in GBNF, with ::=) or start (in Lark, with :)")
        if max((_nesting(line) for line in [bare]), default=0) > MAX_DEPTH:
            raise ValueError(f"brackets are nested deeper than {MAX_DEPTH}")
    rules = len(re.findall(r"(?m)^[^\S\n]*[?!]*\w[\w.-]*\s*(?:\[[^\]]*\])?\s*:", lark))
    if rules > MAX_RULES:
        raise ValueError(f"has {rules:,} rules; at most {MAX_RULES:,} are allowed")
    return lark


def _calls(text: str) -> str:
    """Comes from the gateway, not from a user: it may name special tokens by id."""
    return text


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


_BODY = {
    "json_schema": _json_schema, "json": _json_object, "regex": _regex, "choice": _choice, "ebnf": _ebnf,
    "calls": _calls,
}  # fmt: skip
