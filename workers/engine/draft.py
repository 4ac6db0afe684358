"""Drafts by a second, smaller model with a paged cache of its own.

One sequence in the draft's cache (half-open ranges over positions):

    0              computed, at most decided        decided
    |-- of decided tokens, published --|-- to compute --|-- of guesses, computed --|
                                       |                |
                                  catching up      one row per guess, all sequences together

What a sequence's next tokens turn out to be is compared with the guesses; rows of wrong ones are written over. Only
rows of decided tokens are published in the prefix tree.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor

from understudy.errors import CheckpointError, ConfigError
from workers.cache.keys import root_key
from workers.cache.manager import BlockTable, CacheManager
from workers.engine.contract import EngineConfig, Sampling
from workers.engine.drafts import Ask
from workers.engine.plan import Chunk, StepPlan
from workers.engine.runner import Runner, RunnerInfo
from workers.engine.sampler import Row, Sampler, SamplingOps
from workers.engine.sizes import CACHE_SHARE, available_memory, block_bytes
from workers.engine.speculate import Pace, agreeing
from workers.kernels.choose import make_ops
from workers.kernels.ops import BLOCK
from workers.model.config import read_spec

log = logging.getLogger(__name__)

FULL_REST = 64  # questions that a sequence waits after the cache was full


class DraftRunner(Protocol):
    """What computes the draft model's rows: `Runner`, or a test's own."""

    def run(self, plan: StepPlan) -> Tensor: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Sequence:
    """What the draft's cache holds of one sequence."""

    table: BlockTable
    root: bytes
    computed: int = 0  # rows in the cache: of decided tokens, then of `guessed`
    decided: int = 0  # tokens that were decided when the guesses were made
    guessed: list[int] = field(default_factory=list)
    pace: Pace = field(default_factory=Pace)

    def roll_back(self, tokens: Sequence[int]) -> None:
        """Keeps the rows that are those of `tokens`, all but the last, whose logits are wanted again."""
        right = self.decided + agreeing(self.guessed, tokens[self.decided : self.decided + len(self.guessed)])
        self.computed = min(self.computed, right, len(tokens) - 1)
        self.decided, self.guessed = len(tokens), []


@dataclass(slots=True)
class _Turn:
    """One sequence in one call: how many tokens to draft, and those that are there."""

    ask: Ask
    sequence: _Sequence
    count: int
    draft: list[int] = field(default_factory=list)


class DraftModel:
    """`workers.engine.drafts.Proposer` that asks a model.

    A token is guessed as the target draws its own: the same number for the same position, so that two models that
    nearly agree draw the same token also at a temperature. At most `chunk_tokens` rows of prompts a call; a sequence
    whose prompt is not yet computed has no draft. Where the cache is full a sequence gives its blocks back and has no
    draft for a while. Where the model fails there are no more drafts at all: answers do not need them.
    """

    def __init__(
        self, runner: DraftRunner, info: RunnerInfo, cache: CacheManager, ops: SamplingOps, chunk_tokens: int
    ) -> None:
        self._runner, self._info, self._cache = runner, info, cache
        self._sampler = Sampler(ops)
        self._chunk_tokens = chunk_tokens
        self._sequences: dict[str, _Sequence] = {}
        self._step = 0
        self._failed = self._closed = False

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        if self._failed or self._closed:
            return [[] for _ in asks]
        turns = [turn for ask in asks if (turn := self._turn(ask)) is not None]
        try:
            self._guess(self._catch_up(turns))
        except Exception as error:  # whatever the model does, the engine goes on
            log.error("the draft model failed; there are no drafts from now on: %s", error, exc_info=error)
            self._failed = True
            for id in list(self._sequences):
                self.forget(id)
            return [[] for _ in asks]
        drafts = {turn.ask.id: turn.draft for turn in turns}
        return [drafts.get(ask.id, []) for ask in asks]

    def forget(self, id: str) -> None:
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            self._cache.close(sequence.table)

    def close(self) -> None:
        for id in list(self._sequences):
            self.forget(id)
        if not self._closed:
            self._closed = True
            self._runner.close()

    def check_idle(self) -> None:
        """Raises RuntimeError when anything is still held though no sequence is there."""
        self._cache.check_idle()

    def _turn(self, ask: Ask) -> _Turn | None:
        """Takes the blocks that this sequence's drafts need; None where it has none this time."""
        sequence = self._sequences.get(ask.id) or self._open(ask)
        count = sequence.pace.allowed(ask.tokens, ask.at_most)
        rows = len(ask.tokens) + count - 1  # the last guess is not computed
        if not count or rows > self._info.max_context:
            return None
        sequence.roll_back(ask.tokens)
        if not sequence.computed:
            self._cache.free(sequence.table)
            sequence.computed = self._cache.match(sequence.table, sequence.root, ask.tokens)
        if not self._cache.can_allocate(sequence.table, rows):
            self._cache.free(sequence.table)
            sequence.computed = 0
            sequence.pace.pause(FULL_REST)
            return None
        self._cache.allocate(sequence.table, rows)
        return _Turn(ask, sequence, count)

    def _open(self, ask: Ask) -> _Sequence:
        its = self._info
        root = root_key(its.model_fingerprint, its.dtype, its.numerics_id, ask.salt)
        self._sequences[ask.id] = sequence = _Sequence(self._cache.open(), root)
        return sequence

    def _catch_up(self, turns: list[_Turn]) -> list[_Turn]:
        """Computes the decided tokens that are not yet; those turns that then have their first guess."""
        budget, plan, planned = self._chunk_tokens, StepPlan(self._step), []
        for turn in turns:
            its, tokens = turn.sequence, turn.ask.tokens
            rows = min(len(tokens) - its.computed, budget)
            if rows:
                end = its.computed + rows
                ids, wanted = list(tokens[its.computed : end]), int(end == len(tokens))
                plan.chunks.append(Chunk(turn.ask.id, its.computed, ids, its.table.groups, wanted))
                planned.append(turn)
                budget -= rows
        ready = [t for t, chunk in zip(planned, plan.chunks, strict=True) if chunk.wanted]
        self._run(plan, ready)
        for turn, chunk in zip(planned, plan.chunks, strict=True):
            its = turn.sequence
            its.computed += len(chunk.tokens)
            self._cache.register(its.table, its.root, turn.ask.tokens, its.computed)
            self._cache.trim(its.table, its.computed)
        return ready

    def _guess(self, turns: list[_Turn]) -> None:
        """The guesses after the first, one row per sequence and step."""
        going = turns
        while going := [t for t in going if len(t.draft) < t.count]:
            plan = StepPlan(self._step)
            for turn in going:
                its = turn.sequence
                plan.chunks.append(Chunk(turn.ask.id, its.computed, turn.draft[-1:], its.table.groups, 1))
                its.guessed.append(turn.draft[-1])
                its.computed += 1
            self._run(plan, going)
        for turn in turns:
            turn.sequence.pace.drafted(turn.ask.tokens, turn.draft)

    def _run(self, plan: StepPlan, turns: list[_Turn]) -> None:
        """Computes the plan; each of `turns`, whose rows are wanted, gets one guess more."""
        if not plan.chunks:
            return
        self._step += 1
        logits = self._runner.run(plan)
        rows = [Row(_plain(t.ask.sampling), t.ask.index, t.ask.made + len(t.draft)) for t in turns]
        for turn, choice in zip(turns, self._sampler.choose(logits, rows), strict=True):
            if choice.error:
                raise RuntimeError(choice.error)
            turn.draft.append(choice.token)


def _plain(sampling: Sampling) -> Sampling:
    """Temperature and filters alone: penalties and the like are the target's business."""
    s = sampling
    return Sampling(temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, seed=s.seed)


# Building one.


def check_draft(config: EngineConfig) -> None:
    """Raises ConfigError where the draft model does not speak the model's vocabulary, CheckpointError where one of
    them cannot be read. Loads neither."""
    model, draft = Path(config.model_dir), Path(config.draft_model_dir or "")
    ours, theirs = read_spec(model).vocab_size, read_spec(draft).vocab_size
    if ours != theirs:
        raise ConfigError(
            f"draft_model_dir: {draft} has a vocabulary of {theirs} tokens, the model one of {ours}; a draft model "
            "must have the same"
        )
    check_tokenizers(model, draft)


def load_draft(config: EngineConfig, target: RunnerInfo, chunk_tokens: int) -> DraftModel:
    """The draft model in `config.draft_model_dir`, on the target's device; its cache has as many positions as the
    target's where memory allows, beside `cache_bytes`. Ask `check_draft` first.

    Raises CheckpointError or ConfigError.
    """
    spec = read_spec(Path(config.draft_model_dir or ""))
    ops = make_ops(
        spec.dtype if config.dtype == "auto" else config.dtype, config.device, config.kernels, config.threads
    )
    device = torch.device(config.device)
    room = int(available_memory(device) * CACHE_SHARE[device.type])
    cache_bytes = min(block_bytes(spec, ops) * min(target.blocks), room)
    own = msgspec.structs.replace(
        config, model_dir=config.draft_model_dir, max_context=None, cache_bytes=cache_bytes, experts=None
    )
    runner = Runner.from_checkpoint(own)
    cache = CacheManager(runner.info.blocks, runner.info.windows, BLOCK, config.prefix_cache)
    return DraftModel(runner, runner.info, cache, runner.ops, chunk_tokens)


def check_tokenizers(target: Path, draft: Path) -> None:
    """Raises ConfigError where both have a tokenizer.json and one id stands for different tokens."""
    files = [folder / "tokenizer.json" for folder in (target, draft)]
    if not all(file.is_file() for file in files):
        return
    ours, theirs = (_tokens(file) for file in files)
    if ours == theirs:
        return
    id = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    raise ConfigError(
        f"draft_model_dir: {draft} has another tokenizer than the model: id {id} is {theirs.get(id)!r}, the model's is "
        f"{ours.get(id)!r}; give a draft model that was trained with the same tokenizer"
    )


def _tokens(file: Path) -> dict[int, str]:
    """Every id's token. Raises CheckpointError."""
    try:
        tree: dict[str, Any] = json.loads(file.read_bytes())
        vocab = tree["model"]["vocab"]
        known = (
            {i: str(e[0]) for i, e in enumerate(vocab)} if isinstance(vocab, list) else {i: t for t, i in vocab.items()}
        )
        return known | {int(t["id"]): str(t["content"]) for t in tree.get("added_tokens") or ()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: its vocabulary cannot be read: {type(error).__name__}: {error}") from error
