"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434) with absorbed projections.

Keys and values of all heads are linear in one latent vector c per position: k_h = [U_h c | r], v_h = V_h c, where r is
a rotated key that the heads share. So q_h . k_h = (U_h^T q_h) . c + (rotated part) . r, and the weighted sum of values
is V_h times the weighted sum of latents: attention runs over the latents as if they were one head of keys, whose first
components are its values, and nothing is ever expanded. Section 2.1.2 of the paper.

T rows, H hidden, Hq heads; N (nope_dim), R (rope_dim), V (value_dim) and L (rank) as in `spec.Latent`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.ops import Batch, KvCache, Linear, Ops
from workers.model.attention import times
from workers.model.load import Loader
from workers.model.spec import Latent, ModelSpec

EPS = 1e-6  # of the norms inside; `rms_norm_eps` is not theirs in the published code


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """[T, H] -> [T, Hq V] -> [T, H]"""

    first: Linear  # H -> query (or its latent) | latent L | shared key R
    query: Linear | None  # query latent -> Hq N | Hq R
    query_norm: Tensor | None
    latent_norm: Tensor  # [L]
    absorb: Linear  # Hq N -> Hq L, head by head
    values: Linear  # Hq L -> Hq V, head by head
    out: Linear
    heads: int  # of this rank
    latent: Latent
    group: int  # cache group of this layer
    slot: int  # its place within the group's cache
    scale: float

    def mix(self, ops: Ops, x: Tensor, rope: tuple[Tensor, Tensor], batch: Batch, caches: list[KvCache]) -> Tensor:
        """Writes this step's latents and attends: [T, H] -> [T, Hq V], before the output projection."""
        t, m, cache = x.shape[0], self.latent, caches[self.group]
        first = self.first(x)
        query, latent, key = first.split([first.shape[1] - m.rank - m.rope_dim, m.rank, m.rope_dim], dim=1)
        if self.query is not None:
            query = self.query(ops.rms_norm(query, self.query_norm, EPS))
        still, turned = query.split([self.heads * m.nope_dim, self.heads * m.rope_dim], dim=1)
        turned = ops.latent_write(
            turned.reshape(t, self.heads, m.rope_dim), key, ops.rms_norm(latent, self.latent_norm, EPS),
            *rope, cache, self.slot, batch, self.group,
        )  # fmt: skip
        query = torch.cat([self.absorb(still).view(t, self.heads, m.rank), turned], dim=2)
        return self.values(ops.attend(query, cache, self.slot, batch, self.group, self.scale, None))


def load_latent(spec: ModelSpec, layer: int, load: Loader) -> LatentAttention:
    """Packs `model.layers.N.self_attn`: rows of queries regrouped by what happens to them, pairs turned to halves."""
    a, m = spec.attention, spec.attention.latent
    assert m is not None
    prefix = f"model.layers.{layer}.self_attn"
    rope = spec.rope[layer]
    halves = _halves(m.rope_dim, rope is not None and rope.interleaved)
    heads, width = load.share.even(a.heads), a.heads * (m.nope_dim + m.rope_dim)
    rows, mine = _query_rows(len(heads), m, halves), [times(heads, m.nope_dim + m.rope_dim)]
    if m.query_rank is None:
        q_proj = load.rows(f"{prefix}.q_proj.weight", width, spec.hidden, rows=mine)
        first, query, query_norm = [q_proj[rows]], None, None
    else:
        first = [load.tensor(f"{prefix}.q_a_proj.weight", m.query_rank, spec.hidden)]
        query = load.ops.linear(load.rows(f"{prefix}.q_b_proj.weight", width, m.query_rank, rows=mine)[rows])
        query_norm = load.vector(f"{prefix}.q_a_layernorm.weight", m.query_rank)
    key_rows = torch.cat([torch.arange(m.rank), m.rank + halves])
    first.append(load.tensor(f"{prefix}.kv_a_proj_with_mqa.weight", m.rank + m.rope_dim, spec.hidden)[key_rows])
    bias = _first_bias(load, prefix, m, len(first[0]), key_rows) if a.qkv_bias else None
    both = m.nope_dim + m.value_dim
    up = load.rows(f"{prefix}.kv_b_proj.weight", a.heads * both, m.rank, rows=[times(heads, both)])
    keys, values = up.view(len(heads), -1, m.rank).split([m.nope_dim, m.value_dim], dim=1)
    group = spec.layer_group[layer]
    return LatentAttention(
        first=load.ops.linear(torch.cat(first), bias),
        query=query,
        query_norm=query_norm,
        latent_norm=load.vector(f"{prefix}.kv_a_layernorm.weight", m.rank),
        absorb=load.ops.per_head([key.T for key in keys]),
        values=load.ops.per_head(values.unbind(0)),
        out=load.summed(
            f"{prefix}.o_proj", spec.hidden, a.heads * m.value_dim, a.out_bias,
            [times(part, m.value_dim) for part in load.share.summed(a.heads)],
        ),
        heads=len(heads),
        latent=m,
        group=group,
        slot=spec.groups[group].layers.index(layer),
        scale=a.head_dim**-0.5 if a.scale is None else a.scale,
    )  # fmt: skip


def _halves(size: int, interleaved: bool) -> Tensor:
    """Where the rows of pairs (2i, 2i + 1) lie as pairs (i, i + size / 2)."""
    rows = torch.arange(size)
    return torch.cat([rows[0::2], rows[1::2]]) if interleaved else rows


def _query_rows(heads: int, m: Latent, halves: Tensor) -> Tensor:
    """Rows of a query projection, [N | R] head by head on disk: all heads' N first, then all heads' R."""
    begins = torch.arange(heads)[:, None] * (m.nope_dim + m.rope_dim)
    return torch.cat([(begins + torch.arange(m.nope_dim)).flatten(), (begins + m.nope_dim + halves).flatten()])


def _first_bias(load: Loader, prefix: str, m: Latent, query_rows: int, key_rows: Tensor) -> Tensor:
    """`q_proj` has no bias where the others have one."""
    key = load.tensor(f"{prefix}.kv_a_proj_with_mqa.bias", m.rank + m.rope_dim)[key_rows]
    query = key.new_zeros(query_rows) if m.query_rank is None else load.tensor(f"{prefix}.q_a_proj.bias", query_rows)
    return torch.cat([query, key])
