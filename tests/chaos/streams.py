"""Steady streams with features of every kind, and what each of them must answer, whatever happens meanwhile."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from understudy.client import Client, Stream
from understudy.errors import UnderstudyError
from understudy.types import Completion, Retry

PATIENCE_S = 300.0
RETRY = Retry(resume_attempts=1000, resume_s=PATIENCE_S, attempts=1000)
_TOOL = {
    "name": "weather",
    "description": "The weather at a place.",
    "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}
_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
    "required": ["name", "age"],
}


@dataclass(frozen=True)
class Part:
    """One request that is made again and again."""

    name: str
    what: Any
    options: dict[str, Any]
    chat: bool = False

    def open(self, client: Client) -> Stream:
        return (client.chat if self.chat else client.generate)(self.what, **self.options)


def parts(plain: str, others: list[str], demo: str) -> list[Part]:
    """Features of every kind at the model `plain`; some of them at each of `others`; chat and formats at `demo`."""
    usual = {"max_tokens": 300, "ignore_eos": True, "temperature": 1.0}
    prompt = [1, 2, 3]
    made = [
        Part("greedy", prompt, usual | {"temperature": 0.0}),
        Part("seeded", prompt, usual | {"seed": 1, "top_p": 0.9}),
        Part("several", prompt, usual | {"seed": 2, "n": 3, "max_tokens": 150}),
        Part("logprobs", prompt, usual | {"seed": 3, "logprobs": 3}),
        Part("penalties", prompt, usual | {"seed": 4, "repetition_penalty": 1.2, "presence_penalty": 0.5}),
        Part("traced", prompt, usual | {"seed": 5, "trace": True, "trace_candidates": 3, "max_tokens": 120}),
        Part("echoed", prompt, usual | {"seed": 6, "echo": True, "prompt_logprobs": 1}),
        Part("long prompt", [1 + i % 50 for i in range(150)], usual | {"seed": 7}),
        Part("minimum", prompt, usual | {"seed": 8, "ignore_eos": False, "min_tokens": 200, "stop_token_ids": [5]}),
    ]
    made = [Part(p.name, p.what, {**p.options, "model": plain}) for p in made]
    for model in others:
        made.append(Part(f"{model}, greedy", prompt, usual | {"temperature": 0.0, "model": model, "max_tokens": 200}))
        made.append(
            Part(f"{model}, seeded", prompt, usual | {"seed": 9, "logprobs": 1, "model": model, "max_tokens": 200})
        )
    if demo:
        often = {"model": demo, "seed": 10, "temperature": 1.0}
        made += [
            Part("schema", "A person: ", often | {"json_schema": _SCHEMA, "max_tokens": 80}),
            Part("regex", "Numbers: ", often | {"regex": r"(\d{1,4}, ){40}end", "max_tokens": 300}),
            Part("chat", "Tell me of the sea.", often | {"max_tokens": 150, "effort": "low"}, chat=True),
            Part(
                "tools",
                "How is the weather?",
                often | {"tools": [_TOOL], "tool_choice": "required", "max_tokens": 120},
                chat=True,
            ),
        ]
    return made


@dataclass(frozen=True)
class Answer:
    """All of an answer that must be the same whenever it is given."""

    choices: tuple[Any, ...]
    prompt: tuple[int, ...]
    prompt_logprobs: tuple[Any, ...]

    @classmethod
    def of(cls, done: Completion) -> Answer:
        choices = tuple(
            (c.index, c.text, c.token_ids, c.logprobs, c.finish.reason, c.finish.matched, c.finish.usage,
             tuple((t.token_id, t.candidates, t.experts) for t in c.traces))
            for c in done.choices
        )  # fmt: skip
        return cls(choices, done.prompt.prompt_token_ids, done.prompt.prompt_logprobs)


@dataclass
class Gap:
    """Between two pieces of a stream, or its beginning and the first: moments of `time.monotonic`. `thread`: whose."""

    thread: int
    begun: float
    ended: float


@dataclass
class Tally:
    """What came of the streams. `gaps` are those of `NOTED_S` and more."""

    finished: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)


NOTED_S = 0.1


class Cast:
    """`size` threads, each of which streams one part after the other until `stop`, and compares. `tally` may be read
    at any time."""

    def __init__(self, client: Callable[[], Client], made: list[Part], size: int, seed: int) -> None:
        self._client, self._parts = client, made
        self.expected: dict[str, Answer] = {}
        self.tally = Tally()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i, seed), daemon=True) for i in range(size)]

    def learn(self) -> None:
        """Each part's answer, undisturbed, twice: a difference is a fault of its own. Raises AssertionError."""
        with self._client() as client:
            for part in self._parts:
                first, second = (self._play(part, client) for _ in range(2))
                assert first == second, f"{part.name} has two answers while nothing happens"
                self.expected[part.name] = first

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Lets every stream end."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a stream does not end"

    def _run(self, number: int, seed: int) -> None:
        order = list(self._parts)
        random.Random(seed * 1000 + number).shuffle(order)
        with self._client() as client:
            for part in itertools.cycle(order):
                if self._stopping.is_set():
                    return
                self._once(part, client, number)

    def _once(self, part: Part, client: Client, number: int) -> None:
        gaps: list[Gap] = []
        try:
            answer = self._play(part, client, gaps, number)
        except UnderstudyError as error:
            with self._lock:
                self.tally.lost.append(f"{part.name}: {error.kind}: {error}")
            return
        with self._lock:
            self.tally.finished += 1
            self.tally.tokens += sum(len(choice[2]) for choice in answer.choices)
            self.tally.gaps += gaps
            if answer != self.expected[part.name]:
                self.tally.wrong.append(f"{part.name}: {_difference(answer, self.expected[part.name])}")

    @staticmethod
    def _play(part: Part, client: Client, gaps: list[Gap] | None = None, number: int = 0) -> Answer:
        last = time.monotonic()
        with part.open(client) as stream:
            for _ in stream:
                now = time.monotonic()
                if gaps is not None and now - last >= NOTED_S:
                    gaps.append(Gap(number, last, now))
                last = now
            return Answer.of(stream.completion())


def _difference(one: Answer, other: Answer) -> str:
    for a, b in zip(one.choices, other.choices, strict=False):
        for name, x, y in zip(
            ("index", "text", "tokens", "logprobs", "reason", "matched", "usage", "traces"), a, b, strict=True
        ):
            if x != y:
                return f"{name} {str(x)[:200]} instead of {str(y)[:200]}"
    return "prompts differ"
