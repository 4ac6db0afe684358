"""What the config.json of a mixture of experts means, and what is refused; the published sizes of latent caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from understudy.errors import CheckpointError
from workers.kernels.plain import PlainOps
from workers.model.config import parse_config
from workers.model.spec import Attention, DenseFfn, Latent, MoeFfn, Quantization, Rope, Route

BASE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}
YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# As published at huggingface.co/deepseek-ai, keys that only training reads left out.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V2_LITE: dict[str, Any] = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "quantization_config": None,
    "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_group": 1,
    "topk_method": "greedy",
    "vocab_size": 102400,
}
DEEPSEEK_V2: dict[str, Any] = DEEPSEEK_V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_group": 8,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
}
GPT_OSS_20B: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn"], "quant_method": "mxfp4"},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 201088,
}
DEEPSEEK = BASE | {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "moe_intermediate_size": 12,
}


# What is refused -----------------------------------------------------------------------------------------------------

V2, V3 = (
    DEEPSEEK | {"architectures": ["DeepseekV2ForCausalLM"]},
    DEEPSEEK | {"architectures": ["DeepseekV3ForCausalLM"]},
)
SMALL = {"n_group": 2, "topk_group": 1}
GROUPS = V2 | SMALL | {"topk_method": "group_limited_greedy"}
QWEN2_MOE = BASE | {"architectures": ["Qwen2MoeForCausalLM"], "num_key_value_heads": 2}
OLMOE = BASE | {"architectures": ["OlmoeForCausalLM"]}
GPT_OSS = BASE | {"architectures": ["GptOssForCausalLM"], "num_key_value_heads": 2, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "changes", "words"),
    [
        (QWEN2_MOE, {"num_experts": 3, "num_experts_per_tok": 4}, "num_experts_per_tok is 4, more than the 3 experts"),
        (QWEN2_MOE, {"num_experts": 0}, "num_experts is 0"),
        (QWEN2_MOE, {"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size is -1"),
        (OLMOE, {"num_experts_per_tok": 65}, "num_experts_per_tok is 65, more than the 64 experts"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        (
            GPT_OSS,
            {"num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok is 3, more than the 2 experts",
        ),
        (GPT_OSS, {"swiglu_limit": 6.0}, "swiglu_limit is 6.0; known is 7.0"),
        (GPT_OSS, {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0; known is 1.702"),
        (GPT_OSS, {"layer_types": ["full_attention"]}, "layer_types"),
        (V2, {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, more than the 8 experts of 1 group"),
        (V2, {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'; known are greedy, group_limited_greedy"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob is True; known is False"),
        (V2, {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; known is 'softmax'"),
        (V2, {"mlp_bias": True}, "mlp_bias is True"),
        (V2, {"moe_layer_freq": 2}, "moe_layer_freq is 2; known is 1"),
        (V2, {"num_key_value_heads": 2}, "num_key_value_heads is 2; latent attention has one for each of the 4 heads"),
        (V2, {"qk_rope_head_dim": 5}, "qk_rope_head_dim is 5, must be even"),
        (V2, {"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        (GROUPS, {"n_group": 3}, "n_group is 3, which does not divide the 8 experts"),
        (GROUPS, {"topk_group": 3}, "topk_group is 3, more than the 2 groups"),
        (GROUPS, {"num_experts_per_tok": 5}, "num_experts_per_tok is 5, more than the 4 experts of 1 group"),
        (V3 | SMALL, {"n_group": 3}, "n_group is 3, which does not divide the 8 experts"),
        (V3 | SMALL, {"n_group": 8, "topk_group": 4}, "groups are judged by their two best"),
        (V3 | SMALL, {"topk_method": "greedy"}, "topk_method is 'greedy'; known is 'noaux_tc'"),
        (
            V3 | SMALL,
            {"scoring_func": "softmax"},
            "scoring_func is 'softmax'; known is 'sigmoid'",
        ),
    ],
)
def test_what_cannot_be_names_the_key_and_the_value(
    config: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    parse_config(config)
    with pytest.raises(CheckpointError) as caught:
        parse_config(config | changes, "dir/config.json")
    assert words in caught.value.message
    assert caught.value.message.startswith("dir/config.json: ")


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "weights quantized by 'gptq' are not read; read are mxfp4, fp8"),
        ({"bits": 4}, "weights quantized by 'unnamed' are not read"),
        ({"quant_method": 3}, "quant_method is 3"),
        (FP8 | {"fmt": "e5m2"}, "fmt is 'e5m2'; known is 'e4m3'"),
        (FP8 | {"weight_block_size": None}, "weight_block_size is None; fp8 weights are read with a scale per block"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size is [128]"),
        (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size is [128, 0]"),
        (FP8 | {"weight_block_size": [128, 1.5]}, "weight_block_size is [128, 1.5]"),
        (FP8 | {"expert_dtype": "fp4"}, "expert_dtype is 'fp4'; known is 'fp8'"),
    ],
)
def test_other_quantizations_are_refused_by_name(quantization: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse_config(V3 | SMALL | {"quantization_config": quantization})
    assert words in caught.value.message
    assert "quantization_config" in caught.value.message


# What the published configurations mean ------------------------------------------------------------------------------


def test_deepseek_v3() -> None:
    spec = parse_config(DEEPSEEK_V3)
    scale = 192**-0.5 * (0.1 * torch.tensor(40.0).log().item() + 1) ** 2
    assert spec.attention.scale == pytest.approx(scale)
    latent = Latent(rank=512, rope_dim=64, nope_dim=128, value_dim=128, query_rank=1536)
    assert spec.attention == Attention(128, 128, 192, scale=spec.attention.scale, latent=latent)
    route = Route(8, "sigmoid", groups=8, top_groups=4, group_score="top2", bias=True, scale=2.5)
    moe = MoeFfn(2048, 256, route, wide_gate=True, shared=2048, names="deepseek")
    assert spec.ffn == (DenseFfn(18432),) * 3 + (moe,) * 58
    rope = spec.rope[60]
    assert rope is not None
    assert (rope.kind, rope.dim, rope.interleaved, rope.factor, rope.mscale) == ("yarn", 64, True, 40.0, 1.0)
    assert spec.quantization == Quantization("fp8", (128, 128))
    assert (spec.layers, len(spec.groups)) == (61, 1)


def test_deepseek_v2() -> None:
    route = Route(6, "softmax", renormalize=False, groups=8, top_groups=3, scale=16.0)
    moe = MoeFfn(1536, 160, route, wide_gate=True, shared=3072, names="deepseek")
    assert parse_config(DEEPSEEK_V2).ffn == (DenseFfn(12288),) + (moe,) * 59
    lite = parse_config(DEEPSEEK_V2_LITE)
    assert lite.attention.latent == Latent(rank=512, rope_dim=64, nope_dim=128, value_dim=128)
    assert lite.ffn[1] == MoeFfn(1408, 64, Route(6, renormalize=False), wide_gate=True, shared=2816, names="deepseek")
    assert lite.quantization is None


def test_gpt_oss() -> None:
    spec = parse_config(GPT_OSS_20B)
    assert spec.attention == Attention(64, 8, 64, qkv_bias=True, out_bias=True, sinks=True)
    assert [(g.window, g.layers) for g in spec.groups] == [
        (128, tuple(range(0, 24, 2))),
        (None, tuple(range(1, 24, 2))),
    ]
    route = Route(4, "chosen_softmax")
    moe = MoeFfn(2880, 32, route, act="clamped", bias=True, gate_bias=True, names="gpt_oss")
    assert spec.ffn == (moe,) * 24
    yarn = Rope(150000.0, "yarn", 32.0, original_context=4096, truncate=False)
    assert spec.rope == (yarn,) * 24
    assert (spec.norm.wide, spec.norm.eps) == (True, 1e-5)
    assert spec.quantization == Quantization("mxfp4", (1, 32))


def test_olmoe_and_qwen2_moe() -> None:
    olmoe = parse_config(OLMOE)
    assert olmoe.attention == Attention(4, 4, 4, qk_norm="flat")
    assert (olmoe.ffn[0], olmoe.norm.eps) == (MoeFfn(24, 64, Route(8, renormalize=False)), 1e-5)
    qwen = parse_config(QWEN2_MOE | {"decoder_sparse_step": 2, "norm_topk_prob": True})
    moe = MoeFfn(1408, 60, Route(4), shared=5632, shared_gate=True)
    assert qwen.ffn == (DenseFfn(24), moe, DenseFfn(24), moe)
    assert qwen.attention == Attention(4, 2, 4, qkv_bias=True)


# Bytes of the cache --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "full", "less"),
    [(DEEPSEEK_V3, 40960, 98.6), (DEEPSEEK_V2, 40960, 98.6), (DEEPSEEK_V2_LITE, 5120, 88.8)],
)
def test_the_cache_holds_the_latent_alone(config: dict[str, Any], full: int, less: float) -> None:
    """576 values per token and layer, where the heads that they stand for have `full`.

    `less` in percent: beyond 93 at the sizes of V2 and V3, with their 128 heads, but not at the 16 of the Lite.
    """
    attention = parse_config(config).attention
    latent = attention.latent
    assert latent is not None
    assert attention.values_per_token == 576
    assert attention.heads * (attention.head_dim + latent.value_dim) == full
    assert round(100 * (1 - attention.values_per_token / full), 1) == less
    ops = PlainOps(torch.bfloat16)
    per_block = ops.cache_block_bytes(61, attention.cache_heads, attention.cache_dim, latent.rank)
    assert per_block == 61 * 16 * 576 * 2
    assert ops.cache(61, 3, attention.cache_heads, attention.cache_dim, latent.rank).bytes == 3 * per_block


def test_grouped_queries_take_a_quarter() -> None:
    """Llama 3 8B: 32 heads of queries, 8 of keys and values."""
    sizes = BASE | {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "num_attention_heads": 32}
    grouped, full = (parse_config(sizes | {"num_key_value_heads": heads}).attention for heads in (8, 32))
    assert (grouped.values_per_token, full.values_per_token) == (2048, 8192)
    ops = PlainOps(torch.bfloat16)
    block, whole = (ops.cache_block_bytes(32, a.cache_heads, a.cache_dim) for a in (grouped, full))
    assert 4 * block == whole == 32 * 16 * 8192 * 2
