"""JSON read one character at a time: whether what came so far can still become an object, and where its members lie."""

from __future__ import annotations

import json
import math
import re
from typing import Any

MAX_DEPTH = 24  # of nested values; a protobuf Struct takes three messages for each, and parsers stop at 100
_BARE = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|true|false|null")
_SPACE = " \t\r\n"


class JsonObject:
    """One object. Line breaks within strings are let through, for models write them."""

    def __init__(self) -> None:
        self.done = False
        self.member: str | None = None  # key of the outermost object whose value is being read
        self.began = False  # the last character began the value of `member`
        self.ended: str | None = None  # the member whose value ended at the last character, or just before it
        self.inclusive = True  # the last character belongs to the value that ended
        self._stack: list[str] = []
        self._expect = "object"
        self._key = ""
        self._bare = ""
        self._is_key = False
        self._hex = 0

    def push(self, c: str) -> bool:
        """False where no JSON object goes on so; nothing may be pushed after that, or once it is done."""
        self.began, self.ended = False, None
        expect = self._expect
        if expect == "string":
            return self._in_string(c)
        if expect == "bare":
            if c not in ",]}" + _SPACE:
                self._bare += c
                return len(self._bare) <= 400
            if not _BARE.fullmatch(self._bare):
                return False
            self._value_ended(inclusive=False)
            expect = self._expect
        if c in _SPACE:
            return True
        if expect in ("key", "key}") and c == '"':
            self._expect, self._is_key, self._key = "string", True, ""
            return True
        if expect == "colon":
            self._expect = "value"
            return c == ":"
        if expect in ("after", "key}", "value]") and c in "}]":
            return self._close(c)
        if expect == "after":
            self._expect = "key" if self._stack[-1] == "{" else "value"
            return c == ","
        return expect in ("object", "value", "value]") and self._value(c, expect)

    def _in_string(self, c: str) -> bool:
        if self._is_key:
            self._key += c
        if self._hex:
            self._hex -= 1
            return c in "0123456789abcdefABCDEF"
        if self._bare == "\\":
            self._bare = ""
            self._hex = 4 if c == "u" else 0
            return c in '"\\/bfnrtu'
        if c == "\\":
            self._bare = "\\"
        elif c == '"' and self._is_key:
            self._is_key, self._expect = False, "colon"
            if len(self._stack) == 1:
                self.member = json.loads('"' + self._key, strict=False)
        elif c == '"':
            self._value_ended(inclusive=True)
        return True

    def _value(self, c: str, expect: str) -> bool:
        self.began = len(self._stack) == 1
        if c in "{[" and len(self._stack) < MAX_DEPTH and (c == "{" or expect != "object"):
            self._stack.append(c)
            self._expect = "key}" if c == "{" else "value]"
            return True
        if expect == "object":
            return False
        self._expect = "string" if c == '"' else "bare"
        self._bare = "" if c == '"' else c
        return c == '"' or c in "-0123456789tfn"

    def _close(self, c: str) -> bool:
        if (self._stack.pop() == "{") != (c == "}"):
            return False
        if not self._stack:
            self.done = True
        else:
            self._value_ended(inclusive=True)
        return True

    def _value_ended(self, inclusive: bool) -> None:
        self._expect, self._bare = "after", ""
        if len(self._stack) == 1:
            self.ended, self.inclusive, self.member = self.member, inclusive, None


def parsed(text: str) -> dict[str, Any] | None:
    """The object; None where it cannot be one of the API's: not finite, not Unicode, not an object."""
    try:
        value = json.loads(text, strict=False)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        if not _finite(value):
            return None
    except (ValueError, OverflowError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, int | float) or math.isfinite(float(value))
