"""Logits and greedy tokens equal those of transformers, for every architecture and several shapes of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import CASES, MODELS, PROMPT, check, greedy, open_runner, random_prompt
from dense import CASES as DENSE
from mixtures import CASES as MIXTURES
from safetensors.torch import load_file, save_file

from workers.model.config import ARCHITECTURES, read_spec

Written = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
EXACT = ("plain", "native", "cuda")  # these keep the row law
KERNELS = (*EXACT, "cuda-fast")


def test_every_architecture_has_a_case() -> None:
    families = {family for cases in (CASES, DENSE, MIXTURES) for family, _ in cases.values()}
    assert {MODELS.get(family, f"{family}ForCausalLM") for family in families} == set(ARCHITECTURES)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens(written: Written, name: str, kernels: str) -> None:
    model, path = written(name)
    check(model, open_runner(path, kernels), exact=kernels in EXACT)


@pytest.mark.parametrize("kernels", EXACT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama3-rope", "qwen2-two-groups", "qwen3-moe-first-dense"])
def test_bits_do_not_depend_on_chunks_and_mates(written: Written, name: str, dtype: str, kernels: str) -> None:
    _, path = written(name)
    runner = open_runner(path, kernels, dtype=dtype)
    prompts = [random_prompt(n, 160, seed=n) for n in (1, 16, 37, 50)]
    mixed = greedy(runner, prompts, 12, sizes=[5, 16, 1, 33])
    for stream, prompt in zip(mixed, prompts, strict=True):
        (alone,) = greedy(runner, [prompt], 12, sizes=[100])
        assert alone.made == stream.made
        assert torch.equal(torch.stack(alone.logits), torch.stack(stream.logits))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-gqa", "mixtral"])
def test_sixteen_bits_stay_near_float32(written: Written, name: str, dtype: torch.dtype, kernels: str) -> None:
    """No further from the float32 answer than transformers in the same dtype, with a half more for luck."""
    model, path = written(name)
    prompt = random_prompt(PROMPT, 160, seed=2)
    with torch.inference_mode():
        exact = model(torch.tensor([prompt])).logits[0, -1]
        theirs = type(model)(model.config).to(dtype).eval()
        theirs.load_state_dict(model.state_dict())
        bound = (theirs(torch.tensor([prompt])).logits[0, -1].float() - exact).abs().max().item()
    runner = open_runner(path, kernels, dtype=str(dtype).removeprefix("torch."))
    (stream,) = greedy(runner, [prompt], 1, sizes=[PROMPT])
    assert (stream.logits[0] - exact).abs().max().item() < 1.5 * bound


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe-first-dense", "deepseek-v3"])
def test_fused_experts_are_the_same_model(written: Written, name: str, tmp_path: Path) -> None:
    """The form in which transformers 5 holds experts in memory may be on disk, too."""
    model, path = written(name)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert any(k.endswith("experts.gate_up_proj") for k in load_file(tmp_path / "model.safetensors"))
    prompt = random_prompt(20, 160, seed=3)
    (want,) = greedy(open_runner(path, "plain"), [prompt], 4, sizes=[20])
    (got,) = greedy(open_runner(tmp_path, "plain"), [prompt], 4, sizes=[20])
    assert torch.equal(torch.stack(want.logits), torch.stack(got.logits))


def test_configurations_of_before_transformers_5_are_the_same_model(written: Written, tmp_path: Path) -> None:
    _, path = written("llama3-rope")
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_spec(tmp_path) == read_spec(path)


@pytest.mark.oracles
@pytest.mark.parametrize(
    ("kernels", "size"), [("plain", 1), ("plain", 512), ("native", 1), ("native", 7), ("cuda", 512)]
)
def test_golden_greedy_ids(oracles: Path, kernels: str, size: int) -> None:
    path = oracles / "weights" / "stories260K-hf"
    golden = json.loads((path / "golden_greedy.json").read_text())
    (stream,) = greedy(open_runner(path, kernels), [golden["prompt_ids"]], golden["max_new_tokens"], sizes=[size])
    assert stream.made == golden["greedy_ids"]


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_bundled_model(demo_model: Path, kernels: str) -> None:
    if not (demo_model / "model.safetensors").is_file():
        pytest.skip(f"no weights in {demo_model}")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    prompt = random_prompt(PROMPT, model.config.vocab_size, seed=4)
    with torch.inference_mode():
        want = model(torch.tensor([prompt])).logits[0, -1]
    (stream,) = greedy(open_runner(demo_model, kernels, dtype="float32"), [prompt], 1, sizes=[16])
    assert (stream.logits[0] - want).abs().max().item() < 1e-4 * max(1.0, want.abs().max().item())
