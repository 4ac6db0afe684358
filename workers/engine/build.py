"""From a configuration to an engine: loads the checkpoint, sizes the cache. Brings torch only when called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from understudy.errors import ConfigError
from workers.engine.contract import EngineConfig, EngineInfo
from workers.engine.speculate import MAX_DRAFT_TOKENS

if TYPE_CHECKING:
    from workers.cache.store import BlockStore
    from workers.engine.core import EngineCore
    from workers.engine.drafts import Proposer
    from workers.engine.runner import Runner, RunnerInfo
    from workers.parallel.group import Group

DEFAULT_CHUNK_TOKENS = 512  # rows a step has at most: large enough to be bound by arithmetic, small enough to be short
DEFAULT_MAX_RUNNING = 64
# Host memory behind the cache: this share of what is free then, at most so many bytes. It is taken as it is filled.
HOST_CACHE = {"cpu": (1 / 16, 1 << 30), "cuda": (1 / 4, 32 << 30)}


def build_engine(
    config: EngineConfig, progress: Callable[[int, int], None] | None = None, group: Group | None = None
) -> EngineCore:
    """An engine over the checkpoint in `config.model_dir`. `progress` is told (bytes read, bytes in all).

    `group`: of `config.tensor_parallel` ranks, of which this process is the first; None: of one.

    Raises CheckpointError (names the file) or ConfigError (names the key).
    """
    max_running, chunk_tokens = step_sizes(config)
    check_speculation(config)

    import numpy as np

    from workers.cache.events import Journal
    from workers.cache.manager import CacheManager
    from workers.engine.core import EngineCore
    from workers.engine.runner import Runner
    from workers.engine.sampler import SAMPLER_VERSION
    from workers.grammar.formats import CheckpointFormats
    from workers.kernels.ops import BLOCK

    runner = Runner.from_checkpoint(config, progress, group_of(config, group))
    its = runner.info
    info = EngineInfo(
        model=config.name or Path(config.model_dir).resolve().name,
        model_fingerprint=its.model_fingerprint,
        numerics_id=f"{its.numerics_id}/sampler-{SAMPLER_VERSION}/numpy-{np.__version__}",
        architecture=its.architecture,
        dtype=its.dtype,
        max_context=its.max_context,
        vocab_size=its.vocab_size,
        block_tokens=BLOCK,
        blocks=min(its.blocks),
        cache_bytes=its.cache_bytes,
        max_running=max_running,
        chunk_tokens=chunk_tokens,
        layers=its.layers,
        long_prompt=its.long_prompt or 0,
    )
    journal = Journal()
    cache = CacheManager(its.blocks, its.windows, BLOCK, config.prefix_cache, journal.record)
    formats = CheckpointFormats(Path(config.model_dir), its.vocab_size)
    proposer = make_proposer(config, its, chunk_tokens)
    runner.store = open_store(config, runner)
    if runner.store is not None:
        runner.store.observe(journal.record)
    return EngineCore(
        runner, info, cache, runner.ops, formats, proposer, config.draft_tokens, its.long_prompt, runner.store,
        journal=journal,
    )  # fmt: skip


def open_store(config: EngineConfig, runner: Runner) -> BlockStore | None:
    """The tiers behind the runner's caches; None where there are none."""
    store = config.store
    if store is None or not config.prefix_cache:
        return None

    import torch

    from workers.cache.store import BlockStore, main_group
    from workers.engine.sizes import available_memory

    if store.host_bytes is None:
        share, most = HOST_CACHE[torch.device(config.device).type]
        host_bytes = min(most, int(share * available_memory(torch.device("cpu"))))
        store = msgspec.structs.replace(store, host_bytes=host_bytes)
    if not store.host_bytes and store.url is None:
        return None
    ranks = runner.ranks
    store = msgspec.structs.replace(store, host_bytes=(store.host_bytes or 0) // ranks)
    main = main_group(runner.info.windows)
    return BlockStore(runner.caches, store, runner.heads, runner.total_heads, ranks=ranks, main=main)


def build_rank(config: EngineConfig, group: Group) -> Runner:
    """What another rank than the first has: a runner that follows. Raises CheckpointError or ConfigError."""
    from workers.engine.runner import Runner

    runner = Runner.from_checkpoint(config, None, group_of(config, group))
    runner.store = open_store(config, runner)
    return runner


def group_of(config: EngineConfig, group: Group | None) -> Group:
    """The group, which has to be of the degree that was asked for; of one rank where there is none."""
    from workers.parallel.group import ALONE

    group = group or ALONE
    if group.size != config.tensor_parallel:
        raise ConfigError(
            f"tensor_parallel: {config.tensor_parallel} ranks are asked for, the group has {group.size}; "
            "`understudy serve` starts them, `workers.parallel.meeting` brings them together"
        )
    return group


def make_proposer(config: EngineConfig, target: RunnerInfo, chunk_tokens: int) -> Proposer | None:
    """Where drafts come from, by `config.speculate`. Loads the draft model: raises CheckpointError or ConfigError."""
    if config.speculate == "ngram":
        from workers.engine.ngram import NgramProposer

        return NgramProposer()
    if config.speculate == "draft":
        from workers.engine.draft import load_draft

        return load_draft(config, target, chunk_tokens)
    return None


def check_speculation(config: EngineConfig) -> None:
    """Raises ConfigError where the keys of speculation are out of bounds or contradict each other, or where the two
    models do; CheckpointError where one of those cannot be read."""
    if config.speculate not in ("none", "ngram", "draft"):
        raise ConfigError(f"speculate: {config.speculate!r} is not one of none, ngram, draft")
    if not 1 <= config.draft_tokens <= MAX_DRAFT_TOKENS:
        raise ConfigError(f"draft_tokens: {config.draft_tokens} is not within 1 and {MAX_DRAFT_TOKENS}")
    if config.speculate == "draft":
        if not config.draft_model_dir:
            raise ConfigError("speculate: draft needs draft_model_dir; or choose ngram, which needs no model")
        from workers.engine.draft import check_draft

        check_draft(config)


def step_sizes(config: EngineConfig) -> tuple[int, int]:
    """(sequences that run at once, rows of a step), from what is given; each at least 1, or ConfigError.

    Where both are given, a step may be too small for all running sequences and a prompt: prompts then wait until
    some have ended. A default is chosen so that this cannot happen.
    """
    for name in ("max_running", "chunk_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}: {value} is below 1")
    if config.max_running is None:
        chunk = config.chunk_tokens or DEFAULT_CHUNK_TOKENS
        return min(DEFAULT_MAX_RUNNING, max(1, chunk // 2)), chunk
    return config.max_running, config.chunk_tokens or max(DEFAULT_CHUNK_TOKENS, 2 * config.max_running)
