"""Readers of what several families say in the same words: heads, rotary positions, windows, sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from workers.model.families.keys import Keys
from workers.model.spec import (
    Activation,
    Attention,
    CacheGroup,
    DenseFfn,
    ModelSpec,
    MoeFfn,
    Norm,
    Rope,
)

Family = Callable[[Keys], ModelSpec]
Windows = Sequence[int | None]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
SILU: dict[str, Activation] = {"silu": "silu", "swish": "silu"}
ROPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
_DTYPES = ("float32", "bfloat16", "float16")


def model_spec(
    keys: Keys,
    *,
    attention: Attention,
    ffn: Sequence[DenseFfn | MoeFfn],
    norm: Norm,
    rope: Rope | Sequence[Rope | None] | None = None,
    windows: Windows | None = None,
    tie: bool = False,
    **more: Any,
) -> ModelSpec:
    """The spec of a family: its own features and what every config.json says. `tie` is the family's default."""
    layers, context = keys.layers(), keys.size("max_position_embeddings")
    ropes = (rope,) * layers if rope is None or isinstance(rope, Rope) else tuple(rope)
    stretch = next((r.factor for r in ropes if r is not None and r.kind == "dynamic"), 1.0)
    context = max(context, min(int(context * stretch), 1 << 31))
    seen = [None] * layers if windows is None else windows
    return ModelSpec(
        architecture=keys.architecture,
        dtype=_dtype(keys),
        vocab_size=keys.size("vocab_size"),
        hidden=keys.size("hidden_size"),
        layers=layers,
        max_context=context,
        norm=norm,
        tie_embeddings=keys.get("tie_word_embeddings", bool, tie),
        attention=attention,
        rope=ropes,
        ffn=tuple(ffn),
        groups=cache_groups([None if w is not None and w >= context else w for w in seen]),
        **more,
    )


def _dtype(keys: Keys) -> str:
    dtype = keys.get("dtype", str, keys.get("torch_dtype", str, "float32")).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise keys.fail(f"dtype is {dtype!r}; known are {', '.join(_DTYPES)}")
    return dtype


def cache_groups(windows: Windows) -> tuple[CacheGroup, ...]:
    """Layers of one window are one group, in the order of their first layer."""
    distinct = list(dict.fromkeys(windows))
    return tuple(CacheGroup(w, tuple(i for i, other in enumerate(windows) if other == w)) for w in distinct)


def head_sizes(
    keys: Keys, kv_heads: int | None = None, head_dim: int | None = None, even: bool = True
) -> tuple[int, int, int]:
    """(query heads, key-value heads, head size); the arguments are the family's defaults."""
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    kv = keys.size("num_key_value_heads", kv_heads or heads)
    if heads % kv:
        raise keys.fail(f"num_attention_heads is {heads}, not a multiple of num_key_value_heads, which is {kv}")
    if keys.raw("head_dim") is None and head_dim is None and hidden % heads:
        raise keys.fail(
            f"{keys.name('hidden_size')} is {hidden}, not a multiple of {keys.name('num_attention_heads')}, "
            f"which is {heads}"
        )
    size = keys.size("head_dim", head_dim or hidden // heads)
    if even and size % 2:
        raise keys.fail(f"head_dim is {size}, must be even for rotary positions")
    return heads, kv, size


def rms_norm(keys: Keys, eps: float = 1e-6, **more: Any) -> Norm:
    return Norm("rms", keys.get("rms_norm_eps", float, eps), **more)


def swiglu(keys: Keys, bias: bool = False) -> tuple[DenseFfn, ...]:
    """Gated by silu in every layer."""
    act = keys.word("hidden_act", SILU, "silu")
    return (DenseFfn(keys.size("intermediate_size"), bias, act),) * keys.layers()


# Rotary positions -----------------------------------------------------------------------------------------------------


def rope_values(keys: Keys, layer_type: str | None = None) -> Keys:
    """`rope_parameters` of transformers 5, for one type of layer where it has several, or `rope_scaling` of before."""
    new = keys.get("rope_parameters", dict, {})
    if not new:
        return Keys(keys.get("rope_scaling", dict, {}), f"{keys.path}: rope_scaling")
    if layer_type is not None and layer_type in new:
        nested = Keys(new, f"{keys.path}: rope_parameters")
        return Keys(nested.get(layer_type, dict, {}), f"{nested.path}: {layer_type}")
    return Keys(new, f"{keys.path}: rope_parameters")


def read_rope(
    keys: Keys, head_dim: int, theta: float = 10000.0, share: float | None = None, values: Keys | None = None
) -> Rope:
    """Rotary positions of heads of `head_dim`, with the family's default `theta`.

    `share` is the family's default part of a head that is rotated; None: this family rotates whole heads only.
    `values` are the parameters, where it is not `rope_values` that finds them.
    """
    values = rope_values(keys) if values is None else values
    kind = values.get("rope_type", str, values.get("type", str, "default"))
    if kind not in ROPES:
        raise values.fail(f"has type {kind!r}; known are {', '.join(ROPES)}")
    base = values.get("rope_theta", float, keys.get("rope_theta", float, theta))
    if base <= 0:
        raise keys.fail(f"rope_theta is {base}, must be above 0")
    dim = _rotated(keys, values, head_dim, share)
    rotated = dim or head_dim
    if kind == "default":
        return Rope(base, dim=dim)
    context = keys.size("max_position_embeddings")
    if kind == "dynamic":
        if rotated < 4:
            raise values.fail(f"has type 'dynamic', which needs 4 rotated components per head, not {rotated}")
        return Rope(base, kind, _factor(values), original_context=context, dim=dim)
    if kind == "linear":
        return Rope(base, kind, _factor(values), dim=dim)
    original = keys.size("original_max_position_embeddings", values.size("original_max_position_embeddings", context))
    if kind == "llama3":
        low, high = values.need("low_freq_factor", float), values.need("high_freq_factor", float)
        if not 0 < low < high:
            raise values.fail(f"low_freq_factor is {low} and high_freq_factor {high}; must be 0 < low < high")
        return Rope(base, kind, _factor(values), low, high, original, dim)
    if original < 2 or base <= 1:
        raise values.fail(
            f"type {kind!r} needs a rope_theta above 1 and an original_max_position_embeddings of 2 or more, "
            f"not {base} and {original}"
        )
    factor = values.positive("factor", context / original)
    attention_factor = values.maybe("attention_factor", float)
    if kind == "longrope":
        return Rope(
            base, kind, factor, original_context=original, dim=dim, attention_factor=attention_factor,
            short_factor=values.numbers("short_factor", rotated // 2),
            long_factor=values.numbers("long_factor", rotated // 2),
        )  # fmt: skip
    return Rope(
        base, kind, factor, original_context=original, dim=dim, attention_factor=attention_factor,
        beta_fast=values.positive("beta_fast", 32.0), beta_slow=values.positive("beta_slow", 1.0),
        truncate=values.get("truncate", bool, True),
        mscale=values.maybe("mscale", float), mscale_all_dim=values.maybe("mscale_all_dim", float),
    )  # fmt: skip


def _factor(values: Keys) -> float:
    factor = values.need("factor", float)
    if factor <= 0:
        raise values.fail(f"factor is {factor}, must be above 0")
    return factor


def _rotated(keys: Keys, values: Keys, head_dim: int, share: float | None) -> int | None:
    """Components that are rotated; None: all."""
    part = values.get("partial_rotary_factor", float, keys.get("partial_rotary_factor", float, share or 1.0))
    if share is None and part != 1.0:
        raise keys.fail(f"partial_rotary_factor is {part}; only 1.0 is known for this architecture")
    dim = int(head_dim * part)
    if not 2 <= dim <= head_dim or dim % 2:
        raise keys.fail(
            f"{keys.name('partial_rotary_factor')} is {part}, which rotates {dim} of a head's {head_dim} components; "
            "must be an even number of them"
        )
    return None if dim == head_dim else dim


# Windows --------------------------------------------------------------------------------------------------------------


def read_window(keys: Keys, default: int | None) -> int | None:
    """`sliding_window`: null means none, absent means the family's default."""
    if "sliding_window" in keys and keys.raw("sliding_window") is None:
        return None
    return keys.size("sliding_window") if "sliding_window" in keys else default


def windows_by_type(keys: Keys, window: int | None, slides: Sequence[bool]) -> Windows:
    """`layer_types` where given, else the family's default: in which layers the window slides."""
    layers, types = keys.layers(), keys.raw("layer_types")
    if types is None:
        return [window if sliding else None for sliding in slides]
    if not isinstance(types, list) or len(types) != layers:
        raise keys.fail(f"layer_types is {types!r}, must list one type for each of num_hidden_layers = {layers}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.fail(f"layer_types has {kind!r}; known are full_attention, sliding_attention")
    if window is None and "sliding_attention" in types:
        raise keys.fail("layer_types has 'sliding_attention', but no sliding_window is in use")
    return [window if kind == "sliding_attention" else None for kind in types]


def qwen_windows(keys: Keys, default: int) -> Windows:
    """Qwen's: full attention below `max_window_layers` and windows from there on."""
    window = read_window(keys, default) if keys.get("use_sliding_window", bool, False) else None
    first = keys.get("max_window_layers", int, 28)
    return windows_by_type(keys, window, [i >= first for i in range(keys.layers())])
