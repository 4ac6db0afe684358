"""Dense families equal transformers: logits and greedy tokens, beside a mate, in chunks, after a prefix hit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import check, greedy, open_runner, random_prompt
from dense import CASES
from safetensors.torch import load_file, save_file

from workers.engine.build import build_engine
from workers.engine.contract import EngineConfig, Request, Sampling
from workers.kernels.plain import PlainOps
from workers.model.config import parse_config, read_spec

Written = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
KERNELS = ("plain", "native")


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(written: Written, name: str, kernels: str) -> None:
    model, path = written(name)
    check(model, open_runner(path, kernels))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name", ["gemma2", "gemma3", "gpt2", "opt-post-norm", "neox", "olmo2", "phi3-longrope-long-prompt"]
)
def test_bits_do_not_depend_on_chunks_and_mates(written: Written, name: str, dtype: str, kernels: str) -> None:
    _, path = written(name)
    runner = open_runner(path, kernels, dtype=dtype)
    prompts = [random_prompt(n, 160, seed=n) for n in (1, 16, 37, 50)]
    mixed = greedy(runner, prompts, 10, sizes=[5, 16, 1, 33])
    for stream, prompt in zip(mixed, prompts, strict=True):
        (alone,) = greedy(runner, [prompt], 10, sizes=[100])
        assert alone.made == stream.made
        assert torch.equal(torch.stack(alone.logits), torch.stack(stream.logits))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gpt2", "olmo2"])
def test_sixteen_bits_stay_near_float32(written: Written, name: str, dtype: torch.dtype, kernels: str) -> None:
    """No further from the float32 answer than transformers in the same dtype, with a half more for luck."""
    model, path = written(name)
    prompt = random_prompt(41, 160, seed=2)
    with torch.inference_mode():
        exact = model(torch.tensor([prompt])).logits[0]
        theirs = type(model)(model.config).to(dtype).eval()
        theirs.load_state_dict(model.state_dict())
        bound = (theirs(torch.tensor([prompt])).logits[0].float() - exact).abs().max().item()
    runner = open_runner(path, kernels, dtype=str(dtype).removeprefix("torch."))
    (stream,) = greedy(runner, [prompt], 1, sizes=[41])
    assert (stream.logits[0] - exact[-1]).abs().max().item() < 1.5 * bound


@pytest.mark.parametrize(
    ("name", "root"), [("gpt2", "transformer."), ("opt", "model."), ("neox", "gpt_neox."), ("llama-yarn", "model.")]
)
def test_names_without_their_root(written: Written, name: str, root: str, tmp_path: Path) -> None:
    """As files saved from the model without its head have them (openai-community/gpt2)."""
    _, path = written(name)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    tensors = {k.removeprefix(root): v for k, v in load_file(path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    prompt = random_prompt(20, 160, seed=3)
    (want,) = greedy(open_runner(path, "plain"), [prompt], 2, sizes=[20])
    (got,) = greedy(open_runner(tmp_path, "plain"), [prompt], 2, sizes=[20])
    assert torch.equal(torch.stack(want.logits), torch.stack(got.logits))


OLDER: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "llama-yarn": lambda rope: {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope},
    "llama-dynamic": lambda rope: {"rope_scaling": {"type": "dynamic", "factor": rope["factor"]}},
    "phi3-longrope-window": lambda rope: {
        "rope_scaling": {"type": "su", "short_factor": rope["short_factor"], "long_factor": rope["long_factor"]}
    },
    "phi3-partial": lambda rope: {"partial_rotary_factor": rope["partial_rotary_factor"], "rope_scaling": None},
    "neox-one-after-the-other": lambda rope: {
        "rotary_pct": 1.0,
        "rotary_emb_base": 10000,
        "rope_scaling": {"type": "linear", "factor": rope["factor"]},
    },
    "gemma3-scaled-caps": lambda rope: {
        "rope_theta": 500.0,
        "rope_local_base_freq": 100.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


@pytest.mark.parametrize("name", OLDER)
def test_configurations_of_before_transformers_5(written: Written, name: str, tmp_path: Path) -> None:
    _, path = written(name)
    config = json.loads((path / "config.json").read_text())
    config |= OLDER[name](config.pop("rope_parameters")) | {"torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_spec(tmp_path) == read_spec(path)


@pytest.mark.parametrize(("name", "pattern"), [("gemma3", 6), ("gemma2", None)])
def test_layers_with_a_window_where_the_configuration_does_not_list_them(
    written: Written, name: str, pattern: int | None
) -> None:
    _, path = written(name)
    config = json.loads((path / "config.json").read_text())
    del config["layer_types"]
    assert parse_config(config | {"sliding_window_pattern": pattern}) == read_spec(path)


def test_long_prompts_share_no_blocks_with_short_ones(written: Written) -> None:
    """The answer to a short prompt grows beyond the original context and stays one; the same ids as a prompt do not."""
    _, path = written("phi3-longrope-long-prompt")
    engine = build_engine(EngineConfig(model_dir=str(path), kernels="plain", threads=1, cache_bytes=1 << 22))

    def answer(id: str, prompt: list[int]) -> tuple[list[int], int | None]:
        engine.add(Request(id=id, prompt=prompt, max_tokens=20, sampling=Sampling(temperature=0)))
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        assert not outputs[-1].error
        return [token for output in outputs for token in output.token_ids], outputs[0].cached_tokens

    short = random_prompt(33, 160, seed=33)
    made, _ = answer("short", short)
    long = [*short, *made]
    first, cached = answer("long", long)
    assert cached == 0
    assert answer("again", long) == (first, 48)
    assert answer("short again", short) == (made, 32)
    engine.check_idle()
    engine.close()


def test_groups_of_the_cache(written: Written) -> None:
    """Layers of one window are one group of the cache, those that see everything another."""
    spec = read_spec(written("gemma3")[1])
    assert [(group.window, group.layers) for group in spec.groups] == [(20, (0, 1, 2, 3, 4, 6)), (None, (5,))]


def test_bytes_of_a_position_at_published_sizes() -> None:
    """Llama-3-8B has 8 of 32 heads: a quarter of what as many heads of keys as of queries would take."""
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "intermediate_size": 14336}
    llama = {"architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "max_position_embeddings": 8192} | sizes
    ops = PlainOps(torch.bfloat16)

    def each(**changes: int) -> int:
        spec = parse_config(llama | changes)
        a = spec.attention
        assert a.values_per_token == 2 * a.kv_heads * 128
        return ops.cache_block_bytes(spec.layers, a.cache_heads, a.cache_dim) // 16

    assert each(num_key_value_heads=8) == 131072
    assert 4 * each(num_key_value_heads=8) == each(num_key_value_heads=32)
