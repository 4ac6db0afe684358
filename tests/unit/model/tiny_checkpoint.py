"""A tiny Llama checkpoint written by hand, to be damaged by the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Every tensor that CONFIG implies, random."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 16), "lm_head.weight": (32, 16)}
    shapes["model.norm.weight"] = (16,)
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}.weight": (16,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (16, 16) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (8, 16) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (16, 24)
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(directory: Path, weights: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A checkpoint of one file. `config` changes keys; None removes one."""
    directory.mkdir(parents=True, exist_ok=True)
    changed = {k: v for k, v in (CONFIG | config).items() if v is not None}
    (directory / "config.json").write_text(json.dumps(changed))
    save_file(tensors() if weights is None else weights, directory / "model.safetensors")
    return directory


def write_sharded(directory: Path) -> Path:
    """The same weights in two files and an index."""
    write(directory)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    names = sorted(tensors())
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors()[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
