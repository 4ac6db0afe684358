"""Requests that ask for anything at random, a format of token lists, and a proposer that is right by half."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence

from workers.engine import Grammar, Interjection, Probe, Request, Sampling
from workers.engine.drafts import Ask
from workers.engine.formats import Bits, Matcher


class ListMatcher:
    """The answer is one of `words`."""

    def __init__(self, words: list[list[int]]) -> None:
        self._words = words
        self._said: list[int] = []

    def _next(self) -> set[int]:
        at = len(self._said)
        return {w[at] for w in self._words if len(w) > at and w[:at] == self._said}

    def mask_into(self, row: Bits) -> bool:
        row[:] = 0
        for token in self._next():
            row[token // 32] |= 1 << (token % 32)
        return self._said in self._words

    def accept(self, token: int) -> None:
        if token not in self._next():
            raise ValueError(f"{token} does not follow {self._said}")
        self._said.append(token)

    def rollback(self, count: int) -> None:
        assert 0 < count <= len(self._said)
        del self._said[-count:]

    @property
    def finished(self) -> bool:
        return not self._next()

    @property
    def error(self) -> str:
        return ""


class ListFormats:
    """Opens grammars of kind `list`: a JSON list of lists of token ids."""

    def open(self, grammar: Grammar) -> Matcher:
        if grammar.kind != "list":
            raise ValueError(f"{grammar.kind} cannot be held here")
        return ListMatcher(json.loads(grammar.text))


def list_grammar(*words: list[int]) -> Grammar:
    return Grammar("list", json.dumps(words))


class Guesser:
    """Knows the answers, and says them with mistakes: which, is a function of the tokens so far."""

    def __init__(self, answers: dict[str, list[int]], prompts: dict[str, int], vocab: int) -> None:
        self._answers, self._prompts, self._vocab = answers, prompts, vocab
        self.asked = 0
        self.forgotten: list[str] = []
        self.closed = 0

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        self.asked += len(asks)
        return [self._guess(a) for a in asks]

    def _guess(self, ask: Ask) -> list[int]:
        made = len(ask.tokens) - self._prompts[ask.id]
        guess = self._answers[ask.id][made : made + ask.at_most]
        dice = random.Random(hashlib.sha256(repr((ask.id, made)).encode()).digest())
        return [token if dice.random() < 0.7 else dice.randrange(self._vocab) for token in guess]

    def forget(self, id: str) -> None:
        self.forgotten.append(id)

    def close(self) -> None:
        self.closed += 1


def random_request(dice: random.Random, id: str, vocab: int, most: int = 24) -> Request:
    """A request that combines features at random; about one in four is plain."""
    plain = dice.random() < 0.25

    def maybe(share: float) -> bool:
        return not plain and dice.random() < share

    prompt = [(dice.randrange(3) * 7 + p) % vocab for p in range(dice.randint(1, 70))]
    max_tokens = dice.randint(1, most)

    def ids(count: int) -> list[int]:
        return [dice.randrange(vocab) for _ in range(count)]

    sampling = Sampling(
        temperature=dice.choice([0.0, 0.0, 0.7, 1.0, 1.6]),
        top_k=dice.choice([0, 0, 5]),
        top_p=dice.choice([1.0, 1.0, 0.8]),
        min_p=dice.choice([0.0, 0.0, 0.05]),
        seed=dice.randrange(1000),
        repetition_penalty=dice.choice([0.8, 1.4]) if maybe(0.3) else 1.0,
        presence_penalty=dice.uniform(-2, 2) if maybe(0.3) else 0.0,
        frequency_penalty=dice.uniform(-2, 2) if maybe(0.3) else 0.0,
        logit_bias=[(t, dice.uniform(-9, 9)) for t in ids(3)] if maybe(0.3) else [],
        bad_words=[ids(dice.randint(1, 3)) for _ in range(4)] if maybe(0.3) else [],
    )
    words = [ids(dice.randint(1, max_tokens + 2)) for _ in range(3)]
    return Request(
        id,
        prompt,
        max_tokens,
        sampling,
        index=dice.randrange(3),
        min_tokens=dice.randint(0, max_tokens) if maybe(0.3) else 0,
        eos_ids=[3],
        stop_ids=[5] if maybe(0.2) else [],
        logprobs=dice.choice([0, 2]),
        priority=dice.randint(-1, 1),
        bypass_prefix_cache=maybe(0.2),
        prompt_logprobs=dice.choice([0, 2]) if maybe(0.25) else None,
        grammar=list_grammar(*words, [*words[0], 3, 4]) if maybe(0.2) else None,
        interjection=Interjection(dice.randint(0, 6), ids(3)) if maybe(0.2) else None,
        probe=Probe(candidates=3) if maybe(0.2) else None,
    )
