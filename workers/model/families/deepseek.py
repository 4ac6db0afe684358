"""DeepSeek-V2 (https://arxiv.org/abs/2405.04434) and DeepSeek-V3 (https://arxiv.org/abs/2412.19437), R1 included.

Both in the forms of their own repositories and of transformers. The layer for multi-token prediction that V3's files
carry behind the last one is not read.
"""

from __future__ import annotations

import math
from dataclasses import replace

from workers.model.families.features import SILU, model_spec, read_rope, rms_norm
from workers.model.families.keys import Keys
from workers.model.spec import Attention, DenseFfn, Latent, ModelSpec, MoeFfn, Rope, Route


def deepseek_v2(keys: Keys) -> ModelSpec:
    method = keys.get("topk_method", str, "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise keys.fail(f"topk_method is {method!r}; known are greedy, group_limited_greedy")
    keys.only("scoring_func", "softmax")
    # Where weights are renormalized, transformers scales them and the published code does not; no checkpoint does so.
    keys.only("norm_topk_prob", False)
    keys.only("mlp_bias", False)
    grouped = method != "greedy"
    route = Route(
        top_k=keys.size("num_experts_per_tok"),
        renormalize=False,
        groups=keys.size("n_group", 1) if grouped else 1,
        top_groups=keys.size("topk_group", 1) if grouped else 1,
        scale=keys.get("routed_scaling_factor", float, 1.0),
    )
    moe = _moe(keys, keys.size("n_routed_experts", 64), route, size=1407, shared=2)
    return _model(keys, moe, dense_layers=0, interleaved=True)


def deepseek_v3(keys: Keys) -> ModelSpec:
    keys.only("topk_method", "noaux_tc")
    keys.only("scoring_func", "sigmoid")
    route = Route(
        top_k=keys.size("num_experts_per_tok", 8),
        scoring="sigmoid",
        renormalize=keys.get("norm_topk_prob", bool, True),
        groups=keys.size("n_group", 8),
        top_groups=keys.size("topk_group", 4),
        group_score="top2",
        bias=True,
        scale=keys.get("routed_scaling_factor", float, 2.5),
    )
    moe = _moe(keys, keys.size("n_routed_experts", 256), route, size=2048, shared=1)
    return _model(keys, moe, dense_layers=3, interleaved=keys.get("rope_interleave", bool, True))


def _moe(keys: Keys, experts: int, route: Route, size: int, shared: int) -> MoeFfn:
    """`size` and `shared` are the family's defaults."""
    groups, top = route.groups, route.top_groups
    if experts % groups:
        raise keys.fail(f"n_group is {groups}, which does not divide the {experts} experts of n_routed_experts")
    each = experts // groups
    if top > groups:
        raise keys.fail(f"topk_group is {top}, more than the {groups} groups of n_group")
    if route.group_score == "top2" and each < 2:
        raise keys.fail(f"n_group is {groups}: a group has 1 expert, but groups are judged by their two best")
    if route.top_k > each * top:
        of = f"{top} group" + "s" * (top > 1)
        raise keys.fail(f"num_experts_per_tok is {route.top_k}, more than the {each * top} experts of {of}")
    keys.only("moe_layer_freq", 1)
    act, size = keys.word("hidden_act", SILU, "silu"), keys.size("moe_intermediate_size", size)
    both = size * keys.size("n_shared_experts", shared)
    return MoeFfn(size, experts, route, act, wide_gate=True, shared=both, names="deepseek")


def _model(keys: Keys, moe: MoeFfn, dense_layers: int, interleaved: bool) -> ModelSpec:
    """`dense_layers` is the family's default number of layers without experts, which come first."""
    layers, dense = keys.layers(), DenseFfn(keys.size("intermediate_size"), act=moe.act)
    first = min(keys.get("first_k_dense_replace", int, dense_layers), layers)
    size = keys.size("qk_rope_head_dim", 64)
    if size % 2:
        raise keys.fail(f"qk_rope_head_dim is {size}, must be even for rotary positions")
    rope = replace(read_rope(keys, size), dim=size, interleaved=interleaved)
    return model_spec(
        keys,
        attention=_attention(keys, rope, size),
        ffn=[dense if i < first else moe for i in range(layers)],
        norm=rms_norm(keys),
        rope=rope,
    )


def _attention(keys: Keys, rope: Rope, rope_dim: int) -> Attention:
    heads = keys.size("num_attention_heads")
    if (kv := keys.size("num_key_value_heads", heads)) != heads:
        raise keys.fail(f"num_key_value_heads is {kv}; latent attention has one for each of the {heads} heads")
    plain = "q_lora_rank" in keys and keys.raw("q_lora_rank") is None
    latent = Latent(
        rank=keys.size("kv_lora_rank", 512),
        rope_dim=rope_dim,
        nope_dim=keys.size("qk_nope_head_dim", 128),
        value_dim=keys.size("v_head_dim", 128),
        query_rank=None if plain else keys.size("q_lora_rank", 1536),
    )
    bias, size = keys.get("attention_bias", bool, False), latent.nope_dim + rope_dim
    return Attention(heads, heads, size, qkv_bias=bias, out_bias=bias, scale=_scale(size, rope), latent=latent)


def _scale(size: int, rope: Rope) -> float:
    """Of q . k: what YaRN multiplies queries and keys by (`mscale_all_dim`) is here, squared, and not in the tables."""
    scale = math.pow(size, -0.5)
    if rope.kind == "default" or not rope.mscale_all_dim or rope.factor <= 1:
        return scale
    return scale * (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1) ** 2
