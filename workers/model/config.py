"""A Hugging Face `config.json` becomes one frozen ModelSpec.

Reads both forms of the keys: transformers 5 (`rope_parameters`, `dtype`, `layer_types`) and before (`rope_theta`,
`rope_scaling`, `torch_dtype`). Where a key may be absent, the default is that of the family's configuration class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from understudy.errors import CheckpointError
from workers.model.families import deepseek, gemma, gpt_oss, llama, mixtures, older
from workers.model.families.features import Family
from workers.model.families.keys import Keys
from workers.model.families.quantization import read_quantization
from workers.model.spec import ModelSpec

_FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": llama.llama,
    "MistralForCausalLM": llama.mistral,
    "MixtralForCausalLM": mixtures.mixtral,
    "Qwen2ForCausalLM": llama.qwen2,
    "Qwen3ForCausalLM": llama.qwen3,
    "Qwen2MoeForCausalLM": mixtures.qwen2_moe,
    "Qwen3MoeForCausalLM": mixtures.qwen3_moe,
    "OlmoeForCausalLM": mixtures.olmoe,
    "GptOssForCausalLM": gpt_oss.gpt_oss,
    "DeepseekV2ForCausalLM": deepseek.deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek.deepseek_v3,
    "Phi3ForCausalLM": llama.phi3,
    "Olmo2ForCausalLM": llama.olmo2,
    "SmolLM3ForCausalLM": llama.smollm3,
    "Gemma2ForCausalLM": gemma.gemma2,
    "Gemma3ForCausalLM": gemma.gemma3,
    "GPT2LMHeadModel": older.gpt2,
    "OPTForCausalLM": older.opt,
    "XGLMForCausalLM": older.xglm,
    "GPTNeoXForCausalLM": older.gpt_neox,
}
ARCHITECTURES = tuple(_FAMILIES)


def parse_config(config: Mapping[str, Any], path: str = "config.json") -> ModelSpec:
    """The spec that a `config.json` means. `path` is for the errors.

    Raises CheckpointError for an architecture, a feature or a value that is unknown, missing or contradictory.
    """
    keys = Keys(config, path)
    names = keys.get("architectures", list, [])
    architecture = next((name for name in names if isinstance(name, str) and name in _FAMILIES), None)
    if architecture is None:
        said = ", ".join(map(repr, names)) or "missing"
        raise keys.fail(f"architectures is {said}; known are {', '.join(_FAMILIES)}")
    spec = _FAMILIES[architecture](Keys(config, path, architecture))
    return replace(spec, quantization=read_quantization(keys))


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
