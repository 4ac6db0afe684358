"""Tiny checkpoints of mixtures of experts and of latent attention, and quantized ones as the hub has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import SHAPE
from safetensors.torch import load_file, save_file
from torch import Tensor

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 5.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 17,
    "num_hidden_layers": 4,
    "rope_parameters": YARN | {"truncate": False, "rope_theta": 150000.0},
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
LOUD = {"initializer_range": 0.3}  # with normed queries and keys it takes more for the answer not to be one token
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window-tied": (
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 18, "tie_word_embeddings": True},
    ),
    "qwen3-moe-dense-layers": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"head_dim": 32, "decoder_sparse_step": 2},
    ),
    "qwen3-moe-first-dense": (
        "Qwen3Moe",
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
        | {"head_dim": 16, "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 30},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"shared_expert_intermediate_size": 48},
    ),
    "qwen2-moe-dense-layers-window": (
        "Qwen2Moe",
        {"num_experts": 6, "num_experts_per_tok": 4, "moe_intermediate_size": 20, "norm_topk_prob": True}
        | {"shared_expert_intermediate_size": 36, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
        | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 19, "max_window_layers": 3},
    ),
    "olmoe-64-experts": ("Olmoe", {"num_experts": 64, "num_experts_per_tok": 8, "intermediate_size": 16} | LOUD),
    "olmoe-renormalized": (
        "Olmoe",
        {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True, "num_key_value_heads": 4}
        | {"attention_bias": True, "rms_norm_eps": 1e-3}
        | LOUD,
    ),
    "gpt-oss": ("GptOss", GPT_OSS),
    "gpt-oss-wide-heads": (
        "GptOss",
        GPT_OSS
        | {"head_dim": 32, "num_key_value_heads": 1, "num_local_experts": 32, "num_experts_per_tok": 4}
        | {"num_hidden_layers": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "deepseek-v2-direct-queries": (
        "DeepseekV2",
        MLA | {"q_lora_rank": None, "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 3},
    ),
    "deepseek-v2-groups": (
        "DeepseekV2",
        MLA
        | {"q_lora_rank": 24, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4}
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
        | {"v_head_dim": 24, "attention_bias": True}
        | {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        MLA
        | {"q_lora_rank": 24, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4}
        | {"n_group": 4, "topk_group": 2, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek-v3-halves": (
        "DeepseekV3",
        MLA
        | {"q_lora_rank": None, "n_routed_experts": 5, "n_shared_experts": 2, "num_experts_per_tok": 2}
        | {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False}
        | {"kv_lora_rank": 40, "qk_rope_head_dim": 16, "first_k_dense_replace": 0},
    ),
}


def make_mixture(name: str, **more: Any) -> transformers.PreTrainedModel:
    """A random model in which nothing is neutral that transformers begins with as if it were not there."""
    family, changes = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes | more))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for part, tensor in (*model.named_parameters(), *model.named_buffers()):
            if part.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.2)
            elif part.endswith("sinks"):
                tensor.normal_(0, 2)
            elif part.endswith(("gate.weight", "router.weight", "bias")):
                tensor.normal_(0, 0.3)
            elif "norm" in part:
                tensor.uniform_(0.5, 1.5)
    return model


# Quantized checkpoints as the hub has them ---------------------------------------------------------------------------

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def to_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] -> blocks uint8 [..., K / 32, 16] and scales uint8 [..., K / 32], rounded to nearest (OCP MX 6.3)."""
    groups = weight.unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1).clamp(min=2.0**-100)
    exponent = largest.log2().floor().int() - 2
    scaled = groups / torch.exp2(exponent.float())[..., None]
    code = (scaled.abs()[..., None] - E2M1).abs().argmin(-1) + 8 * (scaled < 0)
    return (code[..., 0::2] + 16 * code[..., 1::2]).to(torch.uint8), (exponent + 127).to(torch.uint8)


BLOCK = 28  # of fp8, 128 in the hub's: here, too, some sizes are no multiple of it


def to_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] -> float8_e4m3fn [N, K] and float32 [ceil(N / BLOCK), ceil(K / BLOCK)]."""
    rows, columns = weight.shape
    grid = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = grid.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))  # [rows, BLOCK, columns, BLOCK]
    scales = tiles.abs().amax((1, 3)).clamp(min=1e-12) / 448
    packed = (tiles / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:rows, :columns]
    return packed.to(torch.float8_e4m3fn), scales


def write_mxfp4(source: Path, target: Path) -> None:
    """A bfloat16 checkpoint of gpt-oss with its experts in MXFP4, under the names that openai/gpt-oss-20b has."""
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        blocks, scales = to_mxfp4(tensors.pop(name).float().transpose(1, 2))
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    _write(source, target, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})


def write_fp8(source: Path, target: Path, mtp: bool) -> None:
    """DeepSeek-V3's way: all linears but the gate and the head in FP8; `mtp`: with the tensors of one more layer."""
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.ndim == 2 and name.startswith("model.layers.") and not name.endswith("mlp.gate.weight"):
            tensors[name], tensors[f"{name}_scale_inv"] = to_fp8(weight.float())
        else:
            tensors[name] = weight
    config = json.loads((source / "config.json").read_text())
    if mtp:
        last, beyond = (f"model.layers.{config['num_hidden_layers'] + i}." for i in (-1, 0))
        tensors |= {beyond + n.removeprefix(last): t.clone() for n, t in tensors.items() if n.startswith(last)}
        tensors[f"{beyond}eh_proj.weight"] = torch.ones(4, 8)
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    _write(source, target, tensors, method)


def _write(source: Path, target: Path, tensors: dict[str, Tensor], quantization: dict[str, Any]) -> None:
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (target / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors")
