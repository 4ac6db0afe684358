"""Messages of Generate become messages of Chat: the same tokens, their text told apart.

A delta keeps carrying exactly the ids whose text it completes: what the parser holds back holds its ids back too. A
stream that goes on has its received ids parsed again, and tells only what lies behind them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.struct_pb2 import Struct

from router.chat.parser import Event, Kind, Parser
from router.detokenizer import Decoder
from understudy.v1 import inference_pb2 as pb

_LETTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ENDED = (pb.FINISH_REASON_EOS, pb.FINISH_REASON_STOP_TOKEN)


@dataclass(slots=True)
class _Token:
    """One that was not passed on; `end` is where its text ends in the answer."""

    id: int
    end: int
    logprob: pb.Logprob | None
    delta: pb.Delta
    place: int  # in its delta


def call_id(info: pb.PromptInfo, index: int, position: int) -> str:
    """Nine letters and digits, as Mistral's templates demand; equal requests have equal ids, and those of two turns
    differ."""
    key = f"{info.seed},{index},{position},{','.join(map(str, info.prompt_token_ids))}"
    number = int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")
    return "".join(_LETTERS[number // 62**i % 62] for i in range(9))


class ChatAnswer:
    """Of one request. `parser` and `decoder` make those of a sequence; `received` are the ids that the client has."""

    def __init__(
        self,
        parser: Callable[[], Parser],
        decoder: Callable[[Sequence[int]], Decoder],
        received: dict[int, Sequence[int]],
        *,
        hidden: bool = False,
        want_token_ids: bool = True,
    ) -> None:
        self._parser = parser
        self._decoder = decoder
        self._received = received
        self._hidden = hidden
        self._want_token_ids = want_token_ids
        self._info = pb.PromptInfo()
        self._sequences: dict[int, _Sequence] = {}

    def convert(self, message: pb.GenerateResponse) -> list[pb.ChatResponse]:
        """What the client is sent for a message."""
        which = message.WhichOneof("event")
        if which == "prompt_info":
            self._info = message.prompt_info
            return [pb.ChatResponse(prompt_info=message.prompt_info)]
        if which == "delta":
            sequence = self._sequence(message.delta.index)
            return self._messages(sequence.add(message.delta))
        sequence = self._sequence(message.finish.index)
        messages = self._messages(sequence.finish())
        finish = pb.Finish()
        finish.CopyFrom(message.finish)
        finish.usage.reasoning_tokens = sequence.reasoning_tokens(finish.usage.completion_tokens)
        if finish.reason in _ENDED and sequence.parser.calls:
            finish.reason = pb.FINISH_REASON_TOOL_CALLS
        return [*messages, pb.ChatResponse(finish=finish)]

    def _sequence(self, index: int) -> _Sequence:
        if index not in self._sequences:
            decoder = self._decoder(self._info.prompt_token_ids)
            received = self._received.get(index, ())
            self._sequences[index] = _Sequence(index, self._parser(), decoder, received)
        return self._sequences[index]

    def _messages(self, part: _Part | None) -> list[pb.ChatResponse]:
        if part is None:
            return []
        delta = pb.ChatDelta(index=part.index, position=part.position)
        for event in part.events:
            self._tell(delta, event)
        if self._want_token_ids:
            delta.token_ids.extend(t.id for t in part.tokens)
        delta.logprobs.extend(t.logprob for t in part.tokens if t.logprob is not None)
        for token in part.tokens:
            if token.delta.HasField("trace"):
                delta.trace.server_us, delta.trace.step = token.delta.trace.server_us, token.delta.trace.step
                if token.place < len(token.delta.trace.tokens):
                    delta.trace.tokens.append(token.delta.trace.tokens[token.place])
        return [pb.ChatResponse(delta=delta)]

    def _tell(self, delta: pb.ChatDelta, event: Event) -> None:
        if event.kind is Kind.TEXT:
            delta.text += event.text
        elif event.kind is Kind.THOUGHT:
            delta.reasoning += "" if self._hidden else event.text
        else:
            last = delta.tool_calls[-1] if delta.tool_calls else None
            if last is None or last.position != event.call:
                last = delta.tool_calls.add(position=event.call)
            if event.kind is Kind.CALL:
                last.id, last.name = call_id(self._info, delta.index, event.call), event.text
            elif event.kind is Kind.ARGUMENTS:
                last.arguments += event.text
            elif event.kind is Kind.DROPPED:
                last.dropped = True
            else:
                arguments = Struct()
                arguments.update(event.value or {})
                name = self._sequences[delta.index].names[event.call]
                call = pb.ToolCall(id=call_id(self._info, delta.index, event.call), name=name, arguments=arguments)
                last.call.CopyFrom(call)


@dataclass(slots=True)
class _Part:
    index: int
    position: int
    events: list[Event]
    tokens: list[_Token]


class _Sequence:
    """One sequence: its parser, and the tokens whose text is not decided."""

    def __init__(self, index: int, parser: Parser, decoder: Decoder, received: Sequence[int]) -> None:
        self.index = index
        self.parser = parser
        self.names: dict[int, str] = {}
        self._decoder = decoder
        self._tokens: list[_Token] = []
        self._passed = len(received)
        self._starts: list[int] = []  # of every token, where its text begins
        self._fed = 0
        text = ""
        for id in received:
            self._starts.append(len(text))
            text += decoder.push(id)
        text += "" if decoder.clean else decoder.flush()
        self._fed = self._sent = len(text)
        self.parser.feed(text)

    def add(self, delta: pb.Delta) -> _Part | None:
        """What may be passed on now."""
        at, end = self._fed, self._fed + len(delta.text)
        count = len(delta.token_ids)
        for i, id in enumerate(delta.token_ids):
            self._starts.append(min(at, end))
            at += len(self._decoder.push(id))
            logprob = delta.logprobs[i] if i < len(delta.logprobs) else None
            token_end = end if i == count - 1 else min(at, end)
            self._tokens.append(_Token(id, token_end, logprob, delta, i))
        self._fed = end
        self.parser.feed(delta.text)
        ready = [t for t in self._tokens if t.end <= self.parser.decided]
        if not ready:
            return None
        self._tokens = self._tokens[len(ready) :]
        return self._part(self._events(ready[-1].end), ready)

    def finish(self) -> _Part | None:
        """Everything that is left."""
        self.parser.finish()
        tokens, self._tokens = self._tokens, []
        events = self._events(self._fed)
        return self._part(events, tokens) if events or tokens else None

    def _part(self, events: list[Event], tokens: list[_Token]) -> _Part:
        position, self._passed = self._passed, self._passed + len(tokens)
        return _Part(self.index, position, events, tokens)

    def _events(self, upto: int) -> list[Event]:
        """Those that the first `upto` characters complete, less what was told before."""
        out: list[Event] = []
        waiting = self.parser.events
        while waiting:
            event = waiting[0]
            if event.kind is Kind.CALL:
                self.names[event.call] = event.text
            if event.whole or event.end <= upto:
                if event.whole and event.end > upto:
                    break
                waiting.pop(0)
                new = event if event.whole else _between(event, self._sent, event.end)
                if event.end > self._sent and (event.whole or new.text):
                    out.append(new)
                continue
            begin = event.end - len(event.text)
            if begin < upto:
                part = _between(event, self._sent, upto)
                if part.text:
                    out.append(part)
                waiting[0] = _between(event, upto, event.end)
            break
        self._sent = max(self._sent, upto)
        return out

    def reasoning_tokens(self, upto: int) -> int:
        """Of the first `upto` tokens, those that begin within a thought."""
        spans = [(s[0], s[1] if len(s) > 1 else self._fed + 1) for s in self.parser.spans]
        return sum(any(a <= start < b for a, b in spans) for start in self._starts[:upto])


def _between(event: Event, low: int, high: int) -> Event:
    """The part of a slice that lies in the characters [low, high)."""
    begin = event.end - len(event.text)
    text = event.text[max(low - begin, 0) : max(high - begin, 0)]
    return Event(event.kind, min(event.end, high), text, event.call)
