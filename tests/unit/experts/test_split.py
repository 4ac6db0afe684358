"""Which host gets which rows of a step: one of the experts' homes, and the slowest host as early as may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.experts.placement import Homes
from workers.experts.split import NOBODY, READ_ROWS, Split


def homes(*of: tuple[int, ...]) -> list[Homes]:
    return [tuple((host, 1 / len(hosts)) for host in hosts) for hosts in of]


def work(experts: np.ndarray, hosts: np.ndarray, count: int) -> list[int]:
    """What each host has to do, in rows."""
    total = [0] * count
    for expert in set(experts.tolist()):
        for host in range(count):
            rows = int(((experts == expert) & (hosts == host)).sum())
            total[host] += rows + READ_ROWS if rows else 0
    return total


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Homes], list[np.ndarray]]:
    hosts, experts = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    of = st.lists(st.integers(0, hosts - 1), max_size=hosts, unique=True).map(tuple)
    steps = st.lists(st.integers(0, experts - 1), max_size=300).map(lambda each: np.array(each, np.int32))
    return homes(*draw(st.lists(of, min_size=experts, max_size=experts))), draw(st.lists(steps, max_size=4))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_row_goes_to_a_home_of_its_expert(case: tuple[list[Homes], list[np.ndarray]]) -> None:
    table, steps = case
    split, again = Split(table), Split(table)
    for experts in steps:
        hosts = split(experts)
        assert hosts.shape == experts.shape
        for expert, host in zip(experts.tolist(), hosts.tolist(), strict=True):
            assert host in {home for home, _ in table[expert]} or (host == NOBODY and not table[expert])
        assert np.array_equal(hosts, again(experts)), "the same history, the same split"


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("table", [homes((0,), (1,)), homes((0, 1), (1,))])
def test_an_expert_that_there_is_not_is_refused(table: list[Homes], dtype: type) -> None:
    for wrong in (2, -1):
        with pytest.raises(IndexError):
            Split(table)(np.array([0, wrong], dtype))
    assert len(Split(table)(np.array([0, 1], dtype))) == 2


def test_few_rows_of_an_expert_stay_together_and_even_out_what_others_leave() -> None:
    """Experts 0 to 4 are at host 0 alone, 5 and 6 at host 1; 7 to 9 at both."""
    split = Split(homes(*[(0,)] * 5, *[(1,)] * 2, *[(0, 1)] * 3))
    experts = np.array([0, 1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 9, 9], np.int32)
    hosts = split(experts)
    assert hosts[7:].tolist() == [1] * 6
    assert work(experts, hosts, 2) == [5 * (READ_ROWS + 1), 2 * (READ_ROWS + 1) + 3 * (READ_ROWS + 2)]


def test_many_rows_are_poured_up_to_one_level() -> None:
    split = Split(homes((0, 1, 2), (0,), (2,)))
    experts = np.repeat(np.array([0, 1, 2], np.int32), [300, 60, 500])
    hosts = split(experts)
    busy = work(experts, hosts, 3)
    assert busy[2] == 500 + READ_ROWS, "it has enough to do"
    assert abs(busy[0] - busy[1]) <= 1


def test_single_rows_take_turns() -> None:
    split = Split(homes((0, 1), (1, 0)))
    hosts = [int(split(np.array([0], np.int32))[0]) for _ in range(10)]
    assert sorted(hosts) == [0] * 5 + [1] * 5


@pytest.mark.parametrize("spare", [0, 4, 8, 16])
def test_second_homes_shorten_steps(spare: int) -> None:
    """16 rows, each of 8 of 64 experts, on 2 hosts: what a step loses by the slower one."""
    dice = np.random.default_rng(spare)
    table = homes(*[(e % 2,) if e >= spare else (e % 2, 1 - e % 2) for e in range(64)])
    split, mean, most = Split(table), 0.0, 0
    for _ in range(200):
        experts = np.concatenate([dice.permutation(64)[:8] for _ in range(16)]).astype(np.int32)
        busy = work(experts, split(experts), 2)
        mean, most = mean + sum(busy) / 2, most + max(busy)
    lost = 1 - mean / most
    assert lost < {0: 0.08, 4: 0.04, 8: 0.01, 16: 0.01}[spare]
    assert lost > 0.03 if spare == 0 else True
