"""Writes the model as a Hugging Face checkpoint (``MixtralForCausalLM``) in bfloat16."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from bpe import END_OF_TEXT, RESERVED, SPECIAL
from model import Decoder, Shape
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from tokenizers import Tokenizer
from torch import Tensor

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def write(path: Path, content: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def named_weights(model: Decoder) -> dict[str, Tensor]:
    """The weights under the names of Mixtral checkpoints; the output layer is the embedding and is left out."""
    out = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}."
        out[at + "input_layernorm.weight"] = layer.input_norm.weight
        out[at + "post_attention_layernorm.weight"] = layer.expert_norm.weight
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out[f"{at}self_attn.{name}.weight"] = getattr(layer.attention, name).weight
        out[at + "block_sparse_moe.gate.weight"] = layer.experts.gate.weight
        for e in range(model.s.experts):
            w1, w3 = layer.experts.w13[:, e].mT  # [I, H] each
            expert = f"{at}block_sparse_moe.experts.{e}."
            out[expert + "w1.weight"], out[expert + "w3.weight"] = w1, w3
            out[expert + "w2.weight"] = layer.experts.w2[e].t()  # [H, I]
    return {name: w.detach().to(torch.bfloat16).contiguous().clone() for name, w in out.items()}


def load_weights(model: Decoder, path: Path) -> None:
    """The inverse of `named_weights`: a checkpoint's bfloat16 weights into the model."""
    given = from_safetensors(path.read_bytes())

    def take(name: str) -> Tensor:
        return given[name].float()

    with torch.no_grad():
        model.embed.weight.copy_(take("model.embed_tokens.weight"))
        model.norm.weight.copy_(take("model.norm.weight"))
        for i, layer in enumerate(model.layers):
            at = f"model.layers.{i}."
            layer.input_norm.weight.copy_(take(at + "input_layernorm.weight"))
            layer.expert_norm.weight.copy_(take(at + "post_attention_layernorm.weight"))
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(layer.attention, name).weight.copy_(take(f"{at}self_attn.{name}.weight"))
            layer.experts.gate.weight.copy_(take(at + "block_sparse_moe.gate.weight"))
            for e in range(model.s.experts):
                expert = f"{at}block_sparse_moe.experts.{e}."
                both = torch.stack([take(expert + "w1.weight"), take(expert + "w3.weight")])  # [2, I, H]
                layer.experts.w13[:, e].copy_(both.mT)
                layer.experts.w2[e].copy_(take(expert + "w2.weight").t())


def config(s: Shape, tokenizer: Tokenizer) -> dict[str, object]:
    """config.json."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "intermediate_size": s.expert_width,
        "num_local_experts": s.experts,
        "num_experts_per_tok": s.top_k,
        "hidden_act": "silu",
        "rms_norm_eps": s.norm_eps,
        "rope_theta": s.rope_theta,
        "max_position_embeddings": s.context,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
    }


def tokenizer_config(s: Shape, tokenizer: Tokenizer) -> dict[str, object]:
    """tokenizer_config.json: no token is added to raw text, and the chat template is ChatML."""
    added = {}
    for index, token in sorted(tokenizer.get_added_tokens_decoder().items()):
        added[str(index)] = {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": s.context,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "additional_special_tokens": [*SPECIAL[1:], *RESERVED],
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE.read_text(encoding="utf-8"),
    }


def export(model: Decoder, tokenizer: Tokenizer, out: Path, attribution: str) -> None:
    """Write every file of the checkpoint into ``out``."""
    out.mkdir(parents=True, exist_ok=True)

    def text(value: object) -> str:
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"

    ends = [tokenizer.token_to_id(END_OF_TEXT), tokenizer.token_to_id("<|im_end|>")]
    write(out / "config.json", text(config(model.s, tokenizer)))
    write(out / "tokenizer.json", tokenizer.to_str(pretty=False))
    write(out / "tokenizer_config.json", text(tokenizer_config(model.s, tokenizer)))
    write(
        out / "generation_config.json",
        text(
            {
                "bos_token_id": ends[0],
                "eos_token_id": ends,
                "pad_token_id": ends[0],
                "do_sample": True,
                "temperature": 0.7,
                "top_p": 0.9,
            }
        ),
    )
    write(out / "ATTRIBUTION.tsv", attribution)
    write(out / "model.safetensors", to_safetensors(named_weights(model), metadata={"format": "pt"}))
