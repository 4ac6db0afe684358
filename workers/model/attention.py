"""Attention of one layer over the paged cache. T rows, H hidden, Hq and Hkv heads of D components."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.ops import Batch, KvCache, Linear, Ops
from workers.model.load import Loader
from workers.model.names import Names
from workers.model.norm import norm_weight
from workers.model.spec import Attention, ModelSpec
from workers.parallel.group import Group
from workers.parallel.layers import gather_heads

RopeTables = tuple[Tensor, Tensor] | tuple[None, None]  # cosines, sines


@dataclass(frozen=True, slots=True)
class FlatNorm:
    """RMSNorm over the components of all heads, wherever they are. `kv_holders`: ranks that hold one KV head."""

    group: Group
    kv_holders: int

    def __call__(self, ops: Ops, x: Tensor, weight: Tensor | None, eps: float, holders: int) -> Tensor:
        if self.group.size == 1:
            return ops.rms_norm(x, weight, eps)
        whole, width = gather_heads(x, self.group, holders), x.shape[1]
        begin = self.group.rank // holders * width
        return ops.rms_norm(whole, weight, eps)[:, begin : begin + width]


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Grouped-query attention. [T, H] -> [T, Hq D] -> [T, H]"""

    qkv: Linear  # rows of q, then k, then v
    out: Linear
    q_norm: Tensor | None  # [D]; of `flat`, of all ranks' heads
    k_norm: Tensor | None
    flat: FlatNorm | None
    sinks: Tensor | None  # float32 [Hq]
    heads: tuple[int, int]  # (Hq, Hkv) of this rank
    head_dim: int
    eps: float
    scale: float
    softcap: float | None
    group: int  # cache group of this layer
    slot: int  # its place within the group's cache
    window: int | None

    def mix(self, ops: Ops, x: Tensor, rope: RopeTables, batch: Batch, caches: list[KvCache]) -> Tensor:
        """Writes this step's keys and values and attends: [T, H] -> [T, Hq D], before the output projection."""
        cache, qkv, q_norm, k_norm = caches[self.group], self.qkv(x), self.q_norm, self.k_norm
        if self.flat is not None:
            q, k, v = qkv.split([self.heads[0] * self.head_dim, *(self.heads[1] * self.head_dim,) * 2], dim=1)
            q, k = self.flat(ops, q, q_norm, self.eps, 1), self.flat(ops, k, k_norm, self.eps, self.flat.kv_holders)
            qkv, q_norm, k_norm = torch.cat([q, k, v], dim=1), None, None
        q = ops.rope_write(qkv, self.heads, q_norm, k_norm, self.eps, *rope, cache, self.slot, batch, self.group)
        return ops.attend(
            q, cache, self.slot, batch, self.group, self.scale, self.window, sinks=self.sinks, softcap=self.softcap
        )


def load_attention(spec: ModelSpec, layer: int, load: Loader, names: Names) -> AttentionLayer:
    """Packs this rank's heads of one layer's attention."""
    a, prefix, share = spec.attention, names.layer(layer), load.share
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    sizes = [q, kv, kv] if len(names.qkv) > 1 else [q + 2 * kv]
    heads, kv_heads = share.even(a.heads), share.kv_heads(a)
    group = spec.layer_group[layer]
    flat = a.qk_norm == "flat"

    def qk_norm(name: str, size: int) -> Tensor | None:
        if a.qk_norm is None:
            return None
        return norm_weight(spec.norm, f"{prefix}.{name}.weight", size if flat else a.head_dim, load)

    return AttentionLayer(
        qkv=load.linear(
            [f"{prefix}.{name}" for name in names.qkv], sizes, spec.hidden, a.qkv_bias, names.transposed,
            _by_part(len(heads), a.head_dim) if names.qkv_by_head else None,
            None if share.size == 1 else _qkv_rows(a, heads, kv_heads, names),
        ),
        out=load.summed(
            f"{prefix}.{names.out}", spec.hidden, q, a.out_bias,
            [times(part, a.head_dim) for part in share.summed(a.heads)], names.transposed,
        ),
        q_norm=qk_norm(names.q_norm, q),
        k_norm=qk_norm(names.k_norm, kv),
        flat=FlatNorm(load.group, max(1, share.size // a.kv_heads)) if flat else None,
        sinks=load.wide.vector(f"{prefix}.{names.sinks}", a.heads, [heads]) if a.sinks else None,
        heads=(len(heads), len(kv_heads)),
        head_dim=a.head_dim,
        eps=spec.norm.eps,
        scale=a.head_dim**-0.5 if a.scale is None else a.scale,
        softcap=a.softcap,
        group=group,
        slot=spec.groups[group].layers.index(layer),
        window=spec.groups[group].window,
    )  # fmt: skip


def times(some: range, size: int) -> range:
    """The components of some heads."""
    return range(some.start * size, some.stop * size)


def _qkv_rows(a: Attention, heads: range, kv_heads: range, names: Names) -> list[list[range]]:
    """Which rows of each tensor are this rank's."""
    d = a.head_dim
    if names.qkv_by_head:
        return [[times(heads, 3 * d)]]
    rows = [times(heads, d), times(kv_heads, d), times(kv_heads, d)]
    if len(names.qkv) > 1:
        return [[some] for some in rows]
    begins = (0, a.heads * d, (a.heads + a.kv_heads) * d)
    return [[range(b + some.start, b + some.stop) for b, some in zip(begins, rows, strict=True)]]


def _by_part(heads: int, head_dim: int) -> Tensor:
    """Where the rows of q, k and v of each head lie when all of q comes first: [3 Hq D]"""
    return torch.arange(3 * heads * head_dim).view(heads, 3, head_dim).transpose(0, 1).flatten()
