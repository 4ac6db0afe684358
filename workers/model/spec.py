"""A Hugging Face `config.json` becomes one frozen ModelSpec: a vocabulary of features, not a class per family.

Reads both forms of the keys: transformers 5 (`rope_parameters`, `dtype`, `layer_types`) and before (`rope_theta`,
`rope_scaling`, `torch_dtype`). Where a key may be absent, the default is that of the family's configuration class.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from understudy.errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions. `kind` is default, linear (all wavelengths times `factor`) or llama3.

    llama3 stretches wavelengths longer than `original_context / low_freq_factor` by `factor`, leaves those shorter
    than `original_context / high_freq_factor`, and interpolates between (Llama 3.1).
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention: `heads` query heads share `kv_heads` heads of keys and values."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head, before the rotation


@dataclass(frozen=True, slots=True)
class DenseFfn:
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    size: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class MoeFfn:
    """A softmax gate over `experts` SwiGLU experts; the `top_k` likeliest are added by weight.

    `renormalize` makes the weights of the chosen ones sum to 1. `block` and `parts` are the tensors' names:
    `{block}.gate.weight`, `{block}.experts.{e}.{part}.weight` for the parts gate, up, down.
    """

    size: int
    experts: int
    top_k: int
    renormalize: bool
    block: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose cached positions live and die together: those with the same window (None: everything)."""

    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What a decoder has to know. Sizes in elements; `dtype` float32, bfloat16 or float16 is the checkpoint's."""

    architecture: str
    dtype: str
    vocab_size: int
    hidden: int
    layers: int
    max_context: int
    norm_eps: float
    tie_embeddings: bool
    attention: Attention
    rope: Rope
    ffn: tuple[DenseFfn | MoeFfn, ...]  # one per layer
    groups: tuple[CacheGroup, ...]

    @property
    def layer_group(self) -> tuple[int, ...]:
        """The index into `groups` of each layer."""
        return tuple(next(g for g, group in enumerate(self.groups) if i in group.layers) for i in range(self.layers))


class _Keys:
    """Typed access to the keys of one config.json; every error names the file, the key and the value."""

    def __init__(self, data: Mapping[str, Any], path: str) -> None:
        self.data, self.path = data, path

    def fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {message}")

    def need(self, key: str, kind: type[T]) -> T:
        if self.data.get(key) is None:
            raise self.fail(f"{key} is missing")
        return self._typed(key, self.data[key], kind)

    def get(self, key: str, kind: type[T], default: T) -> T:
        """The default stands in for an absent key and for null."""
        value = self.data.get(key)
        return default if value is None else self._typed(key, value, kind)

    def size(self, key: str, default: int | None = None, most: int = 1 << 31) -> int:
        value = self.need(key, int) if default is None else self.get(key, int, default)
        if not 1 <= value <= most:
            raise self.fail(f"{key} is {value}, must be within 1 and {most}")
        return value

    def layers(self) -> int:
        return self.size("num_hidden_layers", most=10_000)

    def _typed(self, key: str, value: Any, kind: type[T]) -> T:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 1 << 1000 else math.inf
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.fail(f"{key} is {value!r}, must be of type {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.fail(f"{key} is {value}, must be finite")
        return value


def _head_sizes(keys: _Keys, kv_heads: int | None = None, head_dim: int | None = None) -> tuple[int, int, int]:
    """(query heads, key-value heads, head size); the arguments are the family's defaults."""
    hidden, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    kv = keys.size("num_key_value_heads", kv_heads or heads)
    if heads % kv:
        raise keys.fail(f"num_attention_heads is {heads}, not a multiple of num_key_value_heads, which is {kv}")
    if keys.data.get("head_dim") is None and head_dim is None and hidden % heads:
        raise keys.fail(f"hidden_size is {hidden}, not a multiple of num_attention_heads, which is {heads}")
    size = keys.size("head_dim", head_dim or hidden // heads)
    if size % 2:
        raise keys.fail(f"head_dim is {size}, must be even for rotary positions")
    return heads, kv, size


def _rope(keys: _Keys, theta: float = 10000.0) -> Rope:
    new = keys.get("rope_parameters", dict, {})
    given = new or keys.get("rope_scaling", dict, {})
    where = "rope_parameters" if new else "rope_scaling"
    values = _Keys(given, f"{keys.path}: {where}")
    kind = values.get("rope_type", str, values.get("type", str, "default"))
    if kind not in ("default", "linear", "llama3"):
        raise keys.fail(f"{where} has type {kind!r}; known are default, linear, llama3")
    share = values.get("partial_rotary_factor", float, keys.get("partial_rotary_factor", float, 1.0))
    if share != 1.0:
        raise keys.fail(f"partial_rotary_factor is {share}; only 1.0 is known for this architecture")
    base = values.get("rope_theta", float, keys.get("rope_theta", float, theta))
    if base <= 0:
        raise keys.fail(f"rope_theta is {base}, must be above 0")
    if kind == "default":
        return Rope(base)
    factor = values.need("factor", float)
    if factor <= 0:
        raise values.fail(f"factor is {factor}, must be above 0")
    if kind == "linear":
        return Rope(base, kind, factor)
    low, high = values.need("low_freq_factor", float), values.need("high_freq_factor", float)
    if not 0 < low < high:
        raise values.fail(f"low_freq_factor is {low} and high_freq_factor {high}; must be 0 < low < high")
    original = values.size("original_max_position_embeddings", keys.size("max_position_embeddings"))
    return Rope(base, kind, factor, low, high, original)


def _dense(keys: _Keys, bias: bool = False) -> tuple[DenseFfn | MoeFfn, ...]:
    return (DenseFfn(keys.size("intermediate_size"), bias),) * keys.layers()


def _top_k(keys: _Keys, experts: int, default: int) -> int:
    top_k = keys.size("num_experts_per_tok", default)
    if top_k > experts:
        raise keys.fail(f"num_experts_per_tok is {top_k}, more than the {experts} experts")
    return top_k


Windows = list[int | None]
Features = tuple[Attention, Rope, tuple[DenseFfn | MoeFfn, ...], Windows]


def _window(keys: _Keys, default: int | None) -> int | None:
    """`sliding_window`: null means none, absent means the family's default."""
    if "sliding_window" in keys.data and keys.data["sliding_window"] is None:
        return None
    return keys.size("sliding_window") if "sliding_window" in keys.data else default


def _windows_by_layer(keys: _Keys, default: int) -> Windows:
    """Qwen's: `layer_types` where given, else full attention below `max_window_layers` and windows from there on."""
    layers = keys.layers()
    window = _window(keys, default) if keys.get("use_sliding_window", bool, False) else None
    types = keys.data.get("layer_types")
    if types is None:
        first = keys.get("max_window_layers", int, 28)
        return [window if i >= first else None for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers:
        raise keys.fail(f"layer_types is {types!r}, must list one type for each of num_hidden_layers = {layers}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise keys.fail(f"layer_types has {kind!r}; known are full_attention, sliding_attention")
    if window is None and "sliding_attention" in types:
        raise keys.fail("layer_types has 'sliding_attention', but no sliding_window is in use")
    return [window if kind == "sliding_attention" else None for kind in types]


def _llama(keys: _Keys) -> Features:
    bias = keys.get("attention_bias", bool, False)
    attention = Attention(*_head_sizes(keys), qkv_bias=bias, out_bias=bias)
    windows: Windows = [None] * keys.layers()
    return attention, _rope(keys), _dense(keys, keys.get("mlp_bias", bool, False)), windows


def _mistral(keys: _Keys) -> Features:
    windows = [_window(keys, 4096)] * keys.layers()
    return Attention(*_head_sizes(keys, 8)), _rope(keys), _dense(keys), windows


def _qwen2(keys: _Keys) -> Features:
    attention = Attention(*_head_sizes(keys, 32), qkv_bias=True)
    return attention, _rope(keys), _dense(keys), _windows_by_layer(keys, 4096)


def _qwen3(keys: _Keys) -> Features:
    bias = keys.get("attention_bias", bool, False)
    attention = Attention(*_head_sizes(keys, 32, 128), qkv_bias=bias, out_bias=bias, qk_norm=True)
    return attention, _rope(keys), _dense(keys), _windows_by_layer(keys, 4096)


def _mixtral(keys: _Keys) -> Features:
    experts = keys.size("num_local_experts", 8)
    names = ("block_sparse_moe", ("w1", "w3", "w2"))
    moe = MoeFfn(keys.size("intermediate_size"), experts, _top_k(keys, experts, 2), True, *names)
    layers = keys.layers()
    return Attention(*_head_sizes(keys, 8)), _rope(keys, 1e6), (moe,) * layers, [_window(keys, None)] * layers


def _qwen3_moe(keys: _Keys) -> Features:
    layers = keys.layers()
    bias = keys.get("attention_bias", bool, False)
    attention = Attention(*_head_sizes(keys, 4), qkv_bias=bias, out_bias=bias, qk_norm=True)
    experts = keys.size("num_experts", keys.size("num_local_experts", 128))
    renormalize = keys.get("norm_topk_prob", bool, False)
    moe = MoeFfn(keys.size("moe_intermediate_size", 768), experts, _top_k(keys, experts, 8), renormalize)
    step = keys.size("decoder_sparse_step", 1)
    dense_layers = keys.get("mlp_only_layers", list, [])
    sparse = [i not in dense_layers and (i + 1) % step == 0 for i in range(layers)]
    dense = None if all(sparse) else DenseFfn(keys.size("intermediate_size"))
    ffn = tuple(moe if is_sparse or dense is None else dense for is_sparse in sparse)
    window = _window(keys, 4096) if keys.get("use_sliding_window", bool, False) else None
    return attention, _rope(keys), ffn, [window] * layers


_FAMILIES: dict[str, Callable[[_Keys], Features]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "MixtralForCausalLM": _mixtral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
}
ARCHITECTURES = tuple(_FAMILIES)
_EPS = {"MixtralForCausalLM": 1e-5}
_DTYPES = ("float32", "bfloat16", "float16")


def parse_config(config: Mapping[str, Any], path: str = "config.json") -> ModelSpec:
    """The spec that a `config.json` means. `path` is for the errors.

    Raises CheckpointError for an architecture, a feature or a value that is unknown, missing or contradictory.
    """
    keys = _Keys(config, path)
    names = keys.get("architectures", list, [])
    architecture = next((name for name in names if isinstance(name, str) and name in _FAMILIES), None)
    if architecture is None:
        said = ", ".join(map(repr, names)) or "missing"
        raise keys.fail(f"architectures is {said}; known are {', '.join(_FAMILIES)}")
    if config.get("quantization_config"):
        method = keys.need("quantization_config", dict).get("quant_method", "unnamed")
        raise keys.fail(f"quantization_config: weights quantized by {method!r} are not read; use a 16-bit checkpoint")
    activation = keys.get("hidden_act", str, "silu")
    if activation not in ("silu", "swish"):
        raise keys.fail(f"hidden_act is {activation!r}; known is silu")
    attention, rope, ffn, windows = _FAMILIES[architecture](keys)
    context = keys.size("max_position_embeddings")
    return ModelSpec(
        architecture=architecture,
        dtype=_dtype(keys),
        vocab_size=keys.size("vocab_size"),
        hidden=keys.size("hidden_size"),
        layers=len(windows),
        max_context=context,
        norm_eps=keys.get("rms_norm_eps", float, _EPS.get(architecture, 1e-6)),
        tie_embeddings=keys.get("tie_word_embeddings", bool, False),
        attention=attention,
        rope=rope,
        ffn=ffn,
        groups=_groups([None if w is not None and w >= context else w for w in windows]),
    )


def _dtype(keys: _Keys) -> str:
    dtype = keys.get("dtype", str, keys.get("torch_dtype", str, "float32")).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise keys.fail(f"dtype is {dtype!r}; known are {', '.join(_DTYPES)}")
    return dtype


def _groups(windows: Windows) -> tuple[CacheGroup, ...]:
    """Layers of one window are one group, in the order of their first layer."""
    distinct = list(dict.fromkeys(windows))
    return tuple(CacheGroup(w, tuple(i for i, other in enumerate(windows) if other == w)) for w in distinct)


def read_spec(model_dir: Path) -> ModelSpec:
    """The spec of the checkpoint in a directory. Raises CheckpointError that names the file."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; a checkpoint directory has a config.json") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds a {type(config).__name__}")
    return parse_config(config, str(path))
