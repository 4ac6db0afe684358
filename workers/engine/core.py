"""The engine: one step said aloud in five statements. Everything else is what those statements need."""

from __future__ import annotations

import logging
from typing import Protocol

from torch import Tensor

from workers.cache.keys import root_key
from workers.cache.manager import CacheManager
from workers.engine.contract import EngineInfo, EngineStats, FinishReason, Request, SequenceOutput
from workers.engine.plan import StepPlan
from workers.engine.sampler import Choice, Row, Sampler, SamplingOps
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence, finish_of

log = logging.getLogger(__name__)


class StepRunner(Protocol):
    """What computes a plan's rows: `workers.engine.runner.Runner`, or a test's own."""

    def run(self, plan: StepPlan) -> Tensor:
        """Logits [S, V], of any float type, of the last `wanted` rows of each chunk, in the plan's order. S may be 0."""

    def close(self) -> None: ...


class EngineCore:
    """Keeps the contract of `Engine` over a runner, a sampler and the block cache."""

    def __init__(self, runner: StepRunner, info: EngineInfo, cache: CacheManager, ops: SamplingOps) -> None:
        self._runner = runner
        self._info = info
        self._cache = cache
        self._sampler = Sampler(ops)
        self._scheduler = Scheduler(cache, info.max_running, info.chunk_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._ended: list[SequenceOutput] = []  # over without a step: told by the next one
        self._arrivals = 0
        self._closed = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    def step(self) -> list[SequenceOutput]:
        ended, self._ended = self._ended, []
        if not self._sequences:
            return ended
        plan = self._scheduler.schedule()
        try:
            logits = self._runner.run(plan)
            choices = self._sampler.choose(logits, self._rows(plan))
        except Exception as error:  # of the forward: only this step's sequences end
            return ended + self._fail(error)
        self._scheduler.advance(plan)
        return ended + self._report(plan, choices)

    def add(self, request: Request) -> None:
        root = root_key(self._info.model_fingerprint, self._info.dtype, self._info.numerics_id, request.cache_salt)
        self._arrivals += 1
        reason = self._refusal(request)
        over = finish_of(request, len(request.generated), request.generated[-1:])
        if reason is not None:
            self._ended.append(SequenceOutput(request.id, [], finish=FinishReason.ERROR, error=reason))
        elif over is not None:  # a stream that broke after its last token
            self._ended.append(SequenceOutput(request.id, [], finish=over, cached_tokens=0))
        else:
            rank, tokens = (-request.priority, self._arrivals), [*request.prompt, *request.generated]
            sequence = Sequence(request, rank, root, self._cache.open(), tokens)
            self._sequences[request.id] = sequence
            self._scheduler.add(sequence)

    def cancel(self, id: str) -> None:
        if id in self._sequences:
            self._ended.append(self._end(self._sequences[id], FinishReason.CANCELLED))

    def has_work(self) -> bool:
        return bool(self._sequences or self._ended)

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def check_idle(self) -> None:
        if self._sequences or self._ended:
            raise RuntimeError(f"not idle: {[*self._sequences, *(o.id for o in self._ended)]}")
        self._cache.check_idle()

    def check(self) -> None:
        """Raises RuntimeError unless every block is accounted for. For tests: it looks at every block."""
        self._cache.check([s.table for s in self._sequences.values()])

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._runner.close()

    def _refusal(self, request: Request) -> str | None:
        limit, asked = self._info.max_context, len(request.prompt) + request.max_tokens
        if asked > limit:
            return f"{len(request.prompt)} prompt tokens and {request.max_tokens} more exceed the context of {limit}"
        return self._scheduler.refusal(len(request.prompt), request.max_tokens)

    def _rows(self, plan: StepPlan) -> list[Row]:
        return [_row(s) for chunk, s in zip(plan.chunks, self._scheduler.planned, strict=True) if chunk.wanted]

    def _report(self, plan: StepPlan, choices: list[Choice]) -> list[SequenceOutput]:
        """Appends every sampled sequence's token, ends those that are over, and says so, in the order of arrival."""
        sampled = [s for chunk, s in zip(plan.chunks, self._scheduler.planned, strict=True) if chunk.wanted]
        pairs = sorted(zip(sampled, choices, strict=True), key=lambda pair: pair[0].rank[1])
        return [self._advance(sequence, choice) for sequence, choice in pairs]

    def _advance(self, sequence: Sequence, choice: Choice) -> SequenceOutput:
        if choice.error:
            return self._end(sequence, FinishReason.ERROR, choice.error)
        sequence.tokens.append(choice.token)
        self._scheduler.counts.generated_tokens += 1
        finish = finish_of(sequence.request, sequence.made, (choice.token,))
        output = self._output(sequence) if finish is None else self._end(sequence, finish)
        output.token_ids.append(choice.token)
        if choice.logprob is not None:
            output.logprobs = [choice.logprob]
        return output

    def _output(self, sequence: Sequence) -> SequenceOutput:
        cached = None if sequence.reported else sequence.cached
        sequence.reported = True
        return SequenceOutput(sequence.id, [], cached_tokens=cached)

    def _end(self, sequence: Sequence, finish: FinishReason, error: str = "") -> SequenceOutput:
        """The sequence leaves and its blocks are free; its last output."""
        del self._sequences[sequence.id]
        self._scheduler.remove(sequence)
        output = self._output(sequence)
        output.finish, output.error = finish, error
        return output

    def _fail(self, error: Exception) -> list[SequenceOutput]:
        """The step's rows were not computed: its sequences end, the others never notice."""
        log.error("a step failed: %s", error, exc_info=error)
        reason = f"{type(error).__name__}: {error}"
        failed = sorted(self._scheduler.planned, key=lambda s: s.rank[1])
        return [self._end(sequence, FinishReason.ERROR, reason) for sequence in failed]


def _row(sequence: Sequence) -> Row:
    request, made = sequence.request, sequence.made
    barred = [*request.eos_ids, *request.stop_ids] if made < request.min_tokens else ()
    return Row(request.sampling, request.index, made, barred, request.logprobs)
