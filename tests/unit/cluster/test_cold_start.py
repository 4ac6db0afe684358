"""How long a start takes, by its parts; and what is done meanwhile."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.wire import LeaderServer
from workers.actors import Leader, Progress
from workers.engine import Engine, EngineConfig
from workers.engine.fake import FakeEngine
from workers.engine.loop import EngineLoop
from workers.model import ahead


def wire(loop: EngineLoop) -> LeaderServer:
    return LeaderServer(loop, replica="m-0", epoch=1, secret="s")


async def test_each_part_of_a_start_is_measured(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = [100.0]
    monkeypatch.setattr("workers.actors.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))

    def build(_config: EngineConfig, progress: Progress) -> Engine:
        now[0] += 1.5  # imports
        progress(0, 1)
        for done in (4, 8):  # weights
            now[0] += 0.75
            progress(done, 8)
        now[0] += 0.25  # the rest
        return FakeEngine()

    leader = Leader(EngineConfig("nowhere", name="m"), build, wire, own_process=False, ordered=time.time() - 3.0)
    assert (await leader.report()).cold_start is None
    with caplog.at_level("INFO"):
        start = (await leader.start()).cold_start
    await leader.stop()
    assert start is not None
    assert start.process_s >= 3.0
    assert (start.imports_s, start.weights_s, start.engine_s, start.warm_up_s) == (1.5, 1.5, 0.25, 0.0)
    assert start.total_s == start.process_s + 3.25
    assert any("imports 1.50, weights 1.50, engine 0.25" in m for m in caplog.messages)


def test_weights_are_read_ahead_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ahead.read_ahead(tmp_path) is None, "there are none"
    advised = []
    monkeypatch.setattr(
        ahead.os, "posix_fadvise", lambda _fd, start, length, what: advised.append((start, length, what))
    )
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(bytes(1000))
    thread = ahead.read_ahead(tmp_path)
    assert thread is not None
    thread.join(30)
    assert advised == [(0, 0, ahead.os.POSIX_FADV_WILLNEED)] * 2
    monkeypatch.setattr(ahead, "free_memory", lambda: 3000)
    assert ahead.read_ahead(tmp_path) is None, "more than half of what is free"


def test_free_memory_is_what_linux_says(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    assert ahead.free_memory(meminfo) == 0
    meminfo.write_text("MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable:   37 kB\n")
    assert ahead.free_memory(meminfo) == 37 << 10
