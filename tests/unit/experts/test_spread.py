"""Whole experts at the ranks of a group, which move from one to the other while steps go on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from expert_stage import spread
from ranks import Divided, divided_runner
from test_expert_hosts import step, until

from workers.engine.contract import EngineConfig
from workers.experts.placement import HostsView, Placement, spread_placement
from workers.experts.spread import Spread

RANKS = ["r0", "r1"]


def config(path: Path, size: int = 2) -> EngineConfig:
    return EngineConfig(
        str(path), kernels="plain", threads=1, max_running=4, tensor_parallel=size, expert_parallel=True
    )


def parts(runner: Divided) -> list[Spread]:
    found = [r.experts for r in runner.runners]
    assert all(isinstance(part, Spread) for part in found)
    return found  # type: ignore[return-value]


def tell(runner: Divided, number: int, placement: Placement) -> None:
    """As a group is told: the leader last."""
    for part in reversed(parts(runner)):
        part.offer(HostsView(number, placement, ()))


def test_experts_move_and_no_bit_changes(mixture: Path) -> None:
    with divided_runner(config(mixture)) as runner:
        want = step(runner)  # type: ignore[arg-type]
        assert [part.report().view for part in parts(runner)] == [0, 0]
        turned, twice = spread(mixture, RANKS, version=2, shift=1), spread(mixture, RANKS, version=3, copies=2)
        for number, placement in enumerate((turned, twice), 1):
            for name, part in zip(RANKS, parts(runner), strict=True):
                part.hold(placement.held_by(name))
            until(lambda placement=placement: all(p.host("").held >= placement.copies / 2 for p in parts(runner)))
            tell(runner, number, placement)
            assert torch.equal(step(runner), want)  # type: ignore[arg-type]
            said = [part.report() for part in parts(runner)]
            assert [(r.version, r.view) for r in said] == [(placement.version, number)] * 2, "both in the same step"
            for name, part in zip(RANKS, parts(runner), strict=True):
                part.keep(placement.held_by(name))
            assert sum(part.host("").held for part in parts(runner)) == placement.copies
            assert torch.equal(step(runner), want)  # type: ignore[arg-type]


def test_what_a_rank_has_not_loaded_yet_it_loads_in_the_step(mixture: Path) -> None:
    with divided_runner(config(mixture)) as runner:
        want = step(runner)  # type: ignore[arg-type]
        tell(runner, 1, spread(mixture, RANKS, version=2, shift=1))
        assert torch.equal(step(runner), want)  # type: ignore[arg-type]


def test_every_row_is_computed_once_and_counted(mixture: Path) -> None:
    with divided_runner(config(mixture)) as runner:
        tell(runner, 1, spread(mixture, RANKS, version=2, copies=2))
        logits = step(runner)  # type: ignore[arg-type]
        rows = sum(torch.tensor(part.host("").rows) for part in parts(runner))
        assert rows.sum(1).tolist() == [len(logits) * 2] * 3, "2 experts for each row of 3 layers"


def test_a_rank_says_what_it_has_and_has_room_for(mixture: Path) -> None:
    with divided_runner(config(mixture)) as runner:
        for rank, part in enumerate(parts(runner)):
            said = part.host("10.0.0.7")
            assert (said.address.name, said.node, said.held, said.asked) == (f"r{rank}", "10.0.0.7", 12, 12)
            assert said.address.capacity == 15, "one more for four of its own"


def test_a_view_that_was_not_handed_over_is_an_error(mixture: Path) -> None:
    with divided_runner(config(mixture)) as runner:
        with pytest.raises(RuntimeError, match="placement view 7 of the experts was not handed to this rank"):
            parts(runner)[1].adopt(7)
        tell(runner, 2, spread(mixture, RANKS, version=2))
        tell(runner, 1, spread(mixture, RANKS, version=2, shift=1))
        step(runner)  # type: ignore[arg-type]
        assert parts(runner)[1].report().view == 2, "an older one is passed over"


@pytest.mark.parametrize(("experts", "ranks"), [((8,), 2), ((8, 5), 3), ((4,), 4)])
def test_the_first_placement_is_even_and_in_runs(experts: tuple[int, ...], ranks: int) -> None:
    placement = spread_placement(range(len(experts)), experts, ranks)
    for row, count in zip(placement.table, experts, strict=True):
        homes = [of[0][0] for of in row]
        assert homes == sorted(homes)
        assert {homes.count(rank) for rank in range(ranks)} <= {count // ranks, -(-count // ranks)}
