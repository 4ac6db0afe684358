"""What happens when processes die. Runs on the session's service, and leaves it whole."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from service_process import UNDERSTUDY, Service, running, until

from understudy.client import Client
from understudy.v1 import admin_pb2


def writes_for(process: psutil.Process, pid: int) -> bool:
    """Whether a process has a file open of a Ray session that process `pid` has started, wherever that lies."""
    try:
        return any(re.search(rf"/session_[^/]*_{pid}/", file.path) for file in process.open_files())
    except psutil.Error:
        return False


def leaders(service: Service) -> dict[str, int]:
    return {p.replica: p.pid for p in service.status().processes if p.role == "shard"}


def ready(service: Service) -> dict[str, int]:
    """Epochs of the replicas of `text` that are ready."""
    replicas = service.status().replicas
    return {r.id: r.epoch for r in replicas if r.model == "text" and r.state == admin_pb2.REPLICA_STATE_READY}


def answer(client: Client, seed: int, tokens: int = 400) -> tuple[int, ...]:
    done = client.complete([1, 2], model="text", seed=seed, temperature=1.0, max_tokens=tokens, ignore_eos=True)
    return done.choices[0].token_ids


@pytest.fixture
def whole(service: Service) -> Iterator[Service]:
    until(lambda: len(ready(service)) == 2)
    yield service
    until(lambda: len(ready(service)) == 2)


def test_streams_go_on_when_a_leader_is_killed(whole: Service) -> None:
    before = ready(whole)
    failovers = whole.metric("understudy_failovers_total")
    with whole.client() as client:
        expected = [answer(client, seed) for seed in range(8)]
        streams = [
            client.generate([1, 2], model="text", seed=seed, temperature=1.0, max_tokens=400, ignore_eos=True)
            for seed in range(8)
        ]
        for stream in streams:
            next(stream)
        until(lambda: sum(r.running for r in whole.status().replicas) >= 1)
        os.kill(leaders(whole)["text-0"], signal.SIGKILL)
        for stream in streams:
            for _ in stream:
                pass
        assert [s.completion().choices[0].token_ids for s in streams] == expected
    until(lambda: ready(whole).get("text-0", 0) == before["text-0"] + 1)
    assert ready(whole)["text-1"] == before["text-1"], "the other one was left alone"
    until(lambda: whole.metric("understudy_failovers_total") >= failovers)


def test_a_stopped_leader_is_silent_and_streams_go_on_elsewhere(whole: Service) -> None:
    pid = leaders(whole)["text-1"]
    with whole.client() as client:
        expected = answer(client, 5)
        streams = [
            client.generate([1, 2], model="text", seed=5, temperature=1.0, max_tokens=400, ignore_eos=True)
            for _ in range(8)
        ]
        for stream in streams:
            next(stream)
        os.kill(pid, signal.SIGSTOP)
        for stream in streams:
            for _ in stream:
                pass
        assert {s.completion().choices[0].token_ids for s in streams} == {expected}
    until(lambda: "text-1" not in ready(whole))
    os.kill(pid, signal.SIGCONT)


def test_a_killed_router_comes_back_and_knows_everybody(whole: Service) -> None:
    router = next(p.pid for p in whole.status().processes if p.role == "router")
    epochs = ready(whole)
    os.kill(router, signal.SIGKILL)
    with whole.client() as client:
        assert len(answer(client, 1, 20)) == 20, "gateways choose by themselves meanwhile"

    def back() -> bool:
        try:
            status = whole.status()
        except Exception:
            return False
        return any(p.role == "router" and p.pid != router for p in status.processes)

    until(back)
    until(lambda: ready(whole) == epochs)


def test_a_killed_gateway_comes_back(whole: Service) -> None:
    def gateways() -> set[int]:
        return {p.pid for p in whole.status().processes if p.role == "gateway"}

    until(lambda: len(gateways()) == 2)  # a router that has just begun anew hears of them within a beat
    old = gateways()
    os.kill(min(old), signal.SIGKILL)

    def back() -> bool:
        try:
            now = gateways()
        except Exception:
            return False
        return len(now - old) == 1 and len(now) == 2

    until(back)
    with whole.client() as client:
        assert len(answer(client, 1, 20)) == 20


def test_a_second_service_on_the_same_port_says_so(whole: Service, text_model: Path) -> None:
    import subprocess

    port = whole.address.rpartition(":")[2]
    said = subprocess.run(
        [UNDERSTUDY, "serve", "--model", str(text_model), "--port", port], capture_output=True, text=True, check=False
    )
    assert said.returncode == 1
    assert f"--port: cannot listen on 127.0.0.1:{port}" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_killed_service_leaves_no_process(tmp_path: Path, text_model: Path) -> None:
    with running(tmp_path, ["--model", str(text_model), "--engine", "fake"]) as service:
        service.wait_until_ready()
        started, directory = service.processes(), service.directory
        assert len(started) > 5
        service.process.kill()
        service.process.wait(10)

        def left() -> list[psutil.Process]:
            return [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

        until(lambda: not left())
        until(lambda: not directory.exists())


def test_a_second_signal_does_not_wait_and_leaves_no_process(tmp_path: Path, text_model: Path) -> None:
    with running(tmp_path, ["--model", str(text_model), "--engine", "fake"]) as service:
        service.wait_until_ready()
        started = service.processes()
        service.process.send_signal(signal.SIGINT)
        assert service.process.stdout is not None
        until(lambda: "draining" in service.process.stdout.readline())  # type: ignore[union-attr]
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(60) == 0
        assert [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
        assert not service.directory.exists()


def test_a_damaged_checkpoint_ends_the_service_with_one_line(tmp_path: Path, text_model: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in text_model.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with running(tmp_path, ["--model", str(damaged)]) as service:
        with pytest.raises(AssertionError, match="ended before it was ready"):
            service.wait_until_ready()
        assert service.process.wait(30) == 1
        assert not service.directory.exists()
        assert not [p for p in psutil.process_iter() if writes_for(p, service.process.pid)]
    said = "\n".join(service.output)
    assert "error: " in service.output[-1]
    assert "model.safetensors" in service.output[-1]
    assert "Traceback" not in said


def test_an_unknown_architecture_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "no_such"}')
    with running(tmp_path, ["--model", str(tmp_path)]) as service:
        with pytest.raises(AssertionError, match="ended before it was ready"):
            service.wait_until_ready()
        assert service.process.wait(30) == 1
    assert len(service.output) == 1
    assert "NoSuchModel" in service.output[0]
