"""The engine: one step said aloud in five statements. Everything else is what those statements need."""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, wait
from typing import Protocol

from workers.cache.events import Journal
from workers.cache.keys import prompt_root
from workers.cache.manager import CacheManager
from workers.cache.orders import StorePort
from workers.engine.contract import EngineInfo, EngineStats, FinishReason, Request, SequenceOutput, TokenTrace
from workers.engine.drafts import Proposer
from workers.engine.formats import Formats
from workers.engine.logits import Logits
from workers.engine.made import Made, settle
from workers.engine.openings import Openings
from workers.engine.plan import Chunk, StepPlan
from workers.engine.rows import (
    Masks,
    ask_of,
    drafts_of,
    looks_inside,
    needs_likeliest_only,
    row_of,
    samples,
    shaped_rows,
)
from workers.engine.sampler import Row, Sampler, SamplingOps
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence, finish_of
from workers.engine.ways import Ways, asks, not_opened
from workers.experts.dispatch import Dispatcher
from workers.experts.spread import Spread
from workers.parallel.errors import GroupBroken

log = logging.getLogger(__name__)


class StepRunner(Protocol):
    """What computes a plan's rows: `workers.engine.runner.Runner`, or a test's own."""

    @property
    def divided(self) -> bool:
        """Whether whole rows of logits cost more than the likeliest token of each."""

    def run(self, plan: StepPlan) -> Logits:
        """Logits [S, V], S >= 0, of any float type, of the last `wanted` rows of each chunk, in the plan's order."""

    def close(self) -> None: ...


class EngineCore:
    """Keeps the contract of `Engine` over a runner, a sampler and the block cache.

    `formats` opens grammars: without one, a request that has a grammar ends with ERROR. `proposer` guesses tokens, at
    most `draft_tokens` per sequence and step. Both are closed by whoever made them, but the proposer, with the engine.
    Prompts of more than `long_prompt` tokens are computed otherwise, and share no blocks with others. `store` is what
    lies behind the cache, closed with the engine; `patience` see `workers.engine.loads`. `journal` is what the cache
    tells of itself.
    """

    def __init__(
        self,
        runner: StepRunner,
        info: EngineInfo,
        cache: CacheManager,
        ops: SamplingOps,
        formats: Formats | None = None,
        proposer: Proposer | None = None,
        draft_tokens: int = 4,
        long_prompt: int | None = None,
        store: StorePort | None = None,
        patience: float | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._runner = runner
        self._info, self._long_prompt = info, long_prompt
        self._cache, self._journal = cache, journal if journal is not None else Journal()
        self._sampler = Sampler(ops)
        self._scheduler = Scheduler(cache, info.max_running, info.chunk_tokens, store, patience)
        self._loads = self._scheduler.loads
        self._sequences: dict[str, Sequence] = {}
        self._ended: list[SequenceOutput] = []  # over without a step: told by the next one
        self._arrivals = 0
        self._closed = False
        self._proposer = proposer
        self._draft_tokens = draft_tokens
        self.formats = formats
        self._timed: list[Sequence] = []  # spans of them are wanted, and they were in no step yet
        self._probed = 0  # sequences that ask what happens inside the layers
        self._openings = None if formats is None else Openings(formats, info.vocab_size)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def experts(self) -> Dispatcher | Spread | None:
        """Who knows where experts are, where those are not all here."""
        return getattr(self._runner, "experts", None)

    @property
    def journal(self) -> Journal:
        return self._journal

    def step(self) -> list[SequenceOutput]:
        openings = self._openings
        if openings:
            self._admit_opened(openings)
        if self._loads is not None:
            self._loads.poll()
        ended, self._ended = self._ended, []
        if len(self._sequences) == len(openings or ()) and not self._ordered:
            return ended
        plan = self._scheduler.schedule()
        if not plan.chunks:
            return ended + self._run_orders(plan)
        if self._proposer is not None:
            self._draft(plan, self._proposer)
        if self._probed:
            self._ask_layers(plan)
        if self._runner.divided:
            self._ask_whole(plan)
        planned = zip(plan.chunks, self._scheduler.planned, strict=True)
        masks = {} if openings is None else openings.masks(planned)
        began = time.perf_counter()
        if self._timed:
            self._note_first_steps(began)
        try:
            logits = self._runner.run(plan)
            choices = self._sampler.choose(*self._sampled(plan, logits, masks))
        except GroupBroken:  # nothing can be computed here any more
            raise
        except Exception as error:  # of the forward: only this step's sequences end
            wait(masks.values())
            return ended + self._fail(error)
        if self._loads is not None:
            self._loads.note(plan, time.perf_counter() - began)
        made = settle(self._scheduler, plan, choices)
        self._scheduler.advance(plan)
        return ended + [self._report(m) for m in made]

    def add(self, request: Request) -> None:
        long = self._long_prompt is not None and len(request.prompt) > self._long_prompt
        root = prompt_root(
            self._info.model_fingerprint,
            self._info.dtype,
            self._info.numerics_id,
            request.cache_salt,
            len(request.prompt),
            self._long_prompt or 0,
        )
        self._arrivals += 1
        reason = self._refusal(request)
        over = finish_of(request, len(request.generated), request.generated[-1:])
        if request.grammar is not None and over is FinishReason.LENGTH:
            over = None  # or its format may have ended it: known once it is opened
        if reason is not None:
            self._ended.append(SequenceOutput(request.id, [], finish=FinishReason.ERROR, error=reason))
        elif over is not None:  # a stream that broke after its last token
            self._ended.append(SequenceOutput(request.id, [], finish=over, cached_tokens=0))
        else:
            rank, tokens = (-request.priority, self._arrivals), [*request.prompt, *request.generated]
            sequence = Sequence(request, rank, root, self._cache.open(), tokens, long=long)
            if request.prompt_logprobs is not None:
                sequence.told = []
            if asks(request):
                sequence.ways = Ways(request, self._info.vocab_size)
            sequence.plain = sequence.told is None and sequence.ways is None
            self._sequences[request.id] = sequence
            self._probed += looks_inside(request)
            if request.traceparent:
                self._timed.append(sequence)
            if request.grammar is not None and self._openings is not None:
                self._openings.open(sequence, request.grammar)
            else:
                self._scheduler.add(sequence)

    def cancel(self, id: str) -> None:
        if id in self._sequences:
            self._ended.append(self._end(self._sequences[id], FinishReason.CANCELLED))

    def has_work(self) -> bool:
        return bool(self._sequences or self._ended or self._ordered)

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        if self._loads is not None:
            self._loads.fill(stats)
        return stats

    @property
    def _ordered(self) -> bool:
        """Whether ranks have something to do besides computing."""
        return self._loads is not None and self._loads.pending

    def _run_orders(self, plan: StepPlan) -> list[SequenceOutput]:
        """A step that computes nothing: everybody waits for a load, or nobody is there and blocks are to be saved."""
        try:
            if plan.orders:
                self._runner.run(plan)
        except GroupBroken:
            raise
        except Exception as error:
            return self._fail(error)
        if self._loads is not None:
            self._loads.wait()
        return []

    def check_idle(self) -> None:
        if self._sequences or self._ended:
            raise RuntimeError(f"not idle: {[*self._sequences, *(o.id for o in self._ended)]}")
        if self._loads is not None:
            self._loads.check_idle()
        self._cache.check_idle()

    def check(self) -> None:
        """Raises RuntimeError unless every block is accounted for. For tests: it looks at every block."""
        tables = [s.table for s in self._sequences.values()]
        self._cache.check([*tables, *self._scheduler.families.tables()])

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._openings is not None:
                self._openings.close()
            if self._proposer is not None:
                self._proposer.close()
            if self._loads is not None:
                self._loads.close()
            self._runner.close()

    def _refusal(self, request: Request) -> str | None:
        limit, asked = self._info.max_context, len(request.prompt) + request.max_tokens
        if asked > limit:
            return f"{len(request.prompt)} prompt tokens and {request.max_tokens} more exceed the context of {limit}"
        forced = request.interjection.ids if request.interjection is not None else ()
        if any(not 0 <= id < self._info.vocab_size for id in forced):
            return f"interjection: {list(forced)} has ids outside the vocabulary of {self._info.vocab_size}"
        if request.grammar is not None and self.formats is None:
            return "grammar: this engine was built without formats; send the request without one"
        return self._scheduler.refusal(len(request.prompt), request.max_tokens)

    def _admit_opened(self, openings: Openings) -> None:
        """Hands sequences to the scheduler whose format is open, and ends those whose format cannot be."""
        for sequence, error in openings.settle(patient=len(openings) == len(self._sequences)):
            self._scheduler.add(sequence)
            if error is not None:
                self._ended.append(self._end(sequence, FinishReason.ERROR, *not_opened(error)))
            elif sequence.matcher is not None and sequence.matcher.finished:
                self._ended.append(self._end(sequence, FinishReason.EOS))
            elif sequence.made >= sequence.request.max_tokens:
                self._ended.append(self._end(sequence, FinishReason.LENGTH))

    def _ask_whole(self, plan: StepPlan) -> None:
        """Says whose likeliest token is enough: the rest of the vocabulary then stays where it is."""
        for chunk, s in zip(plan.chunks, self._scheduler.planned, strict=True):
            chunk.whole = not (s.plain and needs_likeliest_only(s))

    def _ask_layers(self, plan: StepPlan) -> None:
        for chunk, s in zip(plan.chunks, self._scheduler.planned, strict=True):
            if looks_inside(s.request) and samples(chunk, s):
                chunk.probe = s.request.probe

    # Drafts.

    def _draft(self, plan: StepPlan, proposer: Proposer) -> None:
        places = self._scheduler.room_for_drafts(plan, self._draft_tokens)
        if not places:
            return
        try:
            drafts = proposer.propose([ask_of(s, n) for _, s, n in places])
        except Exception:  # guessing is a help that answers do not depend on
            log.exception("the proposer of drafts failed; going on without it")
            self._proposer = None
            proposer.close()
            return
        for (chunk, sequence, most), draft in zip(places, drafts, strict=True):
            known = [id for id in draft[:most] if 0 <= id < self._info.vocab_size]
            if known == draft[:most]:
                self._scheduler.add_drafts(chunk, sequence, known)

    # Rows and what becomes of them.

    def _sampled(self, plan: StepPlan, logits: Logits, masks: dict[str, Future[Masks]]) -> tuple[Logits, list[Row]]:
        """The rows of `logits` that become tokens. Takes down what the others say of the prompt."""
        rows: list[Row] = []
        lines: list[int] = []
        at = 0
        for chunk, s in zip(plan.chunks, self._scheduler.planned, strict=True):
            if not chunk.wanted:
                continue
            if s.plain and not chunk.drafts:
                rows.append(row_of(s, s.made))
                lines.append(at)
                at += 1
                continue
            if s.told is not None and chunk.start < s.prompt_tokens - 1:
                self._hear(s, chunk, logits[at : at + chunk.wanted])
            at += chunk.wanted
            if samples(chunk, s):
                lines.extend(range(at - 1 - chunk.drafts, at))
                if s.ways is None:
                    rows += [row_of(s, s.made + j) for j in range(1 + chunk.drafts)]
                else:
                    rows += shaped_rows(s, s.ways, drafts_of(chunk), masks.get(s.id))
        return (logits if len(lines) == at else logits[lines]), rows

    def _hear(self, s: Sequence, chunk: Chunk, logits: Logits) -> None:
        """Logprobs of the prompt tokens after the chunk's rows, but for those that are known already."""
        assert s.told is not None
        first, end = max(chunk.start, len(s.told)), min(chunk.start + chunk.wanted, s.prompt_tokens - 1)
        if first < end:
            part = logits[first - chunk.start : end - chunk.start]
            count = s.request.prompt_logprobs or 0
            s.told += self._sampler.prompt_logprobs(part, s.tokens[first + 1 : end + 1], count)

    def _note_first_steps(self, now: float) -> None:
        for sequence in self._timed:
            if sequence.cached is not None:  # admitted to the step that begins
                sequence.began = now
        self._timed = [s for s in self._timed if not s.began and s.id in self._sequences]

    def _report(self, made: Made) -> SequenceOutput:
        s, choices = made.sequence, made.choices
        output = self._output(s) if made.finish is None else self._end(s, made.finish, made.error, made.field)
        if len(choices) == 1:
            output.token_ids.append(choices[0].token)
        else:
            output.token_ids.extend(choice.token for choice in choices)
        if choices and choices[0].logprob is not None:
            output.logprobs = [choice.logprob for choice in choices if choice.logprob is not None]
        if s.request.probe is not None:
            output.traces = made.seen[: len(choices)] if made.seen is not None else [TokenTrace() for _ in choices]
            for trace, choice in zip(output.traces, choices, strict=True):
                trace.candidates = choice.candidates or []
        return output

    def _output(self, sequence: Sequence) -> SequenceOutput:
        output = SequenceOutput(sequence.id, [])
        if not sequence.reported:
            sequence.reported = True
            if sequence.cached is not None:
                device, output.cached_host, output.cached_store = sequence.loaded
                output.cached_tokens = sequence.cached + device
            output.prompt_logprobs = None if sequence.asks_prompt else sequence.told
            if sequence.began:
                output.computing_us = max(1, int((time.perf_counter() - sequence.began) * 1e6))
        return output

    def _end(self, sequence: Sequence, finish: FinishReason, error: str = "", field: str = "") -> SequenceOutput:
        """The sequence leaves and its blocks are free; its last output."""
        del self._sequences[sequence.id]
        self._probed -= looks_inside(sequence.request)
        if sequence.opening is not None and self._openings is not None:
            self._openings.forget(sequence)
            self._cache.close(sequence.table)
        else:
            self._scheduler.remove(sequence)
        if self._proposer is not None:
            self._proposer.forget(sequence.id)
        output = self._output(sequence)
        output.finish, output.error, output.field = finish, error, field
        return output

    def _fail(self, error: Exception) -> list[SequenceOutput]:
        """The step's rows were not computed: its sequences end, the others never notice."""
        log.error("a step failed: %s", error, exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        failed = sorted(self._scheduler.planned, key=lambda s: s.arrival)
        return [self._end(sequence, FinishReason.ERROR, reason) for sequence in failed]
