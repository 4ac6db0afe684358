"""How each family names its tensors. A name is completed by `.weight` and `.bias`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Names:
    """`root` stands before every name but the head's; `roots` are those that files of the family have.

    One name in `qkv` or `gate_up` is one tensor of all parts: rows of q, k and v one after the other, or with
    `qkv_by_head` those of head 0, then those of head 1. `transposed`: weights are kept as [K, N].
    """

    roots: tuple[str, ...] = ("model.", "")
    embedding: str = "embed_tokens"
    positions: str = "embed_positions"
    project_in: str = "project_in"
    project_out: str = "project_out"
    layers: str = "layers"
    final_norm: str = "norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    attention_after: str = ""  # a norm of the half's result
    ffn_norm: str = "post_attention_layernorm"
    ffn_after: str = ""
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_by_head: bool = False
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"  # the whole name
    out: str = "self_attn.o_proj"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")  # without a gate: of up alone
    down: str = "mlp.down_proj"
    transposed: bool = False
    root: str = ""

    def within(self, name: str) -> str:
        return self.root + name

    def layer(self, i: int) -> str:
        return f"{self.root}{self.layers}.{i}"


_OPT = Names(
    roots=("model.decoder.", "decoder."),
    final_norm="final_layer_norm",
    attention_norm="self_attn_layer_norm",
    ffn_norm="final_layer_norm",
    out="self_attn.out_proj",
    gate_up=("fc1",),
    down="fc2",
)

NAMES: dict[str, Names] = {
    "llama": Names(),
    "phi3": Names(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
    "olmo2": Names(attention_after="post_attention_layernorm", ffn_after="post_feedforward_layernorm"),
    "gemma": Names(
        attention_after="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm",
        ffn_after="post_feedforward_layernorm",
    ),
    "gpt2": Names(
        roots=("transformer.", ""),
        embedding="wte",
        positions="wpe",
        layers="h",
        final_norm="ln_f",
        attention_norm="ln_1",
        ffn_norm="ln_2",
        qkv=("attn.c_attn",),
        out="attn.c_proj",
        gate_up=("mlp.c_fc",),
        down="mlp.c_proj",
        transposed=True,
    ),
    "opt": _OPT,
    "xglm": replace(_OPT, roots=("model.", ""), final_norm="layer_norm"),
    "neox": Names(
        roots=("gpt_neox.", ""),
        embedding="embed_in",
        final_norm="final_layer_norm",
        head="embed_out",
        qkv=("attention.query_key_value",),
        qkv_by_head=True,
        out="attention.dense",
        gate_up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
    ),
}


def find_names(family: str, has: Callable[[str], bool]) -> Names:
    """The family's names with the root that this checkpoint has, by where its embeddings are; else the usual one."""
    names = NAMES[family]
    roots = [root for root in names.roots if has(f"{root}{names.embedding}.weight")]
    return replace(names, root=(roots or names.roots)[0])
