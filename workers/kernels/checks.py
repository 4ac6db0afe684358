"""What every implementation of the operations refuses, in the same words."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.model.spec import Route

if TYPE_CHECKING:
    from workers.kernels.ops import KvCache

ACTS = ("silu", "gelu", "gelu_tanh", "relu")
GATED = (*ACTS, "clamped")


def known_act(act: str, names: tuple[str, ...]) -> None:
    """Raises ValueError for an activation that is none of `names`."""
    if act not in names:
        raise ValueError(f"act is {act!r}; it must be one of {', '.join(names)}")


def check_route(route: Route, experts: int, bias: Tensor | None) -> None:
    """Raises ValueError where `experts` logits cannot be routed so."""
    groups = route.groups
    if groups < 1 or experts % groups or not 1 <= route.top_groups <= groups:
        raise ValueError(
            f"{experts} experts in {groups} groups, the best {route.top_groups} of them open: groups must be equal, "
            f"and 1 .. {groups} open"
        )
    among = experts // groups * route.top_groups if groups > 1 else experts
    if not 1 <= route.top_k <= among:
        raise ValueError(f"a token goes to 1 .. {among} of {experts} experts, not {route.top_k}")
    if route.bias != (bias is not None):
        raise ValueError(f"route.bias is {route.bias}, but a bias is {'missing' if bias is None else 'given'}")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (experts,)):
        raise ValueError(f"the bias is {bias.dtype} {tuple(bias.shape)}; float32 ({experts},) is wanted")


def check_slots(slots: Tensor, weights: Tensor, dtype: torch.dtype) -> None:
    """Raises ValueError where `Ops.combine` cannot add these."""
    if slots.dim() != 3 or slots.dtype is not dtype or weights.shape != slots.shape[:2]:
        raise ValueError(
            f"slots are {dtype} [T, k, H] with weights [T, k], not {slots.dtype} {list(slots.shape)} with "
            f"{list(weights.shape)}"
        )
    if weights.dtype is not torch.float32:
        raise ValueError(f"the weights of slots are float32, not {weights.dtype}")


def check_latent(kv_heads: int, head_dim: int, latent: int | None) -> None:
    """Raises ValueError where a latent cache is asked for with sizes that it cannot have."""
    if latent is not None and not (kv_heads == 1 and 1 <= latent <= head_dim):
        raise ValueError(
            f"a latent cache has 1 KV head and a latent of 1 .. head_dim components, not {kv_heads} heads and "
            f"{latent} of {head_dim}"
        )


def check_values(
    blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64], cache: KvCache
) -> None:
    """Raises ValueError where values would be copied to or from places that are not theirs."""
    for name, x, dtype, shape in (
        ("blocks", blocks, np.int64, (len(blocks),)),
        ("offsets", offsets, np.int64, (len(blocks), cache.kv_heads)),
        ("memory", memory, np.uint8, (memory.size,)),
    ):
        if x.dtype != dtype or x.shape != shape or not x.flags.c_contiguous:
            raise ValueError(f"{name} is {x.dtype} {x.shape}; a contiguous {np.dtype(dtype)} {shape} is wanted")
    if not len(blocks):
        return
    if blocks.min() < 0 or blocks.max() >= cache.blocks:
        raise ValueError(f"blocks {blocks.min()} .. {blocks.max()} of a cache of {cache.blocks}")
    last = memory.size - cache.value_bytes
    if offsets.min() < 0 or offsets.max() > last or (offsets % 16).any() or memory.ctypes.data % 16:
        raise ValueError(
            f"offsets {offsets.min()} .. {offsets.max()}: values of {cache.value_bytes} bytes begin at multiples of "
            f"16 in 0 .. {last}"
        )
