"""Placements of experts: every one is somewhere, hot ones at several hosts, few move; and when a new one is made."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.experts import ENOUGH, balance, host_loads, make_placement, moves
from router.rebalance import ExpertsReport, HostState, Rebalancers, Rules
from understudy.errors import ConfigError
from workers.experts.placement import Placement


def zipf(experts: int, exponent: float = 1.0, shift: int = 0) -> list[float]:
    weights = [1000.0 / (rank + 1) ** exponent for rank in range(experts)]
    return [weights[(e * 7 + shift) % experts] for e in range(experts)] if experts % 7 else weights


def rooms(hosts: int, each: int) -> dict[str, int]:
    return {f"h{i}": each for i in range(hosts)}


def check(placement: Placement, experts: int, capacity: dict[str, int]) -> None:
    """What holds of every placement."""
    assert set(placement.hosts) == set(capacity)
    for row in placement.table:
        assert len(row) == experts
        for homes in row:
            assert homes
            assert len({host for host, _ in homes}) == len(homes)
            assert all(share >= 0 for _, share in homes)
            assert sum(share for _, share in homes) == pytest.approx(1.0)
    for host in placement.hosts:
        assert len(placement.held_by(host)) <= capacity[host]


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[list[list[float]]], list[dict[str, int]]]:
    """Loads that change, and hosts that come and go, step by step."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    load = st.one_of(st.just(0.0), st.floats(0, 1000), st.integers(0, 10**6).map(float))
    loads, capacities = [], []
    for _ in range(draw(st.integers(1, 4))):
        loads.append(
            draw(st.lists(st.lists(load, min_size=experts, max_size=experts), min_size=layers, max_size=layers))
        )
        names = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
        least = layers * -(-experts // len(names))
        capacities.append({f"h{i}": least + draw(st.integers(0, 2 * layers)) for i in names})
    return loads, capacities


@settings(max_examples=60, deadline=None)
@given(cases())
def test_every_expert_is_somewhere_whatever_comes(case: tuple[list[list[list[float]]], list[dict[str, int]]]) -> None:
    placement = None
    for loads, capacity in zip(*case, strict=True):
        layers = range(len(loads))
        made = make_placement(placement, layers, loads, capacity)
        check(made, len(loads[0]), capacity)
        assert made == make_placement(placement, layers, loads, capacity), "the same arguments, the same placement"
        assert made.version == (placement.version + 1 if placement else 1)
        again = make_placement(made, layers, loads, capacity)
        assert balance(again, loads) >= min(balance(made, loads), ENOUGH) - 0.02
        placement = made


@pytest.mark.parametrize("shift", range(5))
def test_a_skewed_load_is_balanced(shift: int) -> None:
    """Zipf 1.0 over 64 experts on 8 hosts, with room for two copies at each."""
    loads, capacity = [zipf(64, shift=shift)], rooms(8, 10)
    before = make_placement(None, [0], [[1.0] * 64], capacity)
    assert balance(before, loads) < 0.7
    after = make_placement(before, [0], loads, capacity)
    check(after, 64, capacity)
    assert balance(after, loads) >= 0.9
    assert moves(before, after) <= 24
    assert any(len(homes) > 1 for homes in after.table[0]), "the hottest expert alone is more than a host's part"


@pytest.mark.parametrize(("room", "copies"), [(32, 64), (33, 65), (36, 68), (64, 72)])
def test_even_loads_have_second_homes_where_there_is_room(room: int, copies: int) -> None:
    """One in eight, in half of what is free, on both sides; and they stay."""
    capacity, loads = rooms(2, 2 * room), [[1.0] * 64] * 2
    made = make_placement(None, [0, 1], loads, capacity)
    check(made, 64, capacity)
    assert [sum(map(len, row)) for row in made.table] == [copies, copies]
    both = [len(made.held_by(name)) for name in made.hosts]
    assert abs(both[0] - both[1]) <= 2
    assert moves(made, make_placement(made, [0, 1], loads, capacity)) == 0


def test_without_room_for_copies_experts_are_swapped() -> None:
    loads, capacity = [[8.0, 1.0, 8.0, 1.0, 1.0, 1.0, 1.0, 1.0]], rooms(2, 4)
    before = make_placement(None, [0], [[1.0] * 8], capacity)
    assert balance(before, loads) < 1
    after = make_placement(before, [0], loads, capacity)
    assert balance(after, loads) == 1.0
    assert moves(before, after) == 2


def test_what_is_balanced_stays() -> None:
    loads, capacity = [zipf(32, 0.5), zipf(32, 0.8, 3)], rooms(4, 20)
    first = make_placement(None, [0, 1], loads, capacity)
    again = make_placement(first, [0, 1], loads, capacity)
    assert moves(first, again) == 0


def test_hosts_that_come_take_their_part_and_of_those_that_go_the_others() -> None:
    loads = [[1.0] * 24]
    four = make_placement(None, [3], loads, rooms(4, 24))
    five = make_placement(four, [3], loads, rooms(5, 24))
    assert moves(four, five) <= 8
    assert balance(five, loads) >= 0.9
    gone = make_placement(five, [3], loads, dict.fromkeys(("h0", "h1", "h3", "h4"), 24))
    assert moves(five, gone) <= len(five.held_by("h2")) + 24 // 8, "nothing else moves, but for spare copies"
    assert host_loads(gone.table[0], loads[0], 4) == pytest.approx([6.0] * 4)


def test_too_little_room_is_refused_with_the_nearest_that_works() -> None:
    with pytest.raises(
        ConfigError, match=r"2 hosts have room for 20, 20 experts of the model's 64; 4 hosts of 20 would"
    ):
        make_placement(None, [0, 1], [[1.0] * 32] * 2, rooms(2, 20))
    with pytest.raises(ConfigError, match="give each more memory"):
        make_placement(None, [0, 1], [[1.0] * 32] * 2, rooms(2, 1))
    with pytest.raises(ConfigError, match="no host"):
        make_placement(None, [0], [[1.0]], {})


# When ----------------------------------------------------------------------------------------------------------------


class Stage:
    """A replica with two layers of 16 experts, whose hosts load what they are told at once."""

    def __init__(self) -> None:
        self.now = 0.0
        self.router = Rebalancers(lambda: self.now, Rules(window_s=10.0, rows_per_host=10))
        self.rows = [[0] * 16, [0] * 16]
        self.hosts = ["h0", "h1", "h2", "h3"]
        self.in_force: Placement | None = None
        self.versions: list[int] = []

    def report(self, seconds: float = 1.0, load: list[float] | None = None, epoch: int = 1) -> Placement:
        self.now += seconds
        for row in self.rows:
            for expert, more in enumerate(load or [0.0] * 16):
                row[expert] += int(more)
        hosts = tuple(HostState(name, 1, "ready", capacity=12) for name in self.hosts)
        order = self.router.hear(
            ExpertsReport("m", "m-0", epoch, (0, 1), (16, 16), hosts, tuple(map(tuple, self.rows)), self.in_force)
        )
        assert order.placement is not None
        self.in_force = order.placement
        self.versions.append(order.placement.version)
        return order.placement


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_skew_that_lasts_makes_one_new_placement(stage: Stage) -> None:
    for _ in range(60):
        stage.report(load=zipf(16))
    assert stage.versions[:9] == [1] * 9, "a window is measured first"
    assert set(stage.versions) == {1, 2}
    (view,) = stage.router.views()
    assert (view.version, view.target, view.wanted) == (2, 2, 4)
    assert view.balance >= 0.9
    assert 40 <= view.age_s <= 60


@pytest.mark.parametrize("load", [[5.0] * 16, [1.0] + [0.0] * 15], ids=["even", "small"])
def test_an_even_or_small_load_changes_nothing(stage: Stage, load: list[float]) -> None:
    for _ in range(30):
        stage.report(load=load)
    assert set(stage.versions) == {1}


def test_a_load_that_swings_does_not_make_it_flap(stage: Stage) -> None:
    for second in range(120):
        stage.report(load=zipf(16, shift=0 if second % 2 else 5))
    assert len(set(stage.versions)) <= 3


def test_hosts_that_come_and_go_are_placed_at_once(stage: Stage) -> None:
    stage.report()
    stage.hosts.append("h4")
    assert "h4" in stage.report().hosts
    stage.hosts.remove("h0")
    assert stage.report().hosts == ("h1", "h2", "h3", "h4")
    stage.hosts = ["h1"]  # too few for all: the placement stays, and says why
    assert stage.report().hosts == ("h1", "h2", "h3", "h4")
    (view,) = stage.router.views()
    assert "1 hosts have room for 12" in view.problem


def test_a_router_that_has_lost_its_memory_goes_on_with_what_is_in_force(stage: Stage) -> None:
    for _ in range(30):
        stage.report(load=zipf(16))
    in_force = stage.in_force
    stage.router = Rebalancers(lambda: stage.now, Rules(window_s=10.0, rows_per_host=10))
    assert stage.report(load=zipf(16)) == in_force
    stage.hosts.append("h4")
    assert stage.report().version == 3


def test_an_older_life_is_not_heard_and_silent_ones_are_forgotten(stage: Stage) -> None:
    stage.report(epoch=2)
    with pytest.raises(AssertionError):
        stage.report(epoch=1)
    stage.now += 60
    assert stage.router.views() == []
    stage.report(epoch=2)
    stage.router.scale("m", 6)
    stage.report(epoch=2)
    assert stage.router.views()[0].wanted == 6
