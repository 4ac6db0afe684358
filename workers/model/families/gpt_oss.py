"""gpt-oss (https://arxiv.org/abs/2508.10925): attention sinks, windows in every other layer, clamped experts."""

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
from workers.model.families.mixtures import top_k
from workers.model.spec import Attention, ModelSpec, MoeFfn, Route


def gpt_oss(keys: Keys) -> ModelSpec:
    keys.only("swiglu_alpha", 1.702)
    keys.only("swiglu_limit", 7.0)
    keys.word("hidden_act", SILU, "silu")
    bias, experts = keys.get("attention_bias", bool, True), keys.size("num_local_experts", 128)
    attention = Attention(*head_sizes(keys, 8, 64), qkv_bias=bias, out_bias=bias, sinks=True)
    moe = MoeFfn(
        keys.size("intermediate_size"),
        experts,
        Route(top_k(keys, experts, 4), scoring="chosen_softmax"),
        act="clamped",
        bias=True,
        gate_bias=True,
        names="gpt_oss",
    )
    return model_spec(
        keys,
        attention=attention,
        ffn=[moe] * keys.layers(),
        norm=rms_norm(keys, 1e-5, wide=True),
        rope=read_rope(keys, attention.head_dim, 150000.0),
        windows=windows_by_type(keys, read_window(keys, 128), [i % 2 == 0 for i in range(keys.layers())]),
    )
