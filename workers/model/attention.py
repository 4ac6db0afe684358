"""Attention of one layer over the paged cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.kernels.ops import Batch, KvCache, Linear, Ops
from workers.model.load import Loader
from workers.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """Grouped-query attention with rotary positions. [T, H] -> [T, Hq D] -> [T, H]"""

    qkv: Linear  # rows of q, then k, then v
    out: Linear
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    heads: tuple[int, int]  # (Hq, Hkv)
    eps: float
    scale: float
    group: int  # cache group of this layer
    slot: int  # its place within the group's cache
    window: int | None

    def mix(self, ops: Ops, x: Tensor, rope: tuple[Tensor, Tensor], batch: Batch, caches: list[KvCache]) -> Tensor:
        """Writes this step's keys and values and attends: [T, H] -> [T, Hq D], before the output projection."""
        cache = caches[self.group]
        q = ops.rope_write(
            self.qkv(x), self.heads, self.q_norm, self.k_norm, self.eps, *rope, cache, self.slot, batch, self.group
        )
        return ops.attend(q, cache, self.slot, batch, self.group, self.scale, self.window)


def load_attention(spec: ModelSpec, layer: int, load: Loader) -> AttentionLayer:
    """Packs the attention of one layer from `model.layers.N.self_attn`."""
    a = spec.attention
    prefix = f"model.layers.{layer}.self_attn"
    q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    group = spec.layer_group[layer]
    return AttentionLayer(
        qkv=load.linear([f"{prefix}.{name}" for name in rows], list(rows.values()), spec.hidden, a.qkv_bias),
        out=load.linear([f"{prefix}.o_proj"], [spec.hidden], q, a.out_bias),
        q_norm=load.vector(f"{prefix}.q_norm.weight", a.head_dim) if a.qk_norm else None,
        k_norm=load.vector(f"{prefix}.k_norm.weight", a.head_dim) if a.qk_norm else None,
        heads=(a.heads, a.kv_heads),
        eps=spec.norm_eps,
        scale=a.head_dim**-0.5,
        group=group,
        slot=spec.groups[group].layers.index(layer),
        window=spec.groups[group].window,
    )
