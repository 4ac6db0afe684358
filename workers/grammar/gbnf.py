"""GBNF, the EBNF of llama.cpp, to Lark.

    rule   = name "::=" choice
    choice = row ("|" row)*          row = (item repeat?)*
    item   = literal | class | "." | name | "(" choice ")"
    repeat = "*" | "+" | "?" | "{n}" | "{n,}" | "{n,m}"

A rule ends where the next `name ::=` begins. Literals become one terminal per character: llguidance's terminals are
greedy, and a longer one would take what another way through the grammar needs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

MAX_REPEAT = 10_000
MAX_DEPTH = 64  # of brackets: the library's parser recurses

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|\#[^\n]*)
    |(?P<head>[A-Za-z0-9_-]+(?=[ \t]*::=))|(?P<define>::=)|(?P<name>[A-Za-z0-9_-]+)
    |(?P<literal>"(?:[^"\\\n]|\\[^\n])*")|(?P<class>\[(?:[^\]\\\n]|\\[^\n])*\])
    |(?P<repeat>[*+?]|\{[ ]*\d+[ ]*(?:,[ ]*\d*[ ]*)?\})|(?P<sign>[|().])""",
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|(.))", re.DOTALL)
_LETTERS = {"n": "\n", "r": "\r", "t": "\t"}


def is_gbnf(text: str) -> bool:
    """Whether `text` defines rules by `::=`, and not by `:` as Lark does."""
    return re.search(r"(?m)^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", text) is not None


@dataclass
class _Reader:
    text: str
    at: int = 0
    depth: int = 0
    rules: dict[str, str] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)  # name of a rule to where it is first used
    kind: str = ""
    token: str = ""
    start: int = 0

    def fail(self, why: str, at: int | None = None) -> ValueError:
        line = self.text.count("\n", 0, self.start if at is None else at) + 1
        return ValueError(f"line {line}: {why}")

    def next(self) -> None:
        self.kind = "space"
        while self.kind == "space":
            self.start = self.at
            if self.at == len(self.text):
                self.kind = self.token = ""
                return
            match = _TOKEN.match(self.text, self.at)
            if match is None:
                raise self.fail(f"{self.text[self.at : self.at + 20]!r} is not expected here")
            self.kind, self.token, self.at = match.lastgroup or "", match.group(), match.end()

    def grammar(self) -> None:
        self.next()
        while self.kind:
            if self.kind != "head":
                raise self.fail(f"{self.token!r}: a rule begins with its name and ::=")
            name, at = self.token, self.start
            if name in self.rules:
                raise self.fail(f"rule {name} is defined twice")
            self.next()
            self.next()
            self.rules[name] = ""
            self.rules[name] = self.choice()
            if self.kind not in ("head", ""):
                raise self.fail(
                    f"{self.token!r} is not expected in rule {name}, which begins at line {_line(self, at)}"
                )

    def choice(self) -> str:
        rows = [self.row()]
        while self.token == "|" and self.kind == "sign":
            self.next()
            rows.append(self.row())
        return " | ".join(rows)

    def row(self) -> str:
        items: list[str] = []
        while self.kind in ("literal", "class", "name") or (self.kind == "sign" and self.token in "(."):
            item = self.item()
            while self.kind == "repeat":
                item = f"({item}){self.repeat()}"
                self.next()
            items.append(item)
        return " ".join(items) or '""'

    def item(self) -> str:
        kind, token = self.kind, self.token
        if kind == "sign" and token == "(":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise self.fail(f"brackets are nested deeper than {MAX_DEPTH}")
            self.next()
            inner = self.choice()
            if self.token != ")":
                raise self.fail("a bracket is not closed")
            self.depth -= 1
            item = f"({inner})"
        elif kind == "literal":
            item = " ".join(json.dumps(c) if ord(c) < 0x10000 else _regex(c) for c in self.plain(token[1:-1])) or '""'
            item = f"({item})"
        elif kind == "class":
            item = self.char_class(token[1:-1])
        elif kind == "name":
            self.used.setdefault(token, self.start)
            item = _rule(token)
        else:
            item = r"/[^\n]/"
        self.next()
        return item

    def repeat(self) -> str:
        if self.token in "*+?":
            return self.token
        low, _, high = self.token[1:-1].partition(",")
        if max(int(low), int(high.strip() or 0)) > MAX_REPEAT:
            raise self.fail(f"{self.token} repeats more than {MAX_REPEAT:,} times")
        return "{" + low.strip() + ("," + high.strip() if "," in self.token else "") + "}"

    def plain(self, text: str) -> str:
        """`text` without escapes."""

        def char(match: re.Match[str]) -> str:
            code = match[1] or match[2] or match[3]
            if code is None:
                if match[4] in _LETTERS or match[4] in '"\\[]-^':
                    return _LETTERS.get(match[4], match[4])
                raise self.fail(f"\\{match[4]} is no escape of GBNF")
            if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
                raise self.fail(f"{match[0]} is no character")
            return chr(int(code, 16))

        return _ESCAPE.sub(char, text)

    def char_class(self, body: str) -> str:
        negated = body.startswith("^")
        parts = re.findall(r"\\(?:x..|u.{4}|U.{8}|.)|.", body[negated:], re.DOTALL)
        signs = [(self.plain(p), p) for p in parts]
        out, i = "", 0
        while i < len(signs):
            if i + 2 < len(signs) and signs[i + 1][1] == "-":
                low, high = signs[i][0], signs[i + 2][0]
                if low > high:
                    raise self.fail(f"[{body}]: {low!r} to {high!r} is no range")
                out += f"{_code(low)}-{_code(high)}"
                i += 3
            else:
                out += _code(signs[i][0])
                i += 1
        if not out:
            raise self.fail("[] holds no character")
        return f"/[{'^' if negated else ''}{out}]/"


def _line(reader: _Reader, at: int) -> int:
    return reader.text.count("\n", 0, at) + 1


def _code(char: str) -> str:
    return f"\\u{{{ord(char):X}}}"


def _regex(char: str) -> str:
    return f"/{_code(char)}/"


def _rule(name: str) -> str:
    """A name that is no terminal of Lark and meets no other: root is start, letters that Lark would not take are
    written out."""
    if name == "root":
        return "start"
    return "r_" + "".join(c if c.islower() or c.isdigit() else f"_{ord(c):x}_" for c in name)


def to_lark(text: str) -> str:
    """The grammar in Lark. Raises ValueError with line and reason."""
    reader = _Reader(text)
    reader.grammar()
    for name, at in reader.used.items():
        if name not in reader.rules:
            raise reader.fail(f"rule {name} is not defined", at)
    if "root" not in reader.rules:
        raise ValueError("has no rule root")
    return "\n".join(f"{_rule(name)}: {body}" for name, body in reader.rules.items())
