"""Every way in which a checkpoint can be bad has an error that names the file, the tensor or the key."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoint import CONFIG, tensors, write, write_sharded

from understudy.errors import CheckpointError, ConfigError
from workers.engine.contract import EngineConfig
from workers.engine.runner import Runner

Q = "model.layers.1.self_attn.q_proj.weight"


def load(model_dir: Path, **config: Any) -> Runner:
    return Runner.from_checkpoint(EngineConfig(model_dir=str(model_dir), kernels="plain", **config))


def refused(model_dir: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(model_dir)
    for word in words:
        assert word in caught.value.message


def test_the_undamaged_checkpoint_loads(tmp_path: Path) -> None:
    assert load(write(tmp_path)).info.architecture == "LlamaForCausalLM"


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path / "config.json"), "no such file")


@pytest.mark.parametrize("text", ["{", "", "\xff", "[1]", "null"])
def test_config_that_is_no_json_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refused(tmp_path, "config.json", "JSON")


def test_no_weights(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").unlink()
    refused(tmp_path, str(tmp_path), "model.safetensors", "model.safetensors.index.json")


def test_missing_shard(tmp_path: Path) -> None:
    shard = write_sharded(tmp_path) / "model-00002-of-00002.safetensors"
    shard.unlink()
    refused(tmp_path, str(shard), "no such file")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(tmp_path: Path, text: str) -> None:
    index = write_sharded(tmp_path) / "model.safetensors.index.json"
    index.write_text(text)
    refused(tmp_path, str(index), "weight_map")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_truncated_file(tmp_path: Path, kept: float) -> None:
    """To nothing, within the length, within the header, in the middle, by one byte."""
    file = write(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    refused(tmp_path, str(file), "truncated" if kept not in (0, 4) else "too few")


def test_truncated_file_names_the_tensor(tmp_path: Path) -> None:
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, "truncated: tensor model.", f"the file has {file.stat().st_size}")


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"not json", "damaged"),
        (b'{"a": 3}', "damaged"),
        (b'{"a": {"dtype": "F32", "shape": [2]}}', "damaged"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}', "tensor a"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "tensor a"),
    ],
)
def test_damaged_header(tmp_path: Path, header: bytes, word: str) -> None:
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    refused(tmp_path, str(file), word)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    file = write(tmp_path) / "model.safetensors"
    file.write_bytes(b"<!DOCTYPE html> " * 100)
    refused(tmp_path, str(file), "not safetensors")


def test_missing_tensor(tmp_path: Path) -> None:
    weights = tensors()
    del weights[Q]
    refused(write(tmp_path, weights), str(tmp_path), f"tensor {Q} is missing")


def test_wrong_shape_names_both(tmp_path: Path) -> None:
    refused(write(tmp_path, tensors() | {Q: torch.zeros(16, 15)}), Q, "[16, 15]", "[16, 16]", "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_unexpected_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    name = {torch.int8: "I8", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3"}[dtype]
    refused(write(tmp_path, tensors() | {Q: torch.zeros(16, 16).to(dtype)}), Q, name, "F32, F16, BF16")


@pytest.mark.parametrize("architectures", [["BloomForCausalLM"], [], ["LlamaForSequenceClassification"]])
def test_unknown_architecture_lists_the_known_ones(tmp_path: Path, architectures: list[str]) -> None:
    known = "LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"
    refused(write(tmp_path, architectures=architectures), "config.json", *architectures, known)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hidden_size": None}, ["hidden_size is missing"]),
        ({"vocab_size": None}, ["vocab_size is missing"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers is 0"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers is True", "int"]),
        ({"intermediate_size": "24"}, ["intermediate_size is '24'", "int"]),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, ["num_attention_heads is 3", "which is 2"]),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, ["hidden_size is 16", "which is 6"]),
        ({"head_dim": 3}, ["head_dim is 3", "even"]),
        ({"hidden_act": "gelu"}, ["hidden_act is 'gelu'", "silu"]),
        ({"torch_dtype": "int8"}, ["dtype is 'int8'", "float32, bfloat16, float16"]),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 2.0}}, ["rope_scaling", "'mrope'", "default, linear"]),
        ({"rope_scaling": {"type": "dynamic"}}, ["rope_scaling", "factor is missing"]),
        ({"rope_scaling": {"type": "yarn", "factor": -1}}, ["factor is -1.0"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1}}, ["'yarn'", "1"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ["rope_parameters", "short_factor is missing"]),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}},
            ["short_factor has 1 values", "2"],
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 0], "long_factor": [1.0, 2.0]}},
            ["short_factor has 0.0"],
        ),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor is missing"]),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ["factor is 0.0"]),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
            ["low_freq_factor is 4.0", "high_freq_factor 1.0"],
        ),
        ({"rope_theta": -1}, ["rope_theta is -1.0"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "'gptq'"]),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
            ["num_experts_per_tok is 3", "2 experts"],
        ),
        ({"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 0}, ["attn_logit_softcapping is 0.0"]),
        (
            {"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True},
            ["use_bidirectional_attention"],
        ),
        (
            {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "mish"},
            ["hidden_activation is 'mish'", "gelu"],
        ),
        ({"architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True}, ["scale_attn_by_inverse"]),
        (
            {"architectures": ["GPT2LMHeadModel"], "n_head": 3, "num_key_value_heads": None},
            ["hidden_size is 16", "n_head, which is 3"],
        ),
        ({"architectures": ["GPT2LMHeadModel"], "n_layer": 0}, ["n_layer is 0"]),
        ({"architectures": ["OPTForCausalLM"]}, ["ffn_dim is missing"]),
        (
            {"architectures": ["OPTForCausalLM"], "layer_norm_elementwise_affine": False},
            ["elementwise_affine is False"],
        ),
        ({"architectures": ["XGLMForCausalLM"], "d_model": "16"}, ["d_model is '16'", "int"]),
        ({"architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.9}, ["rotary_pct is 0.9", "3 of a head's 4"]),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, ["no_rope_layers is [1]", "= 2"]),
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "su"}}, ["rope_scaling", "short_factor"]),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]}, ["layer_types", "= 2"]),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention", "linear_attention"]},
            ["layer_types", "'linear_attention'"],
        ),
        (
            {"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention", "sliding_attention"]},
            ["layer_types", "no sliding_window"],
        ),
    ],
)
def test_bad_keys_name_the_key_and_the_value(tmp_path: Path, changed: dict[str, Any], words: list[str]) -> None:
    refused(write(tmp_path, **changed), str(tmp_path / "config.json"), *words)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_context": 65}, ["max_context: 65", "64"]),
        ({"max_context": 0}, ["max_context: 0"]),
        ({"max_context": 64, "cache_bytes": 4096}, ["cache_bytes: 4096", "context of 64"]),
        ({"cache_bytes": 10}, ["cache_bytes: 10"]),
        ({"dtype": "int8"}, ["dtype", "int8", "float32, bfloat16, float16"]),
        ({"device": "tpu"}, ["device", "tpu"]),
        ({"threads": 0}, ["threads", "0"]),
    ],
)
def test_sizes_that_cannot_be(tmp_path: Path, config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path), **config)
    assert all(word in caught.value.message for word in words), caught.value.message


def test_a_small_cache_shortens_a_context_that_nobody_asked_for(tmp_path: Path) -> None:
    """2 layers x 2 (K, V) x 2 heads x 16 positions x 4 wide x 4 bytes = 2 KiB a block."""
    info = load(write(tmp_path), cache_bytes=3 * 2048 + 1000).info
    assert (info.max_context, info.blocks, info.cache_bytes) == (48, (3,), 3 * 2048)


def test_unused_tensors_are_tolerated(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "understudy")
    load(write(tmp_path, tensors() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))
    assert "rotary_emb.inv_freq is not used" in caplog.text


def test_config_keys_of_the_fixture_are_needed(tmp_path: Path) -> None:
    """The negative cases above change keys that matter."""
    data = json.loads((write(tmp_path) / "config.json").read_text())
    assert data == CONFIG


def test_unaligned_data_is_read(tmp_path: Path) -> None:
    """The format does not ask for aligned tensors; older writers made such files."""
    file = write(tmp_path) / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    want = load(tmp_path).info.model_fingerprint
    file.write_bytes(struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :])
    assert load(tmp_path).info.model_fingerprint == want


def test_single_and_sharded_files_are_one_model(tmp_path: Path) -> None:
    single, sharded = load(write(tmp_path / "a")), load(write_sharded(tmp_path / "b"))
    assert single.info.model_fingerprint == sharded.info.model_fingerprint


def test_the_fingerprint_sees_weights_and_configuration(tmp_path: Path) -> None:
    changed = tensors()
    changed[Q][3, 4] += 1e-3
    prints = {
        load(write(tmp_path / "a")).info.model_fingerprint,
        load(write(tmp_path / "b", changed)).info.model_fingerprint,
        load(write(tmp_path / "c", rms_norm_eps=1e-6)).info.model_fingerprint,
    }
    assert len(prints) == 3
    save_file(tensors(), tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    assert load(tmp_path / "b").info.model_fingerprint in prints


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    config = EngineConfig(model_dir=str(write(tmp_path)), kernels="plain")
    Runner.from_checkpoint(config, lambda done, total: seen.append((done, total)))
    total = sum(t.numel() * 4 for t in tensors().values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(seen) > 10
