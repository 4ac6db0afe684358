"""An engine without a model: the same contract, tokens from a hash. For tests of whatever talks to an engine, and to
measure the service around it.

The token at position i of an answer depends on the prompt, the seed, the sequence index and i alone, so that an
answer that goes on in another fake goes on identically. Of what a request may ask for it keeps ends, minimum, bad
words and interjections; penalties, biases and formats are ignored, and probabilities are made up.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.cache.events import Journal, Tier
from workers.cache.keys import block_keys, root_key
from workers.engine.contract import (
    Candidate,
    EngineInfo,
    EngineStats,
    FinishReason,
    LayerAttention,
    LayerExperts,
    Request,
    SequenceOutput,
    TokenLogprob,
    TokenTrace,
)
from workers.engine.sequence import begun_words, finish_of, forced_id
from workers.engine.turns import Turns

BLOCK_TOKENS = 16
_MASK = (1 << 64) - 1


@dataclass(slots=True)
class _Waiting:
    request: Request
    rank: tuple[int, int]

    @property
    def arrival(self) -> int:
        return self.rank[1]

    @property
    def tokens(self) -> Sequence[int]:
        return self.request.prompt


@dataclass(slots=True)
class _Running:
    """A sequence and how far it is. `left` is how many prompt tokens still have to be 'computed'."""

    request: Request
    key: int
    left: int
    made: int
    cached: int
    blocks: list[bytes]
    tokens: list[int]
    reported: bool = False
    began: float = 0.0  # moment of the first step that computed its prompt


def fake_token(key: int, position: int, vocab_size: int) -> int:
    """The token at `position` of the answer of key `key`: splitmix64 of both, modulo the vocabulary."""
    z = (key + 0x9E3779B97F4A7C15 * (position + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) % vocab_size


class FakeEngine:
    """Keeps the contract of `Engine`.

    `step_s` is how long a step takes: seconds, or a function of its rows; it is spent in `sleep`. `answer` gives the
    tokens of a request's answer from its start (`generated` included); after them comes the first EOS id, or, without
    one, hashed tokens. More than `max_running` sequences wait. `fatal` is asked about every request and how many tokens
    of its answer there are, before one is made: true ends the engine, with everybody's tokens of that step.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 512,
        max_context: int = 2048,
        max_running: int = 64,
        chunk_tokens: int = 512,
        blocks: int = 4096,
        step_s: float | Callable[[int], float] = 0.0,
        sleep: Callable[[float], None] = time.sleep,
        answer: Callable[[Request], Sequence[int]] | None = None,
        model: str = "fake",
        fingerprint: str = "fake",
        numerics_id: str = "fake",
        fatal: Callable[[Request, int], bool] | None = None,
    ) -> None:
        self._info = EngineInfo(
            model=model,
            model_fingerprint=fingerprint,
            numerics_id=numerics_id,
            architecture="Fake",
            dtype="float32",
            max_context=max_context,
            vocab_size=vocab_size,
            block_tokens=BLOCK_TOKENS,
            blocks=blocks,
            cache_bytes=0,
            max_running=max_running,
            chunk_tokens=chunk_tokens,
        )
        self._step_s = step_s if callable(step_s) else lambda _rows, seconds=step_s: seconds
        self._sleep = sleep
        self._answer = answer
        self._fatal = fatal
        self._waiting: dict[str, _Waiting] = {}
        self._arrivals = 0
        self._turns = Turns()
        self._running: dict[str, _Running] = {}
        self._ended: list[SequenceOutput] = []  # cancelled or refused, told by the next step
        self._families: dict[tuple[str, str], int] = {}  # what the first member found cached; while work is there
        self._cached: dict[bytes, None] = {}  # block keys, oldest first
        self._journal = Journal()
        self._stats = EngineStats()
        self._failures: list[Exception] = []
        self._poison: dict[str, str] = {}
        self.closed = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def journal(self) -> Journal:
        return self._journal

    # Failures on demand.

    def fail_next_step(self, error: Exception) -> None:
        """The next step raises `error`, as an engine with a fault of its own does."""
        self._failures.append(error)

    def fail_sequence(self, id: str, reason: str) -> None:
        """The next step that runs this sequence ends it with ERROR, as a failed forward does. Ids inside a loop
        carry their session's number: any id that equals `id` or ends with `:id` is meant."""
        self._poison[id] = reason

    # The contract.

    def add(self, request: Request) -> None:
        limit = self._info.max_context
        if len(request.prompt) + request.max_tokens > limit:
            reason = f"{len(request.prompt)} prompt tokens and {request.max_tokens} more exceed the context of {limit}"
            self._ended.append(SequenceOutput(request.id, [], finish=FinishReason.ERROR, error=reason))
            return
        self._arrivals += 1
        self._waiting[request.id] = _Waiting(request, (-request.priority, self._arrivals))

    def cancel(self, id: str) -> None:
        known = self._waiting.pop(id, None) or self._running.pop(id, None)
        if known is not None:
            self._ended.append(SequenceOutput(id, [], finish=FinishReason.CANCELLED))

    def has_work(self) -> bool:
        return bool(self._waiting or self._running or self._ended)

    def step(self) -> list[SequenceOutput]:
        if self._failures:
            raise self._failures.pop(0)
        outputs, self._ended = self._ended, []
        self._admit()
        began = time.perf_counter()
        rows, ready = self._schedule(began)
        if rows:
            self._stats.steps += 1
            seconds = self._step_s(rows)
            if seconds > 0:
                self._sleep(seconds)
        for sequence in ready:
            if self._fatal is not None and self._fatal(sequence.request, sequence.made):
                raise RuntimeError("the engine died of a request, on demand")
        outputs += [self._advance(sequence) for sequence in ready]
        return outputs

    def stats(self) -> EngineStats:
        s = self._stats
        s.running, s.waiting = len(self._running), len(self._waiting)
        left = [(w.request.priority, len(w.tokens)) for w in self._waiting.values()]
        left += [(r.request.priority, r.left) for r in self._running.values() if not r.reported]
        s.waiting_prefill_tokens = sum(n for _, n in left)
        s.waiting_prefill_normal = sum(n for priority, n in left if priority >= 0)
        s.waiting_prefill_urgent = sum(n for priority, n in left if priority > 0)
        s.blocks_in_use = sum(len(r.request.prompt) + r.made for r in self._running.values()) // BLOCK_TOKENS
        s.blocks_cached = len(self._cached)
        return s

    def check_idle(self) -> None:
        if self._running or self._waiting or self._ended:
            held = [*self._waiting, *self._running, *(o.id for o in self._ended)]
            raise RuntimeError(f"not idle: {held}")

    def close(self) -> None:
        self.closed = True

    # One step.

    def _admit(self) -> None:
        if not self._running:
            self._families.clear()
        waiting = sorted(self._waiting.values(), key=lambda w: w.rank)
        while waiting and len(self._running) < self._info.max_running:
            chosen = next(iter(self._turns.order(waiting)))
            waiting.remove(chosen)
            self._turns.admitted(chosen, waiting)
            self._running[chosen.request.id] = self._start(self._waiting.pop(chosen.request.id).request)

    def _start(self, request: Request) -> _Running:
        s = request.sampling
        digest = hashlib.blake2b(repr((request.prompt, s.seed, request.index)).encode(), digest_size=8).digest()
        keys, cached = self._blocks(request), 0
        if not request.bypass_prefix_cache and request.prompt_logprobs is None:
            for key in keys:
                if key not in self._cached:
                    break
                cached += BLOCK_TOKENS
            self._stats.queried_tokens += len(request.prompt)
            self._stats.hit_tokens += cached
        if request.family and request.prompt_logprobs is None:
            cached = self._families.setdefault((request.family, request.cache_salt), cached)
        left = len(request.prompt) + len(request.generated) - cached
        return _Running(
            request,
            int.from_bytes(digest, "little"),
            left,
            len(request.generated),
            cached,
            keys,
            [*request.prompt, *request.generated],
        )

    def _blocks(self, request: Request) -> list[bytes]:
        """Keys of the full blocks of a prompt, each over its parent; the last token is always left to compute."""
        info = self._info
        root = root_key(info.model_fingerprint, info.dtype, info.numerics_id, request.cache_salt)
        return block_keys(root, request.prompt[:-1], BLOCK_TOKENS)

    def _schedule(self, now: float) -> tuple[int, list[_Running]]:
        """Rows of this step, and who gets a token from it: decoding first, then prefills share the rest."""
        decoding = [r for r in self._running.values() if r.left == 0]
        ready, rows = list(decoding), len(decoding)
        budget = self._info.chunk_tokens
        for sequence in self._running.values():
            if sequence.left and budget > 0:
                sequence.began = sequence.began or now
                take = min(sequence.left, budget)
                budget, rows, sequence.left = budget - take, rows + take, sequence.left - take
                self._stats.computed_prompt_tokens += take
                if sequence.left == 0:
                    ready.append(sequence)
        return rows, ready

    def _advance(self, sequence: _Running) -> SequenceOutput:
        request, output = sequence.request, SequenceOutput(sequence.request.id, [])
        if not sequence.reported:
            sequence.reported, output.cached_tokens = True, sequence.cached
            if request.traceparent and sequence.began:
                output.computing_us = max(1, int((time.perf_counter() - sequence.began) * 1e6))
            if request.prompt_logprobs is not None:
                output.prompt_logprobs = [self._logprob(t, request.prompt_logprobs) for t in request.prompt[1:]]
            for key in sequence.blocks:
                self._cached[key] = None
                self._journal.record(Tier.DEVICE, True, key)
            while len(self._cached) > self._info.blocks:
                del self._cached[oldest := next(iter(self._cached))]
                self._journal.record(Tier.DEVICE, False, oldest)
        reason = self._poisoned(request.id)
        if reason is not None:
            output.finish, output.error = FinishReason.ERROR, reason
        elif (over := finish_of(request, sequence.made, request.generated[-1:])) is not None:
            output.finish = over  # `generated` was the whole answer already
        else:
            token = self._next(sequence)
            sequence.made += 1
            sequence.tokens.append(token)
            self._stats.generated_tokens += 1
            output.token_ids = [token]
            if request.logprobs is not None:
                output.logprobs = [self._logprob(token, request.logprobs)]
            if request.probe is not None:
                output.traces = [self._trace(request, token, sequence.made)]
            output.finish = finish_of(request, sequence.made, [token])
        if output.finish is not None:
            del self._running[request.id]
        return output

    def _poisoned(self, id: str) -> str | None:
        for name in (id, id.partition(":")[2]):
            if name in self._poison:
                return self._poison.pop(name)
        return None

    def _next(self, sequence: _Running) -> int:
        request, position = sequence.request, sequence.made
        scripted = self._answer(request) if self._answer is not None else None
        if scripted is not None and position < len(scripted):
            return scripted[position]
        early = position < request.min_tokens
        if scripted is not None and request.eos_ids and not early:
            return request.eos_ids[0]
        place = (sequence.tokens, len(request.prompt), len(sequence.tokens))
        if request.interjection is not None and (forced := forced_id(request.interjection, *place)) is not None:
            return forced
        barred = {*request.eos_ids, *request.stop_ids} if early else set()
        barred.update(begun_words(request.sampling.bad_words, *place))
        token = fake_token(sequence.key, position, self._info.vocab_size)
        while token in barred:
            token = (token + 1) % self._info.vocab_size
        return token

    def _logprob(self, token: int, count: int) -> TokenLogprob:
        count = min(count, self._info.vocab_size)
        top = [((token + i) % self._info.vocab_size, -0.25 - i) for i in range(count)]
        return TokenLogprob(-0.25, 1, top)

    def _trace(self, request: Request, token: int, made: int) -> TokenTrace:
        """A trace with all that was asked for: halves and quarters, two experts in layer 1, attention to the ends."""
        probe, vocab = request.probe, self._info.vocab_size
        assert probe is not None
        candidates = [
            Candidate((token + i) % vocab, 0.5 ** (i + 1), 0.0 if i else 1.0) for i in range(probe.candidates)
        ]
        experts = [LayerExperts(1, [token % 4, 4 + token % 4], [0.75, 0.25])] if probe.experts else []
        length = len(request.prompt) + made - 1  # the row that made the token is the last that it attends to
        weights = [0.5] + [0.0] * (length - 2) + [0.5] if length > 1 else [1.0]
        return TokenTrace(candidates, experts, [LayerAttention(layer, 0, weights) for layer in probe.attention])
