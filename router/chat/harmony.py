"""The messages on channels that gpt-oss writes, to thought, speech and tool calls."""

from __future__ import annotations

import re

from router.chat.parser import MAX_HEAD, Kind, Parser, ToolFormat, first_marker


class HarmonyParser(Parser):
    """gpt-oss: messages on channels. `thinking` where the prompt ends within the analysis channel."""

    _ENDS = ("<|end|>", "<|return|>", "<|call|>")
    _BODY = (*_ENDS, "<|start|>", "<|channel|>")
    MARKERS = (*_BODY, "<|message|>", "<|constrain|>")

    def __init__(self, thinking: bool = False) -> None:
        super().__init__()
        self._kind = Kind.TEXT
        self._format = ToolFormat((), "", self._ENDS)
        self._state = self._in_header
        if thinking:
            self.spans.append([0])
            self._kind, self._state = Kind.THOUGHT, self._in_body

    def finish(self) -> None:
        if self._state == self._in_header:
            self._kind, self._state = Kind.TEXT, self._in_body
        if self._state == self._in_body:
            self._give(self._kind, len(self._buffer))
        super().finish()

    def _in_header(self) -> bool:
        buffer = self._buffer
        begins = ("<|start|>", "<|channel|>", "<|message|>", "assistant", " to=", *self._ENDS)
        if not any(buffer.startswith(b) or b.startswith(buffer) for b in begins):
            self._kind, self._state = Kind.TEXT, self._in_body
            return True
        for end in self._ENDS:
            if buffer.startswith(end):
                self._skip(len(end))
                return bool(self._buffer)
        at = buffer.find("<|message|>", 0, MAX_HEAD)
        if at < 0:
            if len(buffer) < MAX_HEAD:
                return False
            self._give(Kind.TEXT, MAX_HEAD)
            self._kind, self._state = Kind.TEXT, self._in_body
            return True
        head, after = buffer[:at], at + len("<|message|>")
        channel = re.search(r"<\|channel\|>\s*(\w+)", head)
        to = re.search(r"\bto=functions\.([\w.-]+)", head)
        if to is not None:
            return self._to_tool(after, to.group(1))
        self._kind = Kind.THOUGHT if channel is not None and channel.group(1) == "analysis" else Kind.TEXT
        if self._kind is Kind.THOUGHT:
            self.spans.append([self.decided])
        self._skip(after)
        self._state = self._in_body
        return True

    def _to_tool(self, head: int, name: str) -> bool:
        rest = self._buffer[head:].lstrip()
        if not rest and len(self._buffer) < MAX_HEAD * 2:
            return False
        if rest.startswith("{"):
            return self._begin_call(len(self._buffer) - len(rest), name)
        self._give(Kind.TEXT, head)
        self._kind, self._state = Kind.TEXT, self._in_body
        return True

    def _in_text(self) -> bool:
        """After something that was no call."""
        self._kind, self._state = Kind.TEXT, self._in_body
        return True

    def _in_body(self) -> bool:
        at, marker = first_marker(self._buffer, self._BODY)
        self._give(self._kind, at)
        if not marker:
            return False
        if marker in self._ENDS:
            self._skip(len(marker))
        if self._kind is Kind.THOUGHT:
            self.spans[-1].append(self.decided)
        self._state = self._in_header
        return bool(self._buffer)

    def _after_call(self) -> bool:
        self._skip(len(self._buffer) - len(self._buffer.lstrip()))
        self._state = self._in_header
        return bool(self._buffer)
