"""Ranks of a group as threads of this process: the same code and the same memory as processes have, and quick."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from torch import Tensor

from workers.engine.contract import EngineConfig
from workers.engine.logits import whole_rows
from workers.engine.plan import StepPlan
from workers.engine.runner import Runner, RunnerInfo
from workers.parallel.errors import GroupBroken
from workers.parallel.group import ALONE, Group
from workers.parallel.shared import SharedGroup, make_memory

T = TypeVar("T")


def on_ranks(groups: list[Group], work: Callable[[Group], T]) -> list[T]:
    """What `work` returns at each rank, all at once; raises the first rank's error."""
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def run(rank: int) -> None:
        try:
            results[rank] = work(groups[rank])
        except BaseException as error:
            errors[rank] = error
            groups[rank].abort(f"rank {rank} failed: {error}")

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in sorted(errors, key=lambda r: (isinstance(errors[r], GroupBroken), r)):
        raise errors[rank]
    return [results[rank] for rank in range(len(groups))]


@contextmanager
def shared_groups(size: int, capacity: int = 1 << 16, limit_s: float = 30.0) -> Iterator[list[Group]]:
    path = make_memory(size, capacity)
    try:
        groups: list[Group] = [SharedGroup(path, rank, size, capacity, limit_s) for rank in range(size)]
    finally:
        path.unlink()
    try:
        yield groups
    finally:
        for group in groups:
            group.close()


class Divided:
    """A runner over all ranks, as one: whole logits, the leader's sizes."""

    def __init__(self, runners: list[Runner]) -> None:
        self.runners, self.leader = runners, runners[0]
        self.blocks = self.leader.blocks

    @property
    def info(self) -> RunnerInfo:
        return self.leader.info

    def run(self, plan: StepPlan) -> Tensor:
        return whole_rows(self.leader.run(plan))


@contextmanager
def divided_runner(config: EngineConfig) -> Iterator[Divided]:
    """`config.tensor_parallel` ranks of a model; at the end all have closed without a fault."""
    with ExitStack() as stack:
        size = config.tensor_parallel
        groups = stack.enter_context(shared_groups(size)) if size > 1 else [ALONE]
        runners = on_ranks(groups, lambda group: Runner.from_checkpoint(config, group=group))
        faults: list[BaseException] = []

        def follow(runner: Runner) -> None:
            try:
                runner.follow()
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=follow, args=(runner,)) for runner in runners[1:]]
        for thread in threads:
            thread.start()
        try:
            yield Divided(runners)
        finally:
            runners[0].close()
            for thread in threads:
                thread.join(30)
            for runner in runners[1:]:
                runner.close()
        assert not faults, faults
