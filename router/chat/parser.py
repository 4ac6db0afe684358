"""An answer's text, as it comes, to thought, speech and tool calls.

Whatever the pieces in which the text comes, the events are the same. Nothing is given out that could still be half a
marker, and nothing is lost: what looks like a call and is none comes out as the text that it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from router.chat.jsonscan import JsonObject, parsed

MAX_HEAD = 256  # characters between a call's marker and its JSON


class Kind(Enum):
    TEXT = "text"
    THOUGHT = "thought"
    CALL = "call"  # begins; `text` is the tool's name
    ARGUMENTS = "arguments"  # of the call, as written
    DONE = "done"  # `value` are the arguments
    DROPPED = "dropped"  # was no call after all; its whole text follows


@dataclass(frozen=True, slots=True)
class Event:
    """Decided by the first `end` characters of the answer. Unless it is `whole`, `text` lies right before them."""

    kind: Kind
    end: int
    text: str = ""
    call: int = -1
    value: dict[str, Any] | None = None
    whole: bool = False


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls. `head` matches from a marker up to the JSON, with the tool's name where it
    stands there; `glue` is what may follow a call; after one of `again` another call's JSON may begin."""

    markers: tuple[str, ...]
    head: str
    glue: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    leading: bool = False  # an answer that begins with an object may be a call


TOOL_FORMATS = {
    "hermes": ToolFormat(("<tool_call>",), r"<tool_call>\s*", ("</tool_call>",)),
    "llama3": ToolFormat(("<|python_tag|>",), r"(<\|python_tag\|>)?\s*", (";",), (";",), leading=True),
    "mistral": ToolFormat(
        ("[TOOL_CALLS]",),
        r"\[TOOL_CALLS\]\s*(\[\s*|(?P<name>[\w.-]+)(\[CALL_ID\]\w+)?(\[ARGS\])?\s*)?",
        (",", "]"),
        (",",),
    ),
    "deepseek": ToolFormat(
        ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"),
        r"(<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>"
        r"(function<｜tool▁sep｜>(?P<name>[^\n<]+)\n```json\n|(?P<other>[^\n<]+)<｜tool▁sep｜>)\s*",
        ("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"),
    ),
}
THOUGHTS = {"think": ("<think>", "</think>"), "mistral": ("[THINK]", "[/THINK]")}


class _Call:
    """A call's JSON. The name stands in it, beside the arguments, unless it is known already."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self._direct = name is not None
        self._json = JsonObject()
        self._seen = ""
        self._starts: dict[str, int] = {}
        self._values: dict[str, str] = {}
        self.arguments_now = False  # the last character is one of arguments that can be passed on as they come
        self.streams = False

    def push(self, c: str) -> bool:
        scan = self._json
        if not scan.push(c):
            return False
        self._seen += c
        self.arguments_now = self.streams
        if self._direct:
            self.streams = self.arguments_now = True
            return True
        if scan.began and scan.member is not None:
            self._starts[scan.member] = len(self._seen) - 1
            if scan.member in ("arguments", "parameters") and self.name is not None and c == "{":
                self.streams = self.arguments_now = True
            if len(self._starts) > 8:
                return False
        if scan.ended is not None:
            value = self._seen[self._starts[scan.ended] : None if scan.inclusive else -1]
            self._values[scan.ended] = value
            if scan.ended == "name":
                self.name = self._name(value)
                return self.name is not None
            if scan.ended in ("arguments", "parameters"):
                self.streams = False
        return not (scan.done and not {"arguments", "parameters"} & self._values.keys())

    @staticmethod
    def _name(value: str) -> str | None:
        found = parsed(f'{{"name": {value}}}')
        name = found["name"] if found is not None else None
        return name if isinstance(name, str) and name else None

    @property
    def done(self) -> bool:
        return self._json.done

    def arguments(self) -> tuple[str, dict[str, Any]] | None:
        """As written, and what they mean; None where they are no object. Some models write the object as a string."""
        if self._direct:
            written = self._seen
        else:
            written = self._values.get("arguments", self._values.get("parameters", ""))
        if written.startswith('"'):
            inner = parsed(f'{{"text": {written}}}')
            written = str(inner["text"]) if inner is not None else ""
        value = parsed(written)
        return None if value is None else (written, value)


class Parser:
    """Feed it text, take `events`; `decided` counts the characters whose events are there.

    `tools` is a key of TOOL_FORMATS, `thoughts` one of THOUGHTS, each empty for none; `thinking` where the prompt
    ends within a thought.
    """

    def __init__(self, tools: str = "", thoughts: str = "", thinking: bool = False) -> None:
        self.events: list[Event] = []
        self.decided = 0
        self.calls = 0  # complete ones
        self.spans: list[list[int]] = []  # [start, end) of thoughts with their markers; the last may lack its end
        self._buffer = ""  # not decided
        self._format = TOOL_FORMATS.get(tools)
        self._thought = THOUGHTS.get(thoughts)
        self._begun = 0
        self._call = _Call(None)
        self._raw = ""
        self._scan = 0
        self._announced = False
        self._lead = False  # line breaks right after a marker say nothing
        self._fresh = True  # nothing was said yet
        self._again = False
        self._state: Callable[[], bool] = self._in_text
        if thinking:
            self._begin_thought(0)

    def feed(self, text: str) -> None:
        """The next part of the answer."""
        self._buffer += text
        while self._state():
            pass

    def finish(self) -> None:
        """The answer ends: what was held back comes out."""
        while self._buffer:
            if self._state == self._in_head:
                self._no_call()
            elif self._state == self._in_call and self._scan:
                self._give(Kind.TEXT, self._scan)
                self._scan, self._state = 0, self._in_text
            else:
                kind = Kind.THOUGHT if self._state == self._in_thought else Kind.TEXT
                self._give(kind, len(self._buffer))
            while self._buffer and self._state():
                pass

    # What comes out.

    def _give(self, kind: Kind, chars: int) -> None:
        if chars:
            text, end = self._buffer[:chars], self.decided + chars
            last = self.events[-1] if self.events else None
            if last is not None and last.kind is kind and not last.whole and last.end == self.decided:
                text = last.text + text
                self.events.pop()
            self.events.append(Event(kind, end, text, self._begun - 1 if kind is Kind.ARGUMENTS else -1))
            self._skip(chars)
            if kind is Kind.TEXT:
                self._fresh = False

    def _skip(self, chars: int) -> None:
        self._buffer = self._buffer[chars:]
        self.decided += chars

    def _tell(self, kind: Kind, text: str = "", value: dict[str, Any] | None = None) -> None:
        call = -1 if kind is Kind.TEXT else self._begun - 1
        self.events.append(Event(kind, self.decided, text, call, value, whole=True))

    # States: each takes what it can of the buffer and says whether to go on.

    def _drop_lead(self) -> bool:
        """Whether something follows the line breaks after a marker."""
        if self._lead:
            self._skip(len(self._buffer) - len(self._buffer.lstrip("\n")))
            self._lead = not self._buffer
        return bool(self._buffer)

    def _markers(self) -> tuple[str, ...]:
        found = self._format.markers if self._format is not None else ()
        return (*found, self._thought[0]) if self._thought is not None else found

    def _in_text(self) -> bool:
        if not self._drop_lead():
            return False
        if self._fresh and self._format is not None and self._format.leading:
            spaces = len(self._buffer) - len(self._buffer.lstrip())
            if spaces == len(self._buffer):
                return False
            if self._buffer[spaces] == "{":
                return self._begin_call(spaces, None)
        at, marker = first_marker(self._buffer, self._markers())
        self._give(Kind.TEXT, at)
        if not marker:
            return False
        if self._thought is not None and marker == self._thought[0]:
            start = self.decided
            self._skip(len(marker))
            return self._begin_thought(start)
        self._state = self._in_head
        return True

    def _begin_thought(self, start: int) -> bool:
        self.spans.append([start])
        self._lead, self._state = True, self._in_thought
        return True

    def _in_thought(self) -> bool:
        assert self._thought is not None
        if not self._drop_lead():
            return False
        at, marker = first_marker(self._buffer, (self._thought[1],))
        self._give(Kind.THOUGHT, len(self._buffer[:at].rstrip("\n")))
        if not marker:
            return False
        self._skip(self._buffer.index(marker) + len(marker))
        self.spans[-1].append(self.decided)
        self._lead, self._state = True, self._in_text
        return True

    def _in_head(self) -> bool:
        """Between a marker and the JSON of its call."""
        assert self._format is not None
        at = self._buffer.find("{", 0, MAX_HEAD)
        if at < 0:
            return self._no_call() if len(self._buffer) >= MAX_HEAD else False
        found = re.fullmatch(self._format.head, self._buffer[:at])
        if found is None:
            return self._no_call()
        names = [v for k, v in found.groupdict().items() if v]
        return self._begin_call(at, names[0].strip() if names else None)

    def _no_call(self) -> bool:
        """The marker was just text."""
        self._give(Kind.TEXT, 1)
        self._state = self._in_text
        return True

    def _begin_call(self, head: int, name: str | None) -> bool:
        self._call, self._raw, self._scan, self._announced = _Call(name), "", head, False
        self._state = self._in_call
        return True

    def _in_call(self) -> bool:
        while self._scan < len(self._buffer):
            c = self._buffer[self._scan]
            if not self._call.push(c):
                return self._malformed()
            self._scan += 1
            if self._call.arguments_now and not self._announced:
                self._raw = self._buffer[: self._scan]
                self._scan -= 1
                self._skip(self._scan)
                self._scan = 0
                self._announce()
                self._give(Kind.ARGUMENTS, 1)
            elif self._announced:
                self._raw += c
                self._scan -= 1
                if self._call.arguments_now:
                    self._give(Kind.ARGUMENTS, 1)
                else:
                    self._skip(1)
            if self._call.done:
                return self._complete()
        return False

    def _announce(self) -> None:
        self._begun += 1
        self._announced = True
        assert self._call.name is not None
        # Decided by the character that begins the arguments, not before it.
        self.events.append(Event(Kind.CALL, self.decided + 1, self._call.name, self._begun - 1, whole=True))

    def _complete(self) -> bool:
        found = self._call.arguments()
        if found is None or self._call.name is None:
            return self._malformed()
        if not self._announced:
            self._skip(self._scan)
            self._begun += 1
            self._tell(Kind.CALL, self._call.name)
            self._tell(Kind.ARGUMENTS, found[0])
        self._scan = 0
        self._tell(Kind.DONE, value=found[1])
        self.calls += 1
        self._fresh = self._again = False
        self._state = self._after_call
        return True

    def _malformed(self) -> bool:
        if self._announced:
            self._tell(Kind.DROPPED)
            self._tell(Kind.TEXT, self._raw)
        else:
            self._give(Kind.TEXT, self._scan)
        self._scan, self._fresh, self._state = 0, False, self._in_text
        return True

    def _after_call(self) -> bool:
        assert self._format is not None
        self._skip(len(self._buffer) - len(self._buffer.lstrip()))
        if not self._buffer:
            return False
        for glue in self._format.glue:
            if self._buffer.startswith(glue):
                self._skip(len(glue))
                self._again = glue in self._format.again
                return True
        if self._again and self._buffer[0] == "{":
            return self._begin_call(0, None)
        known = (*self._format.glue, *self._format.markers)
        if any(len(k) > len(self._buffer) and k.startswith(self._buffer) for k in known):
            return False
        self._state = self._in_text
        return True


def first_marker(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """Where the first marker begins, and which; without one, where the longest half of one begins at the end."""
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    if found:
        return min(found)
    starts = [
        len(text) - n
        for marker in markers
        for n in range(min(len(marker) - 1, len(text)), 0, -1)
        if text.endswith(marker[:n])
    ]
    return min(starts, default=len(text)), ""
