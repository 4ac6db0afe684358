"""Gemma 2 and Gemma 3 (text): unit norms on both sides of each half, GeGLU, windows in most layers."""

from __future__ import annotations

from typing import Literal

from workers.model.families.features import (
    ACTIVATIONS,
    head_sizes,
    model_spec,
    read_rope,
    read_window,
    rms_norm,
    rope_values,
    windows_by_type,
)
from workers.model.families.keys import Keys
from workers.model.spec import Attention, Block, DenseFfn, ModelSpec, Rope


def gemma2(keys: Keys) -> ModelSpec:
    rope = read_rope(keys, head_sizes(keys, 4, 256)[2])
    slides = [i % 2 == 0 for i in range(keys.layers())]
    return _gemma(keys, None, [rope] * keys.layers(), slides, (50.0, 30.0))


def gemma3(keys: Keys) -> ModelSpec:
    """Layers with a window have rotary positions of their own, never scaled."""
    layers = keys.layers()
    every = keys.size("sliding_window_pattern", keys.size("_sliding_window_pattern", 6))
    slides = [(i + 1) % every != 0 for i in range(layers)]
    windows = windows_by_type(keys, keys.size("sliding_window", 4096), slides)
    size, values = head_sizes(keys, 4, 256)[2], rope_values(keys, "full_attention")
    far = read_rope(keys, size, 1e6, values=values)
    local = rope_values(keys, "sliding_attention")
    if local.path == values.path:  # one set of parameters: that of the layers that see everything
        near = Rope(keys.positive("rope_local_base_freq", 10000.0))
    else:
        theta = keys.positive("rope_local_base_freq", local.positive("rope_theta", 10000.0))
        near = read_rope(keys, size, values=Keys({"rope_theta": theta} | dict(local.data), local.path))
    ropes = [far if window is None else near for window in windows]
    return _gemma(keys, "head", ropes, slides, (None, None))


def _gemma(
    keys: Keys,
    qk_norm: Literal["head"] | None,
    ropes: list[Rope],
    slides: list[bool],
    caps: tuple[float | None, float | None],
) -> ModelSpec:
    """`caps` are the family's defaults: of attention's scores and of the logits."""
    keys.only("use_bidirectional_attention", False)
    bias, hidden = keys.get("attention_bias", bool, False), keys.size("hidden_size")
    softcap, final = (
        _cap(keys, f"{of}_logit_softcapping", cap) for of, cap in zip(("attn", "final"), caps, strict=True)
    )
    attention = Attention(
        *head_sizes(keys, 4, 256),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=qk_norm,
        scale=keys.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        softcap=None if qk_norm else softcap,  # Gemma 3's reference has the key and does not apply it
    )
    name = "hidden_activation" if keys.raw("hidden_activation") is not None else "hidden_act"
    act = keys.word(name, ACTIVATIONS, "gelu_pytorch_tanh")
    return model_spec(
        keys,
        attention=attention,
        ffn=[DenseFfn(keys.size("intermediate_size"), act=act)] * keys.layers(),
        norm=rms_norm(keys, unit=True, wide=True),
        rope=ropes,
        windows=windows_by_type(keys, read_window(keys, 4096), slides),
        tie=True,
        block=Block("sandwich"),
        embed_scale=hidden**0.5,
        final_softcap=final,
        names="gemma",
    )


def _cap(keys: Keys, name: str, default: float | None) -> float | None:
    cap = keys.maybe(name, float) if name in keys else default
    if cap is not None and cap <= 0:
        raise keys.fail(f"{name} is {cap}, must be above 0, or null for none")
    return cap
