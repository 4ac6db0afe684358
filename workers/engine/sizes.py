"""How large things are: the cache that fits beside a model, and the memory that is left."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

from understudy.errors import ConfigError
from workers.engine.contract import EngineConfig
from workers.experts.shelf import Shelf
from workers.kernels.ops import BLOCK, Ops
from workers.model.spec import ModelSpec
from workers.parallel.group import Group
from workers.parallel.share import ALONE as WHOLE
from workers.parallel.share import Share

DEFAULT_MAX_RUNNING = 64  # sequences that the default cache has room for, each with a full context
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.8}  # at most, of the memory left beside the weights, without `cache_bytes`
_SPARE = 4  # a rank has room for one more expert for so many of its own


def block_bytes(spec: ModelSpec, ops: Ops, share: Share = WHOLE) -> int:
    """Bytes of one block of every cache group together, at one rank."""
    a = share.attention(spec.attention)
    latent = a.latent.rank if a.latent else None
    return sum(ops.cache_block_bytes(len(g.layers), a.cache_heads, a.cache_dim, latent) for g in spec.groups)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the card, or of the machine within this control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    left = left_in_group(Path("/sys/fs/cgroup"))
    return available if left is None else min(available, left)


def left_in_group(group: Path) -> int | None:
    """Bytes that a control group (version 2) may still take; None where it has no limit.

    Pages of files count as free: the kernel only keeps them until somebody wants the memory, and after a first start
    they are the whole checkpoint.
    """
    limit, used = group / "memory.max", group / "memory.current"
    if not (limit.is_file() and used.is_file()) or (text := limit.read_text().strip()) == "max":
        return None
    counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    files = sum(int(counts[name]) for name in ("active_file", "inactive_file"))
    return max(0, int(text) - int(used.read_text()) + files)


def agreed(size: tuple[int, int], group: Group) -> tuple[int, int]:
    """The smallest (max_context, blocks) of all ranks."""
    said = [[int(n) for n in message.split()] for message in group.exchange(f"{size[0]} {size[1]}".encode())]
    return min(context for context, _ in said), min(blocks for _, blocks in said)


def cache_size(spec: ModelSpec, ops: Ops, config: EngineConfig, memory: int, share: Share = WHOLE) -> tuple[int, int]:
    """(max_context, blocks of each cache group) from what is given, the model and the bytes of `memory` left over.
    `cache_bytes` is that of all ranks together."""
    if config.max_context is not None and not 1 <= config.max_context <= spec.max_context:
        raise ConfigError(f"max_context: {config.max_context} is not within 1 and the model's {spec.max_context}")
    context = config.max_context or spec.max_context
    each = block_bytes(spec, ops, share)
    per_context = -(-context // BLOCK)
    if config.cache_bytes is not None:
        blocks = config.cache_bytes // share.size // each
        given = f"cache_bytes: {config.cache_bytes}"
    else:
        part = int(memory * CACHE_SHARE[torch.device(config.device).type])
        blocks = min(part // each, per_context * (config.max_running or DEFAULT_MAX_RUNNING))
        given = f"cache_bytes is not given, and the cache's share of the memory that is left, {part} bytes,"
    if blocks >= per_context:
        return context, blocks
    if config.max_context is not None or blocks < 1:
        raise ConfigError(
            f"{given} holds {max(0, blocks) * BLOCK} positions of {each // BLOCK} bytes, fewer than the context of "
            f"{context}; give at least {per_context * each} bytes or a smaller max_context"
        )
    return blocks * BLOCK, blocks


def spare_experts(shelf: Shelf, memory: int) -> int:
    """How many experts more than it has a rank may be given, of `memory` bytes that are left: so that some have a
    second home, and can move."""
    return max(0, min(-(-len(shelf.held) // _SPARE), memory // 2 // max(1, shelf.expert_bytes)))
