"""What a decoder has to know, as one frozen value: a vocabulary of features, not a class per family.

`workers.model.config` reads a Hugging Face `config.json` into it; `workers.model.decoder` computes what it says.
Every field's default is "as Llama does it".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "clamped"]
"""gelu is exact (erf); clamped is the gated pair of gpt-oss, see `workers.kernels.ops.gated`."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (https://arxiv.org/abs/2104.09864) of the first `dim` components of a head (None: all).

    `kind` is default, linear, llama3, dynamic, yarn or longrope; `interleaved` pairs components (2i, 2i + 1) where
    the others pair (i, i + dim / 2): resolved when weights are packed, so that the kernels know halves only.
    `original_context` is the length that the model was first trained for.

    linear: all wavelengths times `factor`. llama3 stretches wavelengths longer than `original_context /
    low_freq_factor` by `factor`, leaves those shorter than `original_context / high_freq_factor`, and interpolates
    between. dynamic: the row at position p is rotated as if the text were p + 1 long, wherever it is computed.
    yarn: https://arxiv.org/abs/2309.00071. longrope: https://arxiv.org/abs/2402.13753; a sequence whose prompt is
    longer than `original_context` uses `long_factor`, any other `short_factor`, to its end.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 0
    dim: int | None = None
    interleaved: bool = False
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # yarn: whole dimensions bound the correction range
    attention_factor: float | None = None  # cosines and sines are multiplied by it; None: as the kind defines
    mscale: float | None = None
    mscale_all_dim: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Positions:
    """Vectors added to the embeddings: `learned` (a table in the checkpoint) or `sinusoidal`; row p + `offset`."""

    kind: Literal["learned", "sinusoidal"]
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm, or LayerNorm with or without bias.

    `unit` weights are kept as w - 1 (Gemma). `wide` multiplies in float32 and rounds once (Gemma, OLMo 2, gpt-oss)
    where Llama rounds the normed value to the dtype first.
    """

    kind: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    unit: bool = False
    wide: bool = False
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434).

    The cache holds one vector of `rank` + `rope_dim` values per position and layer: the normed latent of keys and
    values, and the rotated key that all heads share. `query_rank` None: queries are projected in one step.
    """

    rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_rank: int | None = None


@dataclass(frozen=True, slots=True)
class Attention:
    """`heads` query heads share `kv_heads` heads of keys and values, each of `head_dim` components."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: Literal["head", "flat"] | None = None  # of each head, or of all heads' components as one vector
    scale: float | None = None  # of q . k; None: head_dim ** -0.5
    softcap: float | None = None  # scores become cap * tanh(score / cap)
    sinks: bool = False  # a learned logit per head that takes weight and gives nothing (gpt-oss)
    latent: Latent | None = None

    @property
    def cache_heads(self) -> int:
        """Heads that the cache keeps."""
        return 1 if self.latent else self.kv_heads

    @property
    def cache_dim(self) -> int:
        """Components of a key in the cache."""
        return self.latent.rank + self.latent.rope_dim if self.latent else self.head_dim

    @property
    def values_per_token(self) -> int:
        """Numbers that one layer keeps of one position."""
        return self.cache_dim if self.latent else 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class DenseFfn:
    """`gated`: down(act(gate(x)) * up(x)), else down(act(up(x)))."""

    size: int
    bias: bool = False
    act: Activation = "silu"
    gated: bool = True


@dataclass(frozen=True, slots=True)
class Route:
    """How a token's experts are chosen from the gate's logits.

    `scoring`: softmax over all, sigmoid of each, or softmax over the chosen ones' logits only (chosen_softmax).
    `groups` > 1: only experts of the `top_groups` best groups can be chosen; a group is as good as its best expert
    (max) or the sum of its two best (top2). `bias`: a vector in the checkpoint is added to the scores for the choice
    and not for the weight. `renormalize`: the chosen ones' weights sum to 1. Then all are multiplied by `scale`.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid", "chosen_softmax"] = "softmax"
    renormalize: bool = True
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    bias: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class MoeFfn:
    """`experts` gated experts of `size` behind a gate, added by weight in the order of the gate's slots.

    `shared` > 0: a dense expert of that size that every token passes, added after the others; `shared_gate`: times
    the sigmoid of a linear of the token (Qwen2-MoE). `bias`: experts have biases; `gate_bias`: so has the gate.
    `wide_gate`: the gate computes in float32 (DeepSeek-V3). `names` says where the tensors lie.
    """

    size: int
    experts: int
    route: Route
    act: Activation = "silu"
    bias: bool = False
    gate_bias: bool = False
    wide_gate: bool = False
    shared: int = 0
    shared_gate: bool = False
    names: str = "qwen"  # a key of workers.model.ffn.NAMES


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers whose cached positions live and die together: those with the same window (None: everything)."""

    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """How one layer's halves are joined with the residual stream.

    pre: x += half(norm(x)). post: x = norm(x + half(x)) (OPT-350m). after: x += norm(half(x)) (OLMo 2).
    sandwich: x += norm(half(norm(x))) (Gemma 2). `parallel`: x += attention(norm1(x)) + ffn(norm2(x)) (GPT-NeoX).
    """

    norms: Literal["pre", "post", "after", "sandwich"] = "pre"
    parallel: bool = False


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the checkpoint keeps its large weights; see `workers.model.quantized`, which reads them.

    mxfp4: 32 values of 4 bits along a row share a scale of 8 bits (OCP MX 1.0). fp8: float8_e4m3fn, with one scale
    per `block` of [rows, columns].
    """

    method: Literal["mxfp4", "fp8"]
    block: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes in elements; `dtype` float32, bfloat16 or float16 is the checkpoint's.

    `rope[i]` is layer i's (None: it has no rotary positions); equal values share one table. `embed_scale` multiplies
    the embeddings. `embed_dim` is their width where it differs from `hidden` (projected in and out: OPT-350m).
    `final_norm`: one before the head. `final_softcap`: of the logits. `names` says how the checkpoint names tensors.
    """

    architecture: str
    dtype: str
    vocab_size: int
    hidden: int
    layers: int
    max_context: int
    norm: Norm
    tie_embeddings: bool
    attention: Attention
    rope: tuple[Rope | None, ...]  # one per layer
    ffn: tuple[DenseFfn | MoeFfn, ...]  # one per layer
    groups: tuple[CacheGroup, ...]
    positions: Positions | None = None
    block: Block = Block()
    embed_scale: float = 1.0
    embed_dim: int | None = None
    final_norm: bool = True
    final_softcap: float | None = None
    names: str = "llama"  # a key of workers.model.names.NAMES
    quantization: Quantization | None = None

    @property
    def layer_group(self) -> tuple[int, ...]:
        """The index into `groups` of each layer."""
        return tuple(next(g for g, group in enumerate(self.groups) if i in group.layers) for i in range(self.layers))

    @property
    def long_prompt(self) -> int | None:
        """Prompts longer than this are rotated by other tables (longrope); None: there is one kind of prompt."""
        return next((r.original_context for r in self.rope if r is not None and r.kind == "longrope"), None)
