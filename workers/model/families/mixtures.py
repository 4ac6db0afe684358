"""Mixtures of experts behind the attention of dense families: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE."""

from __future__ import annotations

from workers.model.families.features import (
    SILU,
    head_sizes,
    model_spec,
    read_rope,
    read_window,
    rms_norm,
    windows_by_type,
)
from workers.model.families.keys import Keys
from workers.model.spec import Attention, DenseFfn, ModelSpec, MoeFfn, Route


def top_k(keys: Keys, experts: int, default: int) -> int:
    """Experts per token."""
    chosen = keys.size("num_experts_per_tok", default)
    if chosen > experts:
        raise keys.fail(f"num_experts_per_tok is {chosen}, more than the {experts} experts")
    return chosen


def mixtral(keys: Keys) -> ModelSpec:
    attention, experts = Attention(*head_sizes(keys, 8)), keys.size("num_local_experts", 8)
    act = keys.word("hidden_act", SILU, "silu")
    moe = MoeFfn(keys.size("intermediate_size"), experts, Route(top_k(keys, experts, 2)), act, names="mixtral")
    return model_spec(
        keys,
        attention=attention,
        ffn=[moe] * keys.layers(),
        norm=rms_norm(keys, 1e-5),
        rope=read_rope(keys, attention.head_dim, 1e6),
        windows=[read_window(keys, None)] * keys.layers(),
    )


def qwen2_moe(keys: Keys) -> ModelSpec:
    attention = Attention(*head_sizes(keys, 16), qkv_bias=keys.get("qkv_bias", bool, True))
    experts = keys.size("num_experts", 60)
    moe = MoeFfn(
        keys.size("moe_intermediate_size", 1408),
        experts,
        _greedy(keys, experts, 4),
        keys.word("hidden_act", SILU, "silu"),
        shared=keys.size("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )
    window = read_window(keys, 4096) if keys.get("use_sliding_window", bool, False) else None
    below = keys.get("max_window_layers", int, 28)
    return model_spec(
        keys,
        attention=attention,
        ffn=_some_dense(keys, moe),
        norm=rms_norm(keys),
        rope=read_rope(keys, attention.head_dim),
        windows=windows_by_type(keys, window, [i % 2 == 0 and i < below for i in range(keys.layers())]),
    )


def qwen3_moe(keys: Keys) -> ModelSpec:
    bias = keys.get("attention_bias", bool, False)
    attention = Attention(*head_sizes(keys, 4), qkv_bias=bias, out_bias=bias, qk_norm="head")
    experts = keys.size("num_experts", keys.size("num_local_experts", 128))
    act = keys.word("hidden_act", SILU, "silu")
    moe = MoeFfn(keys.size("moe_intermediate_size", 768), experts, _greedy(keys, experts, 8), act)
    window = read_window(keys, 4096) if keys.get("use_sliding_window", bool, False) else None
    return model_spec(
        keys,
        attention=attention,
        ffn=_some_dense(keys, moe),
        norm=rms_norm(keys),
        rope=read_rope(keys, attention.head_dim),
        windows=[window] * keys.layers(),
    )


def olmoe(keys: Keys) -> ModelSpec:
    keys.only("clip_qkv", None)
    bias = keys.get("attention_bias", bool, False)
    attention = Attention(*head_sizes(keys), qkv_bias=bias, out_bias=bias, qk_norm="flat")
    experts = keys.size("num_experts", 64)
    act = keys.word("hidden_act", SILU, "silu")
    moe = MoeFfn(keys.size("intermediate_size"), experts, _greedy(keys, experts, 8), act)
    return model_spec(
        keys,
        attention=attention,
        ffn=[moe] * keys.layers(),
        norm=rms_norm(keys, 1e-5),
        rope=read_rope(keys, attention.head_dim),
    )


def _greedy(keys: Keys, experts: int, default: int) -> Route:
    return Route(top_k(keys, experts, default), renormalize=keys.get("norm_topk_prob", bool, False))


def _some_dense(keys: Keys, moe: MoeFfn) -> list[DenseFfn | MoeFfn]:
    """Experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""
    step, dense_layers = keys.size("decoder_sparse_step", 1), keys.get("mlp_only_layers", list, [])
    sparse = [i not in dense_layers and (i + 1) % step == 0 for i in range(keys.layers())]
    dense = None if all(sparse) else DenseFfn(keys.size("intermediate_size"), act=moe.act)
    return [moe if is_sparse or dense is None else dense for is_sparse in sparse]
