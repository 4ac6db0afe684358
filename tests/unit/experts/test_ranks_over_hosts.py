"""A model divided over ranks whose experts are on hosts of their own, with hosts that die under both ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_stage import hosts_of, plan_of, spread
from ranks import divided_runner
from test_expert_hosts import step

from workers.engine.contract import EngineConfig


def config(path: Path, size: int, **more: object) -> EngineConfig:
    return EngineConfig(
        model_dir=str(path), kernels="plain", threads=1, max_running=4, tensor_parallel=size, **more  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(mixture: Path) -> torch.Tensor:
    """One process over one host."""
    with hosts_of(mixture, 1, kernels="plain") as hosts:
        placement = spread(mixture, ["h0"])
        hosts[0].hold(placement.held_by("h0"))
        plan = plan_of(placement, hosts)
        with divided_runner(config(mixture, 1, tensor_parallel_invariant=True, experts=plan)) as runner:
            return step(runner)  # type: ignore[arg-type]


def test_whole_experts_and_sliced_ones_never_pass_for_the_same(mixture: Path, alone: torch.Tensor) -> None:
    """With experts at home every rank of an invariant model has a part of each: its sums are cut otherwise."""
    with divided_runner(config(mixture, 1, tensor_parallel_invariant=True)) as home:
        assert not torch.equal(step(home), alone)  # type: ignore[arg-type]
        assert "whole-experts" not in home.info.numerics_id


@pytest.mark.parametrize("halves", [False, True])
def test_two_ranks_over_two_hosts_have_the_bits_of_one_process_and_keep_them(
    mixture: Path, alone: torch.Tensor, halves: bool
) -> None:
    with hosts_of(mixture, 2, kernels="plain") as hosts:
        placement = spread(mixture, [h.address.name for h in hosts])
        for host in hosts:
            host.hold(placement.held_by(host.address.name))
        plan = plan_of(placement, hosts)
        with divided_runner(config(mixture, 2, tensor_parallel_invariant=True, experts=plan)) as apart:
            assert apart.info.numerics_id.endswith("/tree-8/whole-experts")
            apart.leader.overlap.forced = halves
            assert torch.equal(step(apart), alone)  # type: ignore[arg-type]
            hosts[1].stop()
            assert torch.equal(step(apart), alone)  # type: ignore[arg-type]
