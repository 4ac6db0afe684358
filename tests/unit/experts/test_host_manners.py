"""What an expert host does for those who share its cores."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from expert_stage import SECRET, Process, open_host
from service_process import until

from workers.experts.process import HostPlan


def test_while_it_computes_it_loads_half_of_the_time(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = open_host(mixture, "h0", kernels="plain")
    rests: list[float] = []

    def rest(seconds: float) -> bool:
        rests.append(seconds)
        return False

    monkeypatch.setattr(host._keeper._stopped, "wait", rest)
    try:
        host.hold([(0, 1)])
        until(lambda: host.report().held == 1)
        host._keeper.compute(0, torch.ones(1, 32), torch.zeros(1, dtype=torch.int32), np.array([1], np.int32))
        assert rests == [], "nobody waited for rows"
        host.hold([(0, 2), (1, 2)])
        until(lambda: len(rests) == 2)
        assert host.report().held == 3
        assert all(0 < seconds <= 1 for seconds in rests)
    finally:
        host.stop()


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="no SCHED_BATCH here: it is Linux's")
def test_its_threads_are_batch_work(mixture: Path) -> None:
    plan = HostPlan(str(mixture), "h0", 1, SECRET, kernels="plain", threads=1, capacity=24)
    process = Process(plan)
    try:
        threads = [int(thread) for thread in os.listdir(f"/proc/{process.process.pid}/task")]
        assert len(threads) >= 5
        assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_BATCH}
    finally:
        process.end()
