"""From a configuration to an engine: loads the checkpoint, sizes the cache. Brings torch only when called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from understudy.errors import ConfigError
from workers.engine.contract import EngineConfig, EngineInfo

if TYPE_CHECKING:
    from workers.engine.core import EngineCore

DEFAULT_CHUNK_TOKENS = 512  # rows a step has at most: large enough to be bound by arithmetic, small enough to be short
DEFAULT_MAX_RUNNING = 64


def build_engine(config: EngineConfig, progress: Callable[[int, int], None] | None = None) -> EngineCore:
    """An engine over the checkpoint in `config.model_dir`. `progress` is told (bytes read, bytes in all).

    Raises CheckpointError (names the file) or ConfigError (names the key).
    """
    max_running, chunk_tokens = step_sizes(config)

    import numpy as np

    from workers.cache.manager import CacheManager
    from workers.engine.core import EngineCore
    from workers.engine.runner import Runner
    from workers.engine.sampler import SAMPLER_VERSION
    from workers.grammar.formats import CheckpointFormats
    from workers.kernels.ops import BLOCK

    runner = Runner.from_checkpoint(config, progress)
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
    )
    cache = CacheManager(its.blocks, its.windows, BLOCK, config.prefix_cache)
    formats = CheckpointFormats(Path(config.model_dir), its.vocab_size)
    return EngineCore(runner, info, cache, runner.ops, formats)


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
