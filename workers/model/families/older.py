"""GPT-2, OPT, XGLM, GPT-NeoX: LayerNorm with biases everywhere, feed-forwards that are not gated."""

from __future__ import annotations

from workers.model.families.features import ACTIVATIONS, head_sizes, model_spec, read_rope, rope_values
from workers.model.families.keys import Keys
from workers.model.spec import Attention, Block, DenseFfn, ModelSpec, Norm, Positions


def gpt2(keys: Keys) -> ModelSpec:
    keys = keys.called(
        hidden_size="n_embd",
        num_hidden_layers="n_layer",
        num_attention_heads="n_head",
        max_position_embeddings="n_positions",
        intermediate_size="n_inner",
    )
    keys.only("scale_attn_by_inverse_layer_idx", False)
    keys.only("add_cross_attention", False)
    scaled = keys.get("scale_attn_weights", bool, True)
    attention = Attention(*head_sizes(keys, even=False), qkv_bias=True, out_bias=True, scale=None if scaled else 1.0)
    act = keys.word("activation_function", ACTIVATIONS, "gelu_new")
    ffn = DenseFfn(keys.size("intermediate_size", 4 * keys.size("hidden_size")), True, act, gated=False)
    return model_spec(
        keys,
        attention=attention,
        ffn=[ffn] * keys.layers(),
        norm=Norm("layer", keys.get("layer_norm_epsilon", float, 1e-5), bias=True),
        tie=True,
        positions=Positions("learned"),
        names="gpt2",
    )


def opt(keys: Keys) -> ModelSpec:
    """OPT-350m is the one with norms after the halves (`do_layer_norm_before` false) and narrower embeddings."""
    keys.only("layer_norm_elementwise_affine", True)
    bias, before = keys.get("enable_bias", bool, True), keys.get("do_layer_norm_before", bool, True)
    hidden = keys.size("hidden_size")
    width = keys.size("word_embed_proj_dim", hidden)
    act = keys.word("activation_function", ACTIVATIONS, "relu")
    return model_spec(
        keys,
        attention=Attention(*head_sizes(keys, even=False), qkv_bias=bias, out_bias=bias),
        ffn=[DenseFfn(keys.size("ffn_dim"), bias, act, gated=False)] * keys.layers(),
        norm=Norm("layer", 1e-5, bias=True),
        tie=True,
        positions=Positions("learned", 2),
        block=Block("pre" if before else "post"),
        embed_dim=None if width == hidden else width,
        final_norm=before and not keys.get("_remove_final_layer_norm", bool, False),
        names="opt",
    )


def xglm(keys: Keys) -> ModelSpec:
    keys = keys.called(hidden_size="d_model", num_hidden_layers="num_layers", num_attention_heads="attention_heads")
    keys.only("add_cross_attention", False)
    hidden = keys.size("hidden_size")
    if hidden < 4:
        raise keys.fail(f"{keys.name('hidden_size')} is {hidden}, must be at least 4 for sinusoidal positions")
    act = keys.word("activation_function", ACTIVATIONS, "gelu")
    return model_spec(
        keys,
        attention=Attention(*head_sizes(keys, even=False), qkv_bias=True, out_bias=True),
        ffn=[DenseFfn(keys.size("ffn_dim"), True, act, gated=False)] * keys.layers(),
        norm=Norm("layer", 1e-5, bias=True),
        tie=True,
        positions=Positions("sinusoidal", 2),
        embed_scale=hidden**0.5 if keys.get("scale_embedding", bool, True) else 1.0,
        names="xglm",
    )


def gpt_neox(keys: Keys) -> ModelSpec:
    keys = keys.called(rope_theta="rotary_emb_base", partial_rotary_factor="rotary_pct")
    bias = keys.get("attention_bias", bool, True)
    attention = Attention(*head_sizes(keys, even=False), qkv_bias=bias, out_bias=bias)
    act = keys.word("hidden_act", ACTIVATIONS, "gelu")
    return model_spec(
        keys,
        attention=attention,
        ffn=[DenseFfn(keys.size("intermediate_size"), True, act, gated=False)] * keys.layers(),
        norm=Norm("layer", keys.get("layer_norm_eps", float, 1e-5), bias=True),
        rope=read_rope(keys, attention.head_dim, share=0.25, values=rope_values(keys)),
        block=Block("pre", parallel=keys.get("use_parallel_residual", bool, True)),
        names="neox",
    )
