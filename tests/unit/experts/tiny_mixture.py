"""A tiny mixture, written as transformers would, without importing it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, EXPERTS, HIDDEN, SIZE = 3, 8, 32, 16


def write_mixture(path: Path, hidden: int = HIDDEN, size: int = SIZE) -> Path:
    """OLMoE with 8 experts, 2 of them for a token."""
    config = {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 64, "hidden_size": hidden,
        "intermediate_size": size, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 2,
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 128, "norm_topk_prob": False,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
        "torch_dtype": "float32", "eos_token_id": None,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw) * 0.3

    tensors = {"model.embed_tokens.weight": weight(64, hidden), "lm_head.weight": weight(64, hidden)}
    tensors["model.norm.weight"] = torch.ones(hidden)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            tensors[f"{at}.{name}.weight"] = torch.ones(hidden)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{at}.self_attn.{name}.weight"] = weight(hidden, hidden)
        tensors[f"{at}.mlp.gate.weight"] = weight(EXPERTS, hidden)
        for expert in range(EXPERTS):
            for name, shape in (
                ("gate_proj", (size, hidden)),
                ("up_proj", (size, hidden)),
                ("down_proj", (hidden, size)),
            ):
                tensors[f"{at}.mlp.experts.{expert}.{name}.weight"] = weight(*shape)
    save_file(tensors, path / "model.safetensors")
    return path
