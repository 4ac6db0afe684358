"""Replicas on paper, and real traces through the real index."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from router.simulate import STRATEGIES, Kept, Machine, SimulatedReplica, simulate
from router.traces import Arrival, Trace, hits_without_bounds, mix
from workers.cache.events import Changes, Tier

PLAIN = Machine(
    prefill_rate=1000, rows=10, token_s=0.1, places=4, block_tokens=100, device_blocks=10, host_blocks=10,
    host_rate=10_000, store_rate=2000, store_blocks=100,
)  # fmt: skip


def arrival(at: float, keys: list[int], answer: int = 1, tokens: int | None = None) -> Arrival:
    return Arrival(at, len(keys) * 100 if tokens is None else tokens, answer, array("Q", names(keys)))


def names(keys: list[int]) -> list[int]:
    found: list[int] = mix(np.array(keys, np.uint64)).tolist()
    return found


def hits() -> dict[str, int]:
    return {"device": 0, "host": 0, "store": 0}


# One replica, by hand.


def test_a_prompt_is_computed_once_and_the_next_waits_for_it() -> None:
    one, found = SimulatedReplica(PLAIN, Kept(100)), hits()
    assert one.take(arrival(0.0, [1, 2, 3]), found) == pytest.approx(0.3)
    # Waits until 0.3; of 350 tokens 300 are there, and the first sequence decodes until 0.4.
    assert one.take(arrival(0.1, [1, 2, 3, 4], tokens=350), found) == pytest.approx(0.3 + 0.05 * 1.1)
    assert found == {"device": 300, "host": 0, "store": 0}
    assert one.take(arrival(9.0, [1, 2, 3, 4], tokens=350), found) == pytest.approx(9.001), "one row is computed"


def test_what_the_device_gives_up_comes_from_the_host_then_from_the_store() -> None:
    store, found = Kept(100), hits()
    one, other = SimulatedReplica(PLAIN, store), SimulatedReplica(PLAIN, store)
    one.take(arrival(0.0, list(range(8))), found)
    one.take(arrival(5.0, list(range(20, 28))), found)  # six of the first go to the host, from the end
    assert one.take(arrival(10.0, list(range(9))), found) == pytest.approx(10 + 600 / 10_000 + 0.1)
    assert found == {"device": 200, "host": 600, "store": 0}
    assert other.take(arrival(20.0, list(range(9))), found) == pytest.approx(20 + 900 / 2000 + 0.001)
    assert found["store"] == 900
    early = SimulatedReplica(PLAIN, store)
    assert early.take(arrival(9.9, list(range(8, 10))), found) == pytest.approx(10.1), "it was not there yet"


def test_places_are_waited_for_and_decoders_slow_prompts_down() -> None:
    one, found = SimulatedReplica(PLAIN, Kept(100)), hits()
    for i in range(4):
        one.take(arrival(0.0, [i], answer=100), found)
    first_end = 0.1 + 10.0
    assert one.take(arrival(5.0, [9]), found) == pytest.approx(first_end + 0.1 * (1 + 3 / 10))


def test_a_replica_reports_what_an_engine_does() -> None:
    one, found = SimulatedReplica(PLAIN, Kept(100)), hits()
    one.take(arrival(0.0, [1, 2, 3], answer=10), found)
    one.take(arrival(0.0, [1, 2, 3, 4], answer=10), found)
    stats, changes = one.report(0.1)
    assert (stats.running, stats.waiting, stats.waiting_prefill_tokens) == (1, 1, 200 + 400)
    assert changes is None
    stats, changes = one.report(0.3)
    assert (stats.running, stats.prefill_rows, stats.prefill_seconds) == (2, 300, pytest.approx(0.3))
    said = [(tier, True, key.to_bytes(8, "little")) for key in names([3, 2, 1]) for tier in (Tier.DEVICE, Tier.STORE)]
    assert changes == Changes.of(0, said, reset=True)
    stats, changes = one.report(60.0)
    assert (stats.running, stats.waiting, stats.waiting_prefill_tokens) == (0, 0, 0)
    assert changes is not None
    assert (changes.first, len(changes.codes)) == (6, 2)


# Fleets.


@pytest.fixture(scope="module")
def conversations() -> list[Arrival]:
    """Eighty of ten turns each, that begin alike and grow; about 70 % of what ten replicas can do."""
    rng, found = np.random.default_rng(1), []
    for number in range(80):
        keys, at = list(range(1, 5)), float(rng.uniform(0, 60))
        for turn in range(10):
            keys = keys + [1000 * (number + 1) + 10 * turn + i for i in range(int(rng.integers(2, 9)))]
            found.append(arrival(at, list(keys), int(rng.integers(5, 40))))
            at += float(rng.exponential(12))
    return sorted(found, key=lambda a: a.at)


BOUNDED = replace(PLAIN, device_blocks=120, host_blocks=200, store_blocks=None, places=64)


def test_the_router_is_the_best_of_all_and_shares_the_load(conversations: list[Arrival]) -> None:
    found = {name: simulate(conversations, 10, name, BOUNDED) for name in STRATEGIES}
    ours = found.pop("expected time")
    assert ours.decisions["device"] > len(conversations) / 3
    assert sum(ours.decisions.values()) == len(conversations)
    assert ours.imbalance < 1.5
    assert ours.requests.sum() == len(conversations)
    for other in found.values():
        assert ours.first_token.mean() < other.first_token.mean()
        assert np.percentile(ours.first_token, 99) <= np.percentile(other.first_token, 99)
        assert ours.hits["device"] > other.hits["device"] or other is found["prefix affinity"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_can_be_repeated(conversations: list[Arrival], name: str) -> None:
    one, again = (simulate(conversations[:200], 4, name, BOUNDED) for _ in range(2))
    assert one.first_token.tolist() == again.first_token.tolist()
    assert one.hits == again.hits


def test_bounded_caches_find_no_more_than_unbounded_ones(conversations: list[Arrival]) -> None:
    free = replace(BOUNDED, device_blocks=None, host_blocks=None)
    small = replace(BOUNDED, device_blocks=20, host_blocks=20, store_blocks=0)
    most = simulate(conversations, 4, "expected time", free)
    least = simulate(conversations, 4, "expected time", small)
    assert 0 < least.hit_rate < most.hit_rate
    assert least.hits["store"] == 0


# Traces.


def test_a_trace_is_tiled_with_names_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 1000 * i, "input_length": 150, "output_length": 7, "hash_ids": [0, i]} for i in range(5)]
    file.write_text("\n".join(json.dumps(row) for row in reversed(rows)))
    trace = Trace.read(file)
    assert (trace.at.tolist(), trace.blocks[4]) == ([0, 1, 2, 3, 4], [0, 4])
    arrivals = trace.tiled(12, 40.0)
    assert len(arrivals) == 15
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert len({a.keys[0] for a in arrivals}) == 3
    assert len({key for a in arrivals for key in a.keys}) == 3 * 5
    first = arrivals[0].keys[0]
    gaps = np.diff([a.at for a in arrivals if a.keys[0] == first])
    assert gaps.tolist() == pytest.approx([10.0] * 4)


def test_a_damaged_trace_is_named(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 1, "input_length": 2, "output_length": 3, "hash_ids": [4]}\n{"timestamp": 1}\n')
    with pytest.raises(ValueError, match=r"trace\.jsonl:2: .*input_length"):
        Trace.read(file)


@pytest.mark.oracles
@pytest.mark.parametrize(("name", "hit", "of"), [("conversation", 105_710, 288_500), ("synthetic", 77_953, 121_877)])
def test_without_bounds_the_index_finds_exactly_what_the_traces_repeat(
    oracles: Path, name: str, hit: int, of: int
) -> None:
    trace = Trace.read(oracles / "traces" / "mooncake" / f"{name}_trace.jsonl")
    assert hits_without_bounds(trace, 16) == (hit, of)
