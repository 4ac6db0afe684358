"""Mixtures of experts and latent attention equal transformers: alone, in a batch, in chunks, after a prefix hit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import PROMPT, check, greedy, open_runner, random_prompt
from mixtures import BLOCK, CASES, make_mixture, write_fp8, write_mxfp4
from safetensors.torch import load_file, save_file
from test_invariance import check as alone_and_mixed
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from understudy.errors import CheckpointError

Written = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
KERNELS = ("plain", "native")


@pytest.mark.parametrize(
    ("name", "kernels"),
    [(name, kernels) for name in CASES for kernels in KERNELS]
    + [(name, "cuda") for name in ("qwen2-moe", "gpt-oss", "deepseek-v3")],
)
def test_logits_and_greedy_tokens(written: Written, name: str, kernels: str) -> None:
    model, path = written(name)
    check(model, open_runner(path, kernels))


@pytest.mark.parametrize("name", ["qwen2-moe", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize(
    ("kernels", "dtype"), [("plain", "bfloat16"), ("native", "bfloat16"), ("native", "float16"), ("native", "float32")]
)
def test_bits_do_not_depend_on_chunks_and_mates(written: Written, name: str, dtype: str, kernels: str) -> None:
    _, path = written(name)
    runner = open_runner(path, kernels, dtype=dtype)
    prompts = [random_prompt(n, 160, seed=n) for n in (1, 16, 37, 50)]
    mixed = greedy(runner, prompts, 12, sizes=[5, 16, 1, 33])
    for stream, prompt in zip(mixed, prompts, strict=True):
        (alone,) = greedy(runner, [prompt], 12, sizes=[100])
        assert alone.made == stream.made
        assert torch.equal(torch.stack(alone.logits), torch.stack(stream.logits))


@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_the_law_in_a_crowded_engine(name: str, tmp_path: Path) -> None:
    """Random requests alone and mixed, over a cache that preempts; blocks behind gpt-oss's windows are given back."""
    make_mixture(name, vocab_size=503, max_position_embeddings=256, initializer_range=0.3).save_pretrained(tmp_path)
    alone_and_mixed(tmp_path, "bfloat16", "native", 60)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt-oss", "deepseek-v3"])
def test_sixteen_bits_stay_near_float32(written: Written, name: str, dtype: torch.dtype, kernels: str) -> None:
    """No further from the float32 answer than transformers in the same dtype, with a half more for luck."""
    model, path = written(name)
    prompt = random_prompt(PROMPT, 160, seed=2)
    with torch.inference_mode():
        exact = model(torch.tensor([prompt])).logits[0]
        theirs = type(model)(model.config).to(dtype).eval()
        theirs.load_state_dict(model.state_dict())
        bound = (theirs(torch.tensor([prompt])).logits[0].float() - exact).abs().max().item()
    runner = open_runner(path, kernels, dtype=str(dtype).removeprefix("torch."))
    (stream,) = greedy(runner, [prompt], 1, sizes=[PROMPT])
    assert (stream.logits[0] - exact[-1]).abs().max().item() < 1.5 * bound


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("qwen2-moe", "model.layers.0.mlp.shared_expert_gate.weight"),
        ("qwen2-moe", "model.layers.0.mlp.shared_expert.up_proj.weight"),
        ("gpt-oss", "model.layers.1.self_attn.sinks"),
        ("gpt-oss", "model.layers.1.mlp.router.bias"),
        ("gpt-oss", "model.layers.2.mlp.experts.gate_up_proj_bias"),
        ("deepseek-v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("deepseek-v3", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"),
        ("deepseek-v3", "model.layers.2.mlp.experts.15.down_proj.weight"),
    ],
)
def test_missing_and_misshapen_tensors_are_named(written: Written, name: str, tensor: str, tmp_path: Path) -> None:
    path = written(name)[1]
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    whole = tensors.pop(tensor)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=re.escape(f"tensor {tensor} is missing")):
        open_runner(tmp_path, "plain")
    shape = list(whole.shape)
    save_file(tensors | {tensor: whole[:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=re.escape(f"{tensor} has shape {[shape[0] - 1, *shape[1:]]}, config.json")
    ):
        open_runner(tmp_path, "plain")


# Quantized checkpoints ----------------------------------------------------------------------------------------------


def dequantized(model: transformers.PreTrainedModel, path: Path) -> transformers.PreTrainedModel:
    """The reference with the weights that a quantized checkpoint stands for, by transformers' and torch's reading."""
    stored = load_file(path / "model.safetensors")
    values = {name: tensor for name, tensor in stored.items() if not name.endswith(("_blocks", "_scales", "_inv"))}
    for name, scale in stored.items():
        if name.endswith("_scales"):
            name = name.removesuffix("_scales")
            values[name] = convert_moe_packed_tensors(stored[f"{name}_blocks"], scale, dtype=torch.float32)
        if name.endswith("_scale_inv"):
            weight = stored[name := name.removesuffix("_scale_inv")].float()
            spread = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
            values[name] = weight * spread[: weight.shape[0], : weight.shape[1]]
    theirs = type(model)(model.config).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for name, tensor in state.items():
            block, _, part = name.rpartition(".")
            if name in values:
                tensor.copy_(values[name])
            else:  # one tensor of all experts, which the files keep one by one
                parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
                for expert, rows in enumerate(tensor):
                    rows.copy_(torch.cat([values[f"{block}.{expert}.{p}.weight"] for p in parts]))
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize("kernels", KERNELS)
def test_mxfp4(written: Written, kernels: str, tmp_path: Path) -> None:
    model, path = written("gpt-oss")
    write_mxfp4(path, tmp_path)
    theirs = dequantized(model, tmp_path)
    moved = theirs.model.layers[0].mlp.experts.down_proj - model.model.layers[0].mlp.experts.down_proj
    assert 0.001 < moved.abs().mean() < 0.05, "weights were rounded, and not to something else"
    check(theirs, open_runner(tmp_path, kernels))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-moe-first-dense"])
def test_fp8(written: Written, name: str, kernels: str, tmp_path: Path) -> None:
    model, path = written(name)
    write_fp8(path, tmp_path, mtp=name == "deepseek-v3")
    theirs = dequantized(model, tmp_path)
    moved = theirs.model.layers[1].self_attn.o_proj.weight - model.model.layers[1].self_attn.o_proj.weight
    assert 0.0005 < moved.abs().mean() < 0.05
    check(theirs, open_runner(tmp_path, kernels))
