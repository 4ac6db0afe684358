"""Cases of the dense families beyond those of `checkpoints`: one feature more or less in each."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {"vocab_size": 160, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = SIZES | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 160, "initializer_range": 0.15}
OPT = SIZES | {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 96, "init_std": 0.15}
OPT |= {"max_position_embeddings": 160}
XGLM = SIZES | {"d_model": 64, "num_layers": 3, "attention_heads": 4, "ffn_dim": 96, "init_std": 0.15}
XGLM |= {"max_position_embeddings": 160}
LLAMA = SIZES | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 160, "initializer_range": 0.15}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
GEMMA = LLAMA | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 20, "num_hidden_layers": 4}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.4, 1.5, 2.0, 3.0, 4.0], "long_factor": [1.0, 1.5, 2, 3, 4, 6, 8, 9.5]}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | values}


LONGROPE = rope("longrope", **FACTORS) | {"original_max_position_embeddings": 110}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-yarn": ("Llama", LLAMA | rope("yarn", factor=4.0, original_max_position_embeddings=40)),
    "llama-yarn-words": (
        "Llama",
        LLAMA
        | {"head_dim": 32}
        | rope("yarn", factor=3.0, original_max_position_embeddings=50, beta_fast=8.0, beta_slow=2.0, truncate=False)
        | {"rms_norm_eps": 1e-5},
    ),
    "llama-yarn-factor": (
        "Llama",
        LLAMA | rope("yarn", factor=4.0, original_max_position_embeddings=40, attention_factor=0.8),
    ),
    "llama-dynamic": ("Llama", LLAMA | {"max_position_embeddings": 64} | rope("dynamic", factor=4.0)),
    "llama-longrope": ("Llama", LLAMA | rope("longrope", **FACTORS, original_max_position_embeddings=110)),
    "qwen2-yarn": ("Qwen2", LLAMA | rope("yarn", factor=4.0, original_max_position_embeddings=40)),
    "phi3": ("Phi3", LLAMA),
    "phi3-longrope-window": ("Phi3", LLAMA | LONGROPE | {"sliding_window": 30, "tie_word_embeddings": True}),
    "phi3-longrope-long-prompt": ("Phi3", LLAMA | LONGROPE | {"original_max_position_embeddings": 35}),
    "phi3-partial": (
        "Phi3",
        LLAMA
        | {"hidden_size": 128}
        | rope("default", partial_rotary_factor=0.75)
        | {"num_key_value_heads": 4, "num_hidden_layers": 2},
    ),
    "olmo2": ("Olmo2", LLAMA),
    "olmo2-biases-mha-yarn": (
        "Olmo2",
        LLAMA
        | {"num_key_value_heads": 4, "attention_bias": True, "initializer_range": 0.4}
        | rope("yarn", factor=2.0, original_max_position_embeddings=80),
    ),
    "smollm3": ("SmolLM3", LLAMA | {"num_hidden_layers": 4}),
    "smollm3-windows": (
        "SmolLM3",
        LLAMA
        | {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 18, "mlp_bias": True}
        | {"tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma2": ("Gemma2", GEMMA),
    "gemma2-no-caps-biases": (
        "Gemma2",
        GEMMA
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True, "head_dim": 32}
        | {"num_hidden_layers": 3, "hidden_activation": "gelu"},
    ),
    "gemma3": ("Gemma3", GEMMA | {"num_hidden_layers": 7}),
    "gemma3-scaled-caps": (
        "Gemma3",
        GEMMA
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}
        | {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0, "tie_word_embeddings": False}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            }
        },
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2-sizes": (
        "GPT2",
        GPT2
        | {"n_inner": 80, "n_head": 2, "scale_attn_weights": False, "activation_function": "relu"}
        | {"layer_norm_epsilon": 1e-3, "tie_word_embeddings": False},
    ),
    "opt": ("OPT", OPT),
    "opt-post-norm": ("OPT", OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "opt-no-biases": ("OPT", OPT | {"enable_bias": False, "activation_function": "gelu", "word_embed_proj_dim": 48}),
    "xglm": ("XGLM", XGLM),
    "xglm-no-scale": ("XGLM", XGLM | {"scale_embedding": False, "activation_function": "relu"}),
    "neox": ("GPTNeoX", NEOX),
    "neox-one-after-the-other": (
        "GPTNeoX",
        NEOX
        | {"use_parallel_residual": False, "attention_bias": False, "tie_word_embeddings": True}
        | rope("linear", factor=2.0, partial_rotary_factor=1.0)
        | {"hidden_act": "gelu_new"},
    ),
}
