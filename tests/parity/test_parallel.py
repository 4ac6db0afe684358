"""A model divided over 2 and 4 ranks gives one process's greedy tokens, and under the invariant option its bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import CASES as FIRST
from checkpoints import greedy, random_prompt
from dense import CASES as DENSE
from mixtures import CASES as MIXTURES
from mixtures import write_fp8, write_mxfp4
from ranks import divided_runner
from torch import Tensor

from workers.engine.contract import EngineConfig
from workers.model.config import read_spec
from workers.parallel.share import misfit

Written = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
PROMPTS = [random_prompt(n, 160, seed=n) for n in (41, 18)]
NEW = 8
SIXTEEN_BITS = ("llama-gqa", "gpt2", "olmo2", "neox", "gemma3", "qwen2-moe", "gpt-oss", "deepseek-v3")


def answers(path: Path, size: int, **config: Any) -> tuple[list[list[int]], list[Tensor]]:
    """Greedy tokens of each prompt and the logits that they were taken from, in chunks, side by side."""
    with divided_runner(EngineConfig(str(path), threads=1, max_running=4, tensor_parallel=size, **config)) as runner:
        streams = greedy(runner, PROMPTS, NEW, sizes=[13, 7])
    return [s.made for s in streams], [torch.stack(s.logits) for s in streams]


def degrees(path: Path, **options: bool) -> list[int]:
    spec = read_spec(path)
    return [size for size in (2, 4) if not misfit(spec, size, *options.values())]


@pytest.mark.parametrize("name", [*FIRST, *DENSE, *MIXTURES])
def test_greedy_tokens_are_those_of_one_process(written: Written, name: str) -> None:
    _, path = written(name)
    tokens, logits = answers(path, 1)
    sizes = degrees(path)
    assert sizes, "every case can be divided somehow"
    for size in sizes:
        got, theirs = answers(path, size)
        assert got == tokens
        assert max((a - b).abs().max().item() for a, b in zip(logits, theirs, strict=True)) < 1e-4


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float32") for name in (*FIRST, *DENSE, *MIXTURES)] + [(name, "bfloat16") for name in SIXTEEN_BITS],
)
def test_the_invariant_option_gives_the_same_bits_at_every_degree(written: Written, name: str, dtype: str) -> None:
    _, path = written(name)
    sizes = degrees(path, invariant=True)
    tokens, logits = answers(path, 1, dtype=dtype, tensor_parallel_invariant=True)
    for size in sizes:
        got, theirs = answers(path, size, dtype=dtype, tensor_parallel_invariant=True)
        assert got == tokens
        assert all(torch.equal(a, b) for a, b in zip(logits, theirs, strict=True))


@pytest.mark.parametrize("name", MIXTURES)
def test_whole_experts_spread_over_ranks(written: Written, name: str) -> None:
    _, path = written(name)
    tokens, logits = answers(path, 1)
    for size in degrees(path, invariant=False, whole=True):
        got, theirs = answers(path, size, expert_parallel=True)
        assert got == tokens
        assert max((a - b).abs().max().item() for a, b in zip(logits, theirs, strict=True)) < 1e-4


@pytest.mark.parametrize("name", ["mixtral", "olmoe-64-experts", "deepseek-v3", "gpt-oss"])
def test_whole_experts_under_the_invariant_option(written: Written, name: str) -> None:
    _, path = written(name)
    option = {"tensor_parallel_invariant": True, "expert_parallel": True}
    tokens, logits = answers(path, 1, **option)
    for size in degrees(path, invariant=True, whole=True):
        got, theirs = answers(path, size, **option)
        assert got == tokens
        assert all(torch.equal(a, b) for a, b in zip(logits, theirs, strict=True))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("name", "write"), [("gpt-oss", write_mxfp4), ("deepseek-v3", write_fp8)])
def test_quantized_weights_in_slices(
    written: Written, name: str, write: Callable[..., None], whole: bool, tmp_path: Path
) -> None:
    _, path = written(name)
    write(path, tmp_path, *((False,) if write is write_fp8 else ()))
    tokens, _ = answers(tmp_path, 1)
    assert answers(tmp_path, 2, expert_parallel=whole)[0] == tokens
