"""Mixtures whose experts are served by hosts of their own have the bits of those that are not."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import greedy, open_runner, random_prompt
from mixtures import CASES, make_mixture, write_fp8, write_mxfp4

sys.path.insert(0, str(Path(__file__).parents[1] / "unit" / "experts"))
from expert_stage import hosts_of, plan_of, runner_over, spread

from workers.engine.contract import Probe, TokenTrace
from workers.engine.plan import Chunk, StepPlan
from workers.engine.runner import Runner

Written = Callable[[str], tuple[transformers.PreTrainedModel, Path]]


def same_bits(
    path: Path, hosts: int, kernels: str, dtype: str, copies: int = 1, tcp: bool = False, halves: bool = False
) -> None:
    prompts = [random_prompt(n, 160, seed=n) for n in (1, 37, 18)]
    home = open_runner(path, kernels, dtype=dtype)
    want = greedy(home, prompts, 8, sizes=[5, 33, 1])
    with hosts_of(path, hosts, kernels=kernels, dtype=dtype) as there:
        names = [h.address.name for h in there]
        placement = spread(path, names, copies=copies)
        for host in there:
            host.hold(placement.held_by(host.address.name))
        runner = runner_over(path, plan_of(placement, there, tcp=tcp), kernels=kernels, dtype=dtype)
        runner.overlap.forced = halves
        try:
            got = greedy(runner, prompts, 8, sizes=[5, 33, 1])
            assert runner.experts is not None
            assert runner.experts.report().exchanges > 0
        finally:
            runner.close()
        assert sum(sum(map(sum, h.report().rows)) for h in there) > 0
    for ours, theirs in zip(got, want, strict=True):
        assert ours.made == theirs.made
        assert torch.equal(torch.stack(ours.logits), torch.stack(theirs.logits))


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_experts_at_home(written: Written, name: str, hosts: int) -> None:
    """Over one and two hosts each step as a whole, over four in halves."""
    same_bits(written(name)[1], hosts, "native", "bfloat16" if hosts == 2 else "float32", halves=hosts == 4)


@pytest.mark.parametrize("name", ["qwen2-moe", "gpt-oss"])
def test_plain_torch(written: Written, name: str) -> None:
    same_bits(written(name)[1], 2, "plain", "float32")


def test_hot_experts_at_several_hosts(written: Written) -> None:
    same_bits(written("olmoe-64-experts")[1], 3, "native", "float16", copies=2)


def test_over_tcp(written: Written) -> None:
    same_bits(written("deepseek-v3")[1], 2, "native", "bfloat16", tcp=True)


def test_quantized(tmp_path: Path) -> None:
    """MXFP4 and FP8 are read expert by expert."""
    for name, write in (
        ("gpt-oss", write_mxfp4),
        ("deepseek-v3", lambda source, target: write_fp8(source, target, mtp=False)),
    ):
        source, target = tmp_path / f"{name}-source", tmp_path / name
        target.mkdir()
        make_mixture(name).to(torch.bfloat16).save_pretrained(source)
        write(source, target)
        same_bits(target, 2, "native", "bfloat16")


def test_what_layers_did_can_be_seen(written: Written) -> None:
    """Experts that each layer chose, and what rows attended to, are told as with experts at home."""
    path = written("qwen2-moe")[1]
    probe = Probe(experts=True, attention=[1])

    def seen(runner: Runner) -> list[TokenTrace]:
        table = array("i", range(3))
        chunk = Chunk("s", 0, random_prompt(33, 160, seed=3), (table,) * len(runner.info.windows), 1, probe=probe)
        runner.run(StepPlan(0, [chunk]))
        assert chunk.seen is not None
        return chunk.seen

    want = seen(open_runner(path, "native"))
    assert [len(e.experts) for e in want[0].experts] == [2] * 3
    with hosts_of(path, 2, kernels="native") as there:
        runner = runner_over(path, plan_of(spread(path, ["h0", "h1"]), there), kernels="native")
        assert seen(runner) == want
        runner.close()
