"""The whole forward: rows of tokens in, logits of chosen rows out.

T rows of a step, S of them sampled, H hidden, V vocabulary. The residual stream stays in one tensor that
`add_rms_norm` updates in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.ops import Batch, KvCache, Linear, Ops
from workers.model.attention import AttentionLayer, load_attention
from workers.model.ffn import DenseLayer, MoeLayer, load_ffn
from workers.model.load import Loader
from workers.model.rope import rope_tables
from workers.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: Tensor  # [H]
    attention: AttentionLayer
    ffn_norm: Tensor  # [H]
    ffn: DenseLayer | MoeLayer


@dataclass(frozen=True, slots=True)
class Decoder:
    """A pre-norm decoder as its ModelSpec says."""

    spec: ModelSpec
    ops: Ops
    embedding: Tensor  # [V, H]
    layers: tuple[Layer, ...]
    norm: Tensor  # [H]
    head: Linear  # [V, H]
    rope: tuple[Tensor, Tensor]  # float32 [max_context, D / 2]

    @torch.inference_mode()
    def forward(self, ids: Tensor, batch: Batch, caches: list[KvCache], sampled: Tensor) -> Tensor:
        """ids: int64 [T]; caches: one per cache group; sampled: int64 [S], ascending -> logits [S, V]."""
        ops, eps = self.ops, self.spec.norm_eps
        residual = ops.embed(self.embedding, ids)
        x = ops.rms_norm(residual, self.layers[0].attention_norm, eps)
        for i, layer in enumerate(self.layers):
            x = layer.attention.mix(ops, x, self.rope, batch, caches)
            last = i + 1 == len(self.layers)
            if last and len(sampled) < len(ids):  # from here on only the rows that somebody wants
                if not len(sampled):
                    return x.new_zeros(0, self.spec.vocab_size)
                x, residual = x[sampled], residual[sampled]
            x = ops.add_rms_norm(layer.attention.out(x), residual, layer.ffn_norm, eps)
            x = layer.ffn(ops, x)
            x = ops.add_rms_norm(x, residual, self.norm if last else self.layers[i + 1].attention_norm, eps)
        return self.head(x)


def load_decoder(spec: ModelSpec, load: Loader, ops: Ops, max_context: int, device: torch.device) -> Decoder:
    """Packs every weight. Raises CheckpointError that names the file and the tensor."""

    def layer(i: int) -> Layer:
        prefix = f"model.layers.{i}"
        return Layer(
            attention_norm=load.vector(f"{prefix}.input_layernorm.weight", spec.hidden),
            attention=load_attention(spec, i, load),
            ffn_norm=load.vector(f"{prefix}.post_attention_layernorm.weight", spec.hidden),
            ffn=load_ffn(spec, i, load),
        )

    embedding = load.table("model.embed_tokens.weight", spec.vocab_size, spec.hidden)
    cos, sin = rope_tables(spec.rope, spec.attention.head_dim, max_context)
    return Decoder(
        spec=spec,
        ops=ops,
        embedding=embedding,
        layers=tuple(layer(i) for i in range(spec.layers)),
        norm=load.vector("model.norm.weight", spec.hidden),
        head=ops.linear(embedding)
        if spec.tie_embeddings
        else load.linear(["lm_head"], [spec.vocab_size], spec.hidden, bias=False),
        rope=(cos.to(device), sin.to(device)),
    )
