"""Places, lives and silence."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.roster import Claim, Member, ProcessInfo, Roster


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


OWN = (ProcessInfo("replica", 1, "n"),)


def member(holder: str, claim: Claim, stage: str = "ready") -> Member:
    return Member(holder, "replica", stage, OWN, model=claim.replica.rpartition("-")[0], claim=claim)


def test_claims_fill_places_in_order() -> None:
    roster = Roster(Clock())
    assert [roster.claim("m", h, OWN) for h in "abc"] == [Claim("m-0", 1), Claim("m-1", 1), Claim("m-2", 1)]
    roster.leave("b")
    assert roster.claim("m", "d", OWN) == Claim("m-1", 2)
    assert roster.claim("other", "e", OWN) == Claim("other-0", 1)


def test_an_older_life_is_not_heard() -> None:
    clock = Clock()
    roster = Roster(clock)
    old = roster.claim("m", "a", OWN)
    clock.now = 6.0
    assert roster.members() == []
    new = roster.claim("m", "b", OWN)
    assert (new.replica, new.epoch) == (old.replica, old.epoch + 1)
    assert not roster.announce(member("a", old))
    assert roster.announce(member("b", new))
    assert [m.holder for m in roster.members()] == ["b"]


def test_who_announces_stays() -> None:
    clock = Clock()
    roster = Roster(clock)
    claim = roster.claim("m", "a", OWN)
    for _ in range(10):
        clock.now += 4.0
        assert roster.announce(member("a", claim, "loading"))
    assert [m.stage for m in roster.members()] == ["loading"]


def test_a_new_roster_learns_the_lives_and_gives_larger_ones() -> None:
    roster = Roster(Clock(), first_epoch=1000)
    assert roster.announce(member("a", Claim("m-0", 7)))
    assert roster.claim("m", "b", OWN) == Claim("m-1", 1000)
    roster.leave("a")
    assert roster.claim("m", "c", OWN) == Claim("m-0", 1000)


@given(st.lists(st.tuples(st.sampled_from(["claim", "leave", "wait"]), st.integers(0, 5)), max_size=40))
def test_no_place_is_held_twice_and_epochs_only_grow(events: list[tuple[str, int]]) -> None:
    clock = Clock()
    roster = Roster(clock, timeout_s=5.0)
    latest: dict[str, int] = {}
    for number, (event, who) in enumerate(events):
        if event == "claim":
            claim = roster.claim("m", f"{who}.{number}", OWN)
            assert claim.epoch > latest.get(claim.replica, 0)
            latest[claim.replica] = claim.epoch
        elif event == "leave":
            for one in roster.members()[who : who + 1]:
                roster.leave(one.holder)
        else:
            clock.now += who
        held = [m.claim.replica for m in roster.members() if m.claim is not None]
        assert len(held) == len(set(held))
