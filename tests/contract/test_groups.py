"""Every kind of group keeps the contract of `workers.parallel.group.Group`; ranks are threads here."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from ports import free_port
from ranks import on_ranks, shared_groups
from torch import Tensor

from workers.kernels.build import BuildError
from workers.kernels.build import load as load_library
from workers.parallel.errors import GroupBroken
from workers.parallel.group import ALONE, Group, tree_sum
from workers.parallel.shared import SharedGroup, make_memory
from workers.parallel.torch_group import TorchGroup

CAPACITY = 4096  # so that most things go in several pieces


@contextmanager
def gloo_groups(size: int) -> Iterator[list[Group]]:
    port, made = free_port(), {}

    def join(rank: int) -> None:
        made[rank] = TorchGroup("127.0.0.1", port, rank, size, timeout_s=5)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield [made[rank] for rank in range(size)]
    for group in made.values():
        group.close()


KINDS = [("alone", 1), ("shared", 1), ("shared", 2), ("shared", 3), ("shared", 4), ("gloo", 2), ("gloo", 4)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind[0]}-{kind[1]}")
def groups(request: pytest.FixtureRequest) -> Iterator[list[Group]]:
    kind, size = request.param
    with ExitStack() as stack:
        if kind == "alone":
            yield [ALONE]
        elif kind == "gloo":
            yield stack.enter_context(gloo_groups(size))
        else:
            try:
                load_library()
            except BuildError as reason:
                pytest.skip(str(reason))
            yield stack.enter_context(shared_groups(size, CAPACITY))


def of_rank(rank: int, rows: int = 37, columns: int = 100) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 37])
def test_sums_have_the_bits_of_the_tree_at_every_rank(groups: list[Group], dtype: torch.dtype, rows: int) -> None:
    parts = [of_rank(rank, rows).to(dtype) for rank in range(len(groups))]
    bias = of_rank(99, 1)[0]
    for result in on_ranks(groups, lambda g: g.sum(parts[g.rank], dtype)):
        assert torch.equal(result, tree_sum(parts).to(dtype))
    for result in on_ranks(groups, lambda g: g.sum(parts[g.rank], dtype, bias)):
        assert torch.equal(result, (tree_sum(parts) + bias).to(dtype))
    for result in on_ranks(groups, lambda g: g.sum(parts[g.rank].float(), dtype)):
        assert torch.equal(result, tree_sum(parts).to(dtype))


def test_a_column_of_a_wider_row_is_summed_as_it_is(groups: list[Group]) -> None:
    """One row of a slice counts as contiguous, whatever its stride."""
    wide = [of_rank(rank, 1, 300) for rank in range(len(groups))]
    results = on_ranks(groups, lambda g: g.sum(wide[g.rank][:, 100:200], torch.float32))
    assert torch.equal(results[0], tree_sum([w[:, 100:200] for w in wide]))
    gathered = on_ranks(groups, lambda g: g.gather(wide[g.rank][:, 100:200]))
    assert all(torch.equal(a, w[:, 100:200]) for a, w in zip(gathered[0], wide, strict=True))


def test_what_is_gathered_comes_in_the_order_of_ranks(groups: list[Group]) -> None:
    parts = [of_rank(rank) for rank in range(len(groups))]
    for result in on_ranks(groups, lambda g: g.gather(parts[g.rank])):
        assert all(torch.equal(a, b) for a, b in zip(result, parts, strict=True))
    first, *others = on_ranks(groups, lambda g: g.gather(parts[g.rank], root=0))
    assert all(torch.equal(a, b) for a, b in zip(first, parts, strict=True))
    assert others == [[]] * (len(groups) - 1)


def test_ranks_may_give_different_numbers_of_rows(groups: list[Group]) -> None:
    counts = [(5 * rank + 3) % 7 * 9 for rank in range(len(groups))]  # one of them is 0
    parts = [of_rank(rank, count) for rank, count in enumerate(counts)]
    for result in on_ranks(groups, lambda g: g.gather(parts[g.rank], counts=counts)):
        assert [len(part) for part in result] == counts
        assert all(torch.equal(a, b) for a, b in zip(result, parts, strict=True))
    none = [0] * len(groups)
    assert all(len(part) == 0 for part in on_ranks(groups, lambda g: g.gather(parts[0][:0], counts=none))[-1])


def test_what_the_leader_tells_is_heard_in_order(groups: list[Group]) -> None:
    messages = [b"", b"a", os.urandom(3 * CAPACITY + 5), b"last"]

    def work(group: Group) -> list[bytes]:
        if group.rank:
            return [group.hear() for _ in messages]
        for message in messages:
            group.tell(message)
        return messages

    assert on_ranks(groups, work) == [messages] * len(groups)


def test_everybody_hears_everybodys_message(groups: list[Group]) -> None:
    said = [bytes([rank]) * rank * 10 for rank in range(len(groups))]
    assert on_ranks(groups, lambda g: g.exchange(said[g.rank])) == [said] * len(groups)


def test_operations_follow_each_other_without_mixing(groups: list[Group]) -> None:
    """As in a forward: no rank waits for another but by what it gives and takes."""
    x = [of_rank(rank, 3, 20) for rank in range(len(groups))]

    def work(group: Group) -> list[Tensor]:
        made = []
        for turn in range(50):
            if turn % 7 == 3 and group.rank == 0:
                group.tell(bytes([turn]))
            elif turn % 7 == 3:
                assert group.hear() == bytes([turn])
            made.append(group.sum(x[group.rank] * turn, torch.float32))
            if turn % 5 == 0:
                made += group.gather(x[group.rank] + turn)
        return made

    results = on_ranks(groups, work)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_a_broken_group_breaks_for_everybody_with_the_reason(groups: list[Group]) -> None:
    words: dict[int, str] = {}

    def wait(group: Group) -> None:
        with pytest.raises(GroupBroken) as broken:
            group.hear() if group.rank > 1 else group.sum(torch.zeros(1, 1), torch.float32)
        words[group.rank] = str(broken.value)

    threads = [threading.Thread(target=wait, args=(group,)) for group in groups[1:]]
    for thread in threads:
        thread.start()
    # As each rank's supervisor would do, and the leader's own failure does. Rank 1 is told first: others may hear of a
    # rank that has given up before they are told why.
    for group in (*groups[1:2], *groups[:1], *groups[2:]):
        group.abort("the leader stumbled")
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert set(words) == set(range(1, len(groups)))
    assert len(groups) == 1 or "stumbled" in words[1]


def test_a_silent_rank_is_named() -> None:
    with shared_groups(2, CAPACITY, limit_s=0.2) as groups:
        with pytest.raises(GroupBroken, match="rank 1 did not answer"):
            groups[0].exchange(b"?")
        with pytest.raises(GroupBroken, match="rank 1 has given up"):  # whoever comes late hears of it
            groups[0].exchange(b"?")


def _hang(path: str) -> None:
    from pathlib import Path

    group = SharedGroup(Path(path), 1, 2, CAPACITY)
    group.exchange(b"here")
    group.hear()


def test_a_killed_process_is_noticed() -> None:
    path = make_memory(2, CAPACITY)
    child = multiprocessing.get_context("spawn").Process(target=_hang, args=(str(path),))
    child.start()
    try:
        leader = SharedGroup(path, 0, 2, CAPACITY)
        leader.wait_until_joined(60)
        assert leader.exchange(b"there") == [b"there", b"here"]
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        with pytest.raises(GroupBroken, match="the process of rank 1 is gone"):
            leader.exchange(b"?")
        leader.close()
    finally:
        path.unlink()
        child.kill()


def test_ranks_that_never_come_are_counted() -> None:
    path = make_memory(3, CAPACITY)
    try:
        with pytest.raises(GroupBroken, match="1 of 3 ranks"):
            SharedGroup(path, 0, 3, CAPACITY).wait_until_joined(0.05)
    finally:
        path.unlink()
    with pytest.raises(GroupBroken, match="did not come together"):
        TorchGroup("127.0.0.1", free_port(), 1, 2, timeout_s=0.3)
