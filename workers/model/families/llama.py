"""Llama and those that differ from it in a few words: Mistral, Qwen2, Qwen3, Phi-3, OLMo 2, SmolLM3."""

from __future__ import annotations

from workers.model.families.features import (
    head_sizes,
    model_spec,
    qwen_windows,
    read_rope,
    read_window,
    rms_norm,
    rope_values,
    swiglu,
    windows_by_type,
)
from workers.model.families.keys import Keys
from workers.model.spec import Attention, Block, ModelSpec


def llama(keys: Keys) -> ModelSpec:
    bias = keys.get("attention_bias", bool, False)
    attention = Attention(*head_sizes(keys), qkv_bias=bias, out_bias=bias)
    return model_spec(
        keys,
        attention=attention,
        ffn=swiglu(keys, keys.get("mlp_bias", bool, False)),
        norm=rms_norm(keys),
        rope=read_rope(keys, attention.head_dim),
    )


def mistral(keys: Keys) -> ModelSpec:
    attention = Attention(*head_sizes(keys, 8))
    rope = read_rope(keys, attention.head_dim)
    windows = [read_window(keys, 4096)] * keys.layers()
    return model_spec(keys, attention=attention, ffn=swiglu(keys), norm=rms_norm(keys), rope=rope, windows=windows)


def qwen2(keys: Keys) -> ModelSpec:
    attention = Attention(*head_sizes(keys, 32), qkv_bias=True)
    rope, windows = read_rope(keys, attention.head_dim), qwen_windows(keys, 4096)
    return model_spec(keys, attention=attention, ffn=swiglu(keys), norm=rms_norm(keys), rope=rope, windows=windows)


def qwen3(keys: Keys) -> ModelSpec:
    bias = keys.get("attention_bias", bool, False)
    attention = Attention(*head_sizes(keys, 32, 128), qkv_bias=bias, out_bias=bias, qk_norm="head")
    rope, windows = read_rope(keys, attention.head_dim), qwen_windows(keys, 4096)
    return model_spec(keys, attention=attention, ffn=swiglu(keys), norm=rms_norm(keys), rope=rope, windows=windows)


def phi3(keys: Keys) -> ModelSpec:
    attention = Attention(*head_sizes(keys))
    values = rope_values(keys)
    kind = values.get("rope_type", str, values.get("type", str, "default"))
    if kind in ("su", "yarn"):  # what this family's first files call it
        values = Keys(dict(values.data) | {"rope_type": "longrope"}, values.path)
    return model_spec(
        keys,
        attention=attention,
        ffn=swiglu(keys),
        norm=rms_norm(keys, 1e-5),
        rope=read_rope(keys, attention.head_dim, share=1.0, values=values),
        windows=[read_window(keys, None)] * keys.layers(),
        names="phi3",
    )


def olmo2(keys: Keys) -> ModelSpec:
    bias = keys.get("attention_bias", bool, False)
    attention = Attention(*head_sizes(keys), qkv_bias=bias, out_bias=bias, qk_norm="flat")
    return model_spec(
        keys,
        attention=attention,
        ffn=swiglu(keys),
        norm=rms_norm(keys, 1e-5, wide=True),
        rope=read_rope(keys, attention.head_dim),
        block=Block("after"),
        names="olmo2",
    )


def smollm3(keys: Keys) -> ModelSpec:
    """`no_rope_layers` says 1 for a layer that has rotary positions, 0 for one that has none."""
    layers, bias = keys.layers(), keys.get("attention_bias", bool, False)
    attention = Attention(*head_sizes(keys, 4), qkv_bias=bias, out_bias=bias)
    every = keys.size("no_rope_layer_interval", 4)
    turned = keys.get("no_rope_layers", list, [int((i + 1) % every != 0) for i in range(layers)])
    if len(turned) != layers or any(value not in (0, 1) for value in turned):
        raise keys.fail(f"no_rope_layers is {turned!r}, must list 0 or 1 for each of num_hidden_layers = {layers}")
    rope = read_rope(keys, attention.head_dim, 2e6)
    window = read_window(keys, None) if keys.get("use_sliding_window", bool, False) else None
    return model_spec(
        keys,
        attention=attention,
        ffn=swiglu(keys, keys.get("mlp_bias", bool, False)),
        norm=rms_norm(keys),
        rope=[rope if value else None for value in turned],
        windows=windows_by_type(keys, window, [not value for value in turned]),
        tie=True,
    )
