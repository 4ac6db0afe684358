"""Runs step plans on one device: the decoder, its cache, and the numbers that an engine is sized by."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.cache.store import BlockStore
from workers.engine.contract import EngineConfig
from workers.engine.logits import Logits, collect, likeliest_only
from workers.engine.plan import Chunk, StepPlan, halved
from workers.engine.sizes import agreed, available_memory, block_bytes, cache_size, spare_experts
from workers.engine.watch import Watch, WatchedOps
from workers.experts.dispatch import Dispatcher
from workers.experts.overlap import Overlap
from workers.experts.shelf import Shelf
from workers.experts.spread import Spread
from workers.kernels.choose import make_ops
from workers.kernels.ops import BLOCK, Batch, KvCache, Ops
from workers.model.config import read_spec
from workers.model.decoder import Decoder, load_decoder
from workers.model.load import Loader
from workers.model.quantized import open_weights
from workers.parallel.errors import GroupBroken
from workers.parallel.experts import shared_rows
from workers.parallel.group import ALONE, Group
from workers.parallel.share import Share, check_degree
from workers.parallel.wire import decode_plan, encode_plan

log = logging.getLogger(__name__)

LoadProgress = Callable[[int, int], None]  # (bytes read, bytes in all)


@dataclass(frozen=True, slots=True)
class RunnerInfo:
    """What `EngineInfo` needs to know of a runner. `blocks` of each cache group; `cache_bytes` of all together."""

    model_fingerprint: str
    numerics_id: str
    architecture: str
    dtype: str
    max_context: int
    vocab_size: int
    blocks: tuple[int, ...]
    windows: tuple[int | None, ...]
    cache_bytes: int
    layers: int = 0
    long_prompt: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A plan that was checked, as what a forward takes: T rows, of which S are wanted."""

    chunks: Sequence[Chunk]
    ids: Tensor  # int64 [T]
    row_start: NDArray[np.int64]
    batch: Batch
    sampled: Tensor  # int64 [S]
    whole: list[bool]  # [S]


class Runner:
    """One rank's decoder with its cache. Used from one thread.

    Where a model is divided, rank 0 leads: its `run` tells the others the plan, and they `follow`.
    """

    def __init__(self, decoder: Decoder, blocks: int, fingerprint: str, max_context: int) -> None:
        """`blocks` is the number of blocks of every cache group; tables hold ids in [0, blocks)."""
        spec, ops = decoder.spec, decoder.ops
        self.blocks = blocks
        self.experts: Dispatcher | Spread | None = None  # who knows where they are, where that is not here
        self.overlap = Overlap()
        self._decoder: Decoder | None = decoder
        self._device = decoder.device
        self._group, self._share = decoder.group, decoder.share
        a = self._share.attention(spec.attention)
        latent = a.latent.rank if a.latent else None
        self._caches: list[KvCache] = [
            ops.cache(len(g.layers), blocks, a.cache_heads, a.cache_dim, latent) for g in spec.groups
        ]
        self.store: BlockStore | None = None  # the tiers behind the caches: whoever builds the engine sets it
        self.block_bytes = block_bytes(spec, ops, self._share)
        self.ranks = self._group.size
        # Which KV heads this rank's caches hold, by their index in the model, and of how many.
        self.heads = range(1) if a.latent else self._share.kv_heads(spec.attention)
        self.total_heads = 1 if a.latent else spec.attention.kv_heads
        self.info = RunnerInfo(
            model_fingerprint=fingerprint,
            numerics_id=ops.numerics_id + self._share.numerics,
            architecture=spec.architecture,
            dtype=str(ops.dtype).removeprefix("torch."),
            max_context=max_context,
            vocab_size=spec.vocab_size,
            blocks=(blocks,) * len(spec.groups),
            windows=tuple(g.window for g in spec.groups),
            cache_bytes=sum(cache.bytes for cache in self._caches) * self._group.size,
            layers=sum(len(g.layers) for g in spec.groups),
            long_prompt=spec.long_prompt,
        )

    @classmethod
    def from_checkpoint(
        cls, config: EngineConfig, progress: LoadProgress | None = None, group: Group = ALONE
    ) -> Runner:
        """Loads this rank's share of `config.model_dir`.

        Raises CheckpointError (names the file) or ConfigError (names the key). Where sizes are not given, the
        context is the model's, cut to what the cache holds, and the cache is what DEFAULT_MAX_RUNNING full contexts
        need, at most CACHE_SHARE of the memory that the weights leave. All ranks have the size of the smallest.
        """
        model_dir = Path(config.model_dir)
        spec = read_spec(model_dir)
        whole_experts = config.expert_parallel or config.experts is not None
        check_degree(spec, group.size, config.tensor_parallel_invariant, whole_experts)
        share = Share(group.rank, group.size, config.tensor_parallel_invariant, whole_experts)
        ops = make_ops(
            spec.dtype if config.dtype == "auto" else config.dtype, config.device, config.kernels, config.threads
        )
        device = torch.device(config.device)
        checkpoint = open_weights(model_dir, spec.quantization, ops.dtype)
        elsewhere = None if config.experts is None else Dispatcher(config.experts, spec, ops)
        here = [name for name in checkpoint.entries if elsewhere is None or ".experts." not in name]
        total = sum(checkpoint.nbytes(name) for name in here)
        memory = max(0, available_memory(device) - total)
        if device.type == "cpu":  # of which ranks on one machine see the whole
            memory //= group.size
        max_context, blocks = agreed(cache_size(spec, ops, config, memory, share), group)
        done = 0

        def read(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(min(done * group.size, total), total)

        load = Loader(checkpoint, ops, device, read, share, group)
        spread = None
        if elsewhere is not None:
            load.experts_factory = shared_rows(elsewhere.experts, share, group)
        elif config.expert_parallel and not share.alone:
            spread = Spread(Shelf(spec, load), share, group)
            load.experts_factory = spread.experts
        try:
            decoder = load_decoder(spec, load, ops, max_context, device)
        except BaseException:
            if elsewhere is not None:
                elsewhere.close()
            raise
        if progress is not None:
            progress(total, total)
        checkpoint.log_unused()
        runner = cls(decoder, blocks, checkpoint.fingerprint(spec), max_context)
        runner.experts = elsewhere or spread
        if spread is not None:
            load.hush()
            spread.start(spare_experts(spread.shelf, memory - blocks * runner.block_bytes))
        return runner

    @property
    def ops(self) -> Ops:
        return self._open().ops

    @property
    def caches(self) -> Sequence[KvCache]:
        """One per cache group."""
        return self._caches

    @property
    def divided(self) -> bool:
        """See `StepRunner`: other ranks hold a part of the vocabulary, or the head has a sieve."""
        return self._group.size > 1 or self._open().sieve is not None

    def run(self, plan: StepPlan) -> Logits:
        """Computes every row of the plan, in order, and writes its keys and values.

        Returns the logits of the last `wanted` rows of each chunk, in the plan's order: [S, V] in the model's dtype.
        Raises ValueError for a row outside the context, the vocabulary or its table: the kernels would read or write
        memory that is not theirs. Raises GroupBroken when another rank is lost; nothing can be run any more then.
        """
        decoder = self._open()
        nothing = torch.zeros(0, decoder.spec.vocab_size, dtype=decoder.ops.dtype)
        if not plan.chunks and not plan.orders:
            return nothing
        if isinstance(self.experts, Dispatcher) and not any(c.probe is not None for c in plan.chunks):
            plan.halves = self.overlap.halves(plan.rows)
        steps = self._prepare_all(plan)
        if isinstance(self.experts, Spread):
            plan.experts = self.experts.latest()
        if self._group.size == 1:
            self._obey(plan)
            return self._timed(plan, steps) if steps else nothing
        self._group.tell(encode_plan(plan))
        try:
            self._obey(plan)
            return self._timed(plan, steps) if steps else nothing
        except GroupBroken:
            raise
        except Exception as error:  # the others are in the middle of the step and would wait for ever
            self._group.abort(f"rank 0 failed: {type(error).__name__}: {error}")
            raise GroupBroken(f"rank 0 failed: {type(error).__name__}: {error}") from error

    def follow(self) -> None:
        """Runs what rank 0 tells, until it closes. Raises GroupBroken when a rank is lost, this one included."""
        try:
            while message := self._group.hear():
                plan = decode_plan(message)
                self._obey(plan)
                if plan.chunks:
                    self._compute(self._prepare_all(plan))
        except GroupBroken:
            raise
        except Exception as error:
            self._group.abort(f"rank {self._group.rank} failed: {type(error).__name__}: {error}")
            raise GroupBroken(f"rank {self._group.rank} failed: {type(error).__name__}: {error}") from error

    def _obey(self, plan: StepPlan) -> None:
        """Does what the plan says of experts and the prefix store."""
        if isinstance(self.experts, Spread):
            self.experts.adopt(plan.experts)
        if self.store is not None and plan.orders:
            self.store.apply(plan.floors, plan.saves, plan.loads)
            if plan.gather:
                self.store.gather(self._group)

    def _prepare_all(self, plan: StepPlan) -> list[Step]:
        """The step, or its halves."""
        if not plan.chunks:
            return []
        return [self._prepare(chunks) for chunks in (halved(plan.chunks) if plan.halves else [plan.chunks])]

    def _prepare(self, chunks: Sequence[Chunk]) -> Step:
        lengths = np.fromiter((len(c.tokens) for c in chunks), np.int64, len(chunks))
        starts = np.fromiter((c.start for c in chunks), np.int64, len(chunks))
        row_start = np.zeros(len(chunks) + 1, np.int64)
        np.cumsum(lengths, out=row_start[1:])
        rows = int(row_start[-1])
        ids = np.fromiter((token for c in chunks for token in c.tokens), np.int64, rows)
        positions = np.arange(rows) + np.repeat(starts - row_start[:-1], lengths)
        self._check_rows(chunks, ids, starts, lengths)
        needed = -(-(starts + lengths) // BLOCK)  # blocks that each table has to have
        tables = [self._table(chunks, group, needed) for group in range(len(self._caches))]
        self._check_tables(chunks, starts, needed, tables)
        wanted = np.fromiter((c.wanted for c in chunks), np.int64, len(chunks))
        if ((wanted < 0) | (wanted > lengths)).any():
            raise ValueError(f"wanted rows {wanted.tolist()} of chunks of {lengths.tolist()} rows")
        batch = Batch(
            positions=self._tensor(positions),
            row_start=self._tensor(row_start.astype(np.int32)),
            tables=[self._tensor(table) for table in tables],
            row_seq=self._tensor(np.repeat(np.arange(len(chunks), dtype=np.int32), lengths)),
            rope_rows=self._rope_rows(chunks, positions, lengths),
        )
        sampled = self._tensor(last_rows(row_start[1:], wanted))
        whole = [c.whole for c in chunks for _ in range(c.wanted)]
        return Step(chunks, self._tensor(ids), row_start, batch, sampled, whole)

    def _timed(self, plan: StepPlan, steps: Sequence[Step]) -> Logits:
        begin = time.perf_counter()
        logits = self._compute(steps)
        self.overlap.took(plan.rows, plan.halves, time.perf_counter() - begin)
        return logits

    def _compute(self, steps: Sequence[Step]) -> Logits:
        decoder, step = self._open(), steps[0]
        if len(steps) > 1:
            halves = [(half.ids, half.batch, half.sampled) for half in steps]
            logits = torch.cat(decoder.forward_halves(halves, self._caches))
        elif any(c.probe is not None for c in step.chunks):
            logits = self._watched(decoder, step)
        elif step.whole == [False] and decoder.sieve is not None:
            found = decoder.forward_likeliest(step.ids, step.batch, self._caches, step.sampled)
            if isinstance(found, tuple):
                return likeliest_only(*found)
            logits = found
        else:
            logits = decoder.forward(step.ids, step.batch, self._caches, step.sampled)
        whole = [each for step in steps for each in step.whole]
        return collect(logits, whole, decoder.spec.vocab_size, self._share, self._group, decoder.ops)

    def _watched(self, decoder: Decoder, step: Step) -> Tensor:
        """The same forward, and what happened in it to the rows that somebody wants to know of."""
        rows = {
            id(c): range(int(end) - 1 - c.drafts, int(end))
            for c, end in zip(step.chunks, step.row_start[1:], strict=True)
            if c.probe is not None
        }
        probes = {row: c.probe for c in step.chunks if c.probe is not None for row in rows[id(c)]}
        watch = Watch(probes, step.sampled, len(step.ids), self._group)
        watched = replace(decoder, ops=WatchedOps(decoder.ops, watch))
        logits = watched.forward(step.ids, step.batch, self._caches, step.sampled)
        for chunk in step.chunks:
            if chunk.probe is not None:
                chunk.seen = [watch.traces[row] for row in rows[id(chunk)]]
        return logits

    def close(self) -> None:
        """Lets go of weights and cache, of what lies behind it, and of the other ranks. Idempotent."""
        if self.store is not None:
            self.store.close()
        if self._decoder is not None and self._group.size > 1 and self._group.rank == 0:
            try:
                self._group.tell(b"")
            except GroupBroken as error:
                log.info("the group was broken when it was closed: %s", error)
        self._group.close()
        self._decoder = None
        self._caches = []
        if self.experts is not None:
            self.experts.close()

    def _open(self) -> Decoder:
        if self._decoder is None:
            raise RuntimeError("the runner is closed")
        return self._decoder

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values).to(self._device)

    def _table(self, chunks: Sequence[Chunk], group: int, needed: NDArray[np.int64]) -> NDArray[np.int32]:
        """int32 [S, W], filled up with -1."""
        table = np.full((len(chunks), int(needed.max())), -1, np.int32)
        for row, chunk, count in zip(table, chunks, needed.tolist(), strict=True):
            blocks = np.frombuffer(chunk.tables[group], np.int32)[:count]
            row[: len(blocks)] = blocks
        return table

    def _rope_rows(
        self, chunks: Sequence[Chunk], positions: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Tensor | None:
        """Rows of the rotary tables, in which those for long prompts stand behind all others; None: `positions`."""
        long = np.fromiter((c.long for c in chunks), np.bool_, len(chunks))
        if self.info.long_prompt is None or not long.any():
            return None
        return self._tensor(positions + np.repeat(long, lengths) * self.info.max_context)

    def _check_rows(
        self, chunks: Sequence[Chunk], ids: NDArray[np.int64], starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> None:
        wrong = (lengths < 1) | (starts < 0) | (starts + lengths > self.info.max_context)
        if wrong.any():
            bad = chunks[int(np.argmax(wrong))]
            raise ValueError(
                f"chunk of {bad.id!r}: positions [{bad.start}, {bad.start + len(bad.tokens)}) are none, or outside "
                f"the context of {self.info.max_context}"
            )
        if ids.min() < 0 or ids.max() >= self.info.vocab_size:
            raise ValueError(f"token ids {ids.min()}..{ids.max()} are outside the vocabulary of {self.info.vocab_size}")

    def _check_tables(
        self,
        chunks: Sequence[Chunk],
        starts: NDArray[np.int64],
        needed: NDArray[np.int64],
        tables: Sequence[NDArray[np.int32]],
    ) -> None:
        for group, (table, window) in enumerate(zip(tables, self.info.windows, strict=True)):
            first = np.zeros_like(starts) if window is None else np.maximum(starts - window + 1, 0) // BLOCK
            entry = np.arange(table.shape[1])
            read = (entry >= first[:, None]) & (entry < needed[:, None])
            wrong = read & ((table < 0) | (table >= self.blocks))
            if wrong.any():
                row, column = np.argwhere(wrong)[0]
                raise ValueError(
                    f"chunk of {chunks[row].id!r}: entry {column} of its table in cache group {group} is "
                    f"{table[row, column]}, of {self.blocks} blocks"
                )


def last_rows(ends: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The `counts[i]` rows before `ends[i]`, for every i: [2, 9], [1, 3] -> [1, 6, 7, 8]."""
    before = np.cumsum(counts)
    return np.arange(before[-1]) + np.repeat(ends - before, counts)
