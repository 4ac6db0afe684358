"""`understudy plan` against sizes that were published, and against the engine's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.config import load
from cluster.sizing import (
    BLOCK,
    CACHE_SHARE,
    GPU_RESERVE,
    Wish,
    count_parameters,
    kv_bytes,
    plan_sizes,
    rank_bytes,
    stored_parameters,
)
from understudy.cli.main import app
from understudy.errors import ConfigError
from workers.model.config import parse_config, read_spec
from workers.model.spec import ModelSpec

GB = 10**9

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
QWEN_2_5_HALF_B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 151936, "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "torch_dtype": "bfloat16", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "moe_layer_freq": 1, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
}  # fmt: skip


def spec(config: dict[str, Any]) -> ModelSpec:
    return parse_config(config)


@pytest.mark.parametrize(
    ("config", "parameters", "kv"),
    [
        # Layer by layer: 2 x 4096 x 4096 + 2 x 4096 x 1024 + 3 x 4096 x 14336 + 2 x 4096, times 32; 2 x 128256 x 4096;
        # 4096. Cache: 32 layers x 2 x 8 heads x 128 x 2 bytes.
        (LLAMA_3_8B, 8_030_261_248, 131_072),
        # One table for both ends, biases of queries, keys and values. Cache: 24 x 2 x 2 x 64 x 2.
        (QWEN_2_5_HALF_B, 494_032_768, 12_288),
        # 671B without the layers of multi-token prediction. Cache: 61 latents of 512 + 64, 2 bytes each.
        (DEEPSEEK_V3, 671_026_419_200, 70_272),
    ],
    ids=["llama-3-8b", "qwen-2.5-0.5b", "deepseek-v3"],
)
def test_parameters_and_cache_are_those_that_were_published(config: dict[str, Any], parameters: int, kv: int) -> None:
    assert count_parameters(spec(config)).total == parameters
    assert kv_bytes(spec(config)) == kv


def test_every_parameter_of_a_checkpoint_is_counted(demo_model: Path, oracles: Path) -> None:
    stories = oracles / "weights" / "stories260K-hf"
    for model in (demo_model, stories):
        assert count_parameters(read_spec(model)).total == stored_parameters(model)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_token_takes_of_the_cache_what_the_engine_says(demo_model: Path, size: int) -> None:
    import torch

    from workers.engine.sizes import CACHE_SHARE as ENGINES
    from workers.engine.sizes import block_bytes
    from workers.kernels.plain import PlainOps
    from workers.parallel.share import Share

    demo, ops = read_spec(demo_model), PlainOps(torch.bfloat16)
    assert BLOCK * kv_bytes(demo, size) == block_bytes(demo, ops, Share(0, size))
    assert ENGINES["cuda"] == CACHE_SHARE


def test_weights_of_a_rank() -> None:
    llama = spec(LLAMA_3_8B)
    whole = rank_bytes(llama, 1)
    assert whole == 2 * 8_030_261_248
    norms = 2 * 65 * 4096  # bytes of what every rank has
    assert rank_bytes(llama, 8) == (whole - norms) // 8 + norms
    keys_and_values = 2 * 32 * 2 * 4096 * 1024
    assert rank_bytes(llama, 16) == (whole - norms - keys_and_values) // 16 + keys_and_values // 8 + norms
    deepseek = spec(DEEPSEEK_V3)
    experts = 2 * 58 * 256 * 3 * 7168 * 2048
    assert rank_bytes(deepseek, 1) - rank_bytes(deepseek, 1, hosts=8) == experts


@pytest.mark.parametrize(
    ("gpus", "memory", "degree", "replicas"),
    [(8, 80 * GB, 1, 8), (8, 24 * GB, 1, 8), (8, 16 * GB, 2, 4), (8, 8 * GB, 4, 2), (4, 8 * GB, 4, 1)],
)
def test_the_smallest_degree_that_has_room(gpus: int, memory: int, degree: int, replicas: int) -> None:
    sizes = plan_sizes(spec(LLAMA_3_8B), Wish(gpus, memory))
    assert (sizes.tensor_parallel, sizes.replicas, sizes.gpus) == (degree, replicas, gpus)
    left = memory - GPU_RESERVE - sizes.weights_per_rank
    assert sizes.cache_per_rank <= 0.8 * left < sizes.cache_per_rank + 16 * 131_072
    assert sizes.cache_tokens >= sizes.context == 8192
    (pod,) = sizes.pods
    assert (pod.count, pod.gpus, pod.cpus) == (replicas, degree, 4 * degree)


def test_a_longer_cache_takes_a_higher_degree() -> None:
    one = plan_sizes(spec(LLAMA_3_8B), Wish(8, 24 * GB))
    assert one.contexts == 4
    many = plan_sizes(spec(LLAMA_3_8B), Wish(8, 24 * GB, streams=5))
    assert many.tensor_parallel == 2
    assert many.contexts >= 5


def test_experts_on_hosts_of_their_own() -> None:
    deepseek = spec(DEEPSEEK_V3)
    with pytest.raises(ConfigError, match="does not fit 64 GPUs"):
        plan_sizes(deepseek, Wish(64, 80 * GB, context=32768))
    sizes = plan_sizes(deepseek, Wish(64, 80 * GB, context=32768, expert_hosts=32, replicas=1))
    assert sizes.experts_per_host == 2 * 58 * 256 * 3 * 7168 * 2048 // 32
    assert [(p.role, p.count, p.gpus) for p in sizes.pods] == [
        ("shard", 1, sizes.tensor_parallel),
        ("expert-host", 32, 1),
    ]
    with pytest.raises(ConfigError, match=r"give at least 17"):
        plan_sizes(deepseek, Wish(64, 80 * GB, context=32768, expert_hosts=8))


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        (Wish(8, 80 * GB, context=9000), "--context = 9000"),
        (Wish(8, 80 * GB, expert_hosts=2), "--expert-hosts = 2"),
        (Wish(1, 8 * GB), "1: 15.0 GiB of weights leave 0.0 GiB"),
        (Wish(2, 80 * GB, replicas=3), "too few"),
    ],
)
def test_what_cannot_be_is_refused_with_numbers(wish: Wish, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_sizes(spec(LLAMA_3_8B), wish)


def run(tmp_path: Path, config: dict[str, Any], *flags: str) -> str:
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = CliRunner().invoke(app, ["plan", "--model", str(tmp_path), *flags], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_prints_flags_that_serve_takes(tmp_path: Path) -> None:
    flags = ["--gpus", "8", "--gpu-memory", "16GB"]
    text = run(tmp_path, LLAMA_3_8B, *flags)
    assert "8,030,261,248 parameters, 14.96 GiB in bfloat16; 131,072 bytes of cache per token" in text
    assert "pods: 4 x shard: 2 GPU(s), 8 CPUs" in text
    told = json.loads(run(tmp_path, LLAMA_3_8B, *flags, "--json"))
    assert (told["tensor_parallel"], told["replicas"], told["gpus"]) == (2, 4, 8)
    config = load(told["settings"])
    (model,) = config.models
    assert (model.tensor_parallel, model.replicas.least, model.replicas.most, model.device) == (2, 4, 4, "cuda")


def test_the_command_prints_what_the_manifests_take(tmp_path: Path) -> None:
    tree = yaml.safe_load(run(tmp_path, LLAMA_3_8B, "--gpus", "8", "--gpu-memory", "16GB", "--yaml"))
    config = load(tree=tree["args"])
    assert config.models[0].tensor_parallel == 2
    (group,) = tree["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (group["groupName"], group["replicas"], limits["nvidia.com/gpu"], limits["cpu"]) == ("shards", 4, 2, "8")


def test_a_plan_for_cpus_takes_no_gpu(tmp_path: Path) -> None:
    told = json.loads(run(tmp_path, QWEN_2_5_HALF_B, "--context", "4096", "--streams", "4", "--json"))
    (pod,) = told["pods"]
    assert (pod["gpus"], pod["count"], told["cache_tokens"]) == (0, 1, 4 * 4096)
    assert pod["memory"] >= 2 * 494_032_768 + 4 * 4096 * 12_288
