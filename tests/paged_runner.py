"""A runner that is honest about paging: what it 'computes' is read back through the block tables.

Each cache group has a memory of token ids, one cell per position of a block. A row's logits are a hash of exactly the
positions that each group's layers would see, so that a wrong block, a block given back too early or one published
half-computed changes the answer.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from workers.cache.manager import CacheManager
from workers.cache.orders import StoreConfig
from workers.cache.store import BlockStore, main_group
from workers.engine.contract import EngineInfo
from workers.engine.core import EngineCore
from workers.engine.drafts import Proposer
from workers.engine.formats import Formats
from workers.engine.plan import Chunk, StepPlan

BLOCK = 16


class PlainSamplingOps:
    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(logits.float().numpy().argmax(axis=1))

    def logprobs(self, logits: torch.Tensor) -> torch.Tensor:
        rows = [torch.log_softmax(row.double(), -1).float() for row in logits]
        return torch.stack(rows)


class TokenCache:
    """A group's memory as the prefix store sees it: head h of a block holds its token ids times h + 1."""

    kv_heads = 2
    value_bytes = BLOCK * 8

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory

    def export_blocks(self, blocks: np.ndarray, memory: np.ndarray, offsets: np.ndarray) -> None:
        for block, places in zip(blocks, offsets, strict=True):
            assert (self.memory[block] >= 0).all(), "a block is saved that is not full"
            for head, place in enumerate(places):
                memory[place : place + self.value_bytes] = (self.memory[block] * (head + 1)).view(np.uint8)

    def import_blocks(self, blocks: np.ndarray, memory: np.ndarray, offsets: np.ndarray) -> None:
        for block, places in zip(blocks, offsets, strict=True):
            values = [memory[p : p + self.value_bytes].copy().view(np.int64) // (h + 1) for h, p in enumerate(places)]
            assert all((v == values[0]).all() for v in values), "heads of different blocks"
            self.memory[block] = values[0]


class PagedRunner:
    divided = False
    store: BlockStore | None = None

    def __init__(self, blocks: list[int], windows: list[int | None], vocab: int) -> None:
        self.memory = [np.full((count, BLOCK), -1, dtype=np.int64) for count in blocks]
        self.windows, self.vocab = windows, vocab
        self.plans: list[list[tuple[str, int, int, int]]] = []
        self.fail_with: Exception | None = None
        self.closed = 0

    def run(self, plan: StepPlan) -> torch.Tensor:
        if self.store is not None:
            self.store.apply(plan.floors, plan.saves, plan.loads)
        self.plans.append([(c.id, c.start, len(c.tokens), c.wanted) for c in plan.chunks])
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error
        for chunk in plan.chunks:
            for memory, table in zip(self.memory, chunk.tables, strict=True):
                for i, token in enumerate(chunk.tokens):
                    block = table[(chunk.start + i) // BLOCK]
                    assert block >= 0, "a row is written to a block that was given back"
                    memory[block, (chunk.start + i) % BLOCK] = token
        rows = [
            self._logits(c, c.start + i) for c in plan.chunks for i in range(len(c.tokens) - c.wanted, len(c.tokens))
        ]
        return torch.stack(rows) if rows else torch.empty(0, self.vocab)

    def _logits(self, chunk: Chunk, last: int) -> torch.Tensor:
        digest = hashlib.sha256()
        for memory, table, window in zip(self.memory, chunk.tables, self.windows, strict=True):
            first = 0 if window is None else max(0, last - window + 1)
            seen = [int(memory[table[p // BLOCK], p % BLOCK]) for p in range(first, last + 1)]
            assert all(table[p // BLOCK] >= 0 for p in range(first, last + 1)), "a visible block was given back"
            assert -1 not in seen, "a row reads a position that nobody computed"
            digest.update(repr((first, seen)).encode())
        random = np.random.Generator(np.random.Philox(int.from_bytes(digest.digest()[:8], "little")))
        return torch.from_numpy(random.standard_normal(self.vocab, dtype=np.float32) * 3)

    def close(self) -> None:
        self.closed += 1


def paged_engine(
    blocks: int | list[int] = 64,
    windows: list[int | None] | None = None,
    vocab: int = 50,
    max_running: int = 8,
    chunk_tokens: int = 32,
    max_context: int | None = None,
    prefix_cache: bool = True,
    formats: Formats | None = None,
    proposer: Proposer | None = None,
    store: StoreConfig | None = None,
    patience: float | None = None,
    fingerprint: str = "paged",
) -> tuple[EngineCore, PagedRunner]:
    windows = [None] if windows is None else windows
    counts = [blocks] * len(windows) if isinstance(blocks, int) else blocks
    runner = PagedRunner(counts, windows, vocab)
    info = EngineInfo(
        model="paged",
        model_fingerprint=fingerprint,
        numerics_id="paged",
        architecture="Paged",
        dtype="float32",
        max_context=max_context or min(counts) * BLOCK,
        vocab_size=vocab,
        block_tokens=BLOCK,
        blocks=min(counts),
        cache_bytes=0,
        max_running=max_running,
        chunk_tokens=chunk_tokens,
    )
    cache = CacheManager(counts, windows, BLOCK, prefix_cache)
    if store is not None:
        runner.store = BlockStore([TokenCache(m) for m in runner.memory], store, main=main_group(windows))
    core = EngineCore(runner, info, cache, PlainSamplingOps(), formats, proposer, store=runner.store, patience=patience)
    return core, runner
