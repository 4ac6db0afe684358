"""Hosts that die, stall, come and go under an engine; what a host holds; who is let in."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from expert_stage import SECRET, Process, hosts_of, open_host, plan_of, runner_over, spread
from service_process import until
from tiny_mixture import write_mixture

from understudy.errors import ConfigError, Unavailable
from workers.engine.contract import EngineConfig
from workers.engine.plan import Chunk, StepPlan
from workers.engine.runner import Runner
from workers.experts.channel import ChannelError, Header, Kind, connect
from workers.experts.dispatch import Dispatcher, RemoteExperts
from workers.experts.host import ExpertHost
from workers.experts.placement import ExpertsPlan, HostReport, HostsView
from workers.experts.process import HostPlan
from workers.kernels.choose import make_ops
from workers.model.config import read_spec

TOKENS = list(range(1, 40))


def step(runner: Runner, tokens: list[int] = TOKENS) -> torch.Tensor:
    from array import array

    blocks = array("i", range(-(-len(tokens) // 16)))
    return runner.run(StepPlan(0, [Chunk("s", 0, tokens, (blocks,), len(tokens))]))


@pytest.fixture(scope="module")
def want(mixture: Path) -> torch.Tensor:
    """The logits with all experts at home."""
    return step(Runner.from_checkpoint(EngineConfig(model_dir=str(mixture), kernels="plain", threads=1)))


def test_a_host_that_dies_costs_no_bit(mixture: Path, want: torch.Tensor) -> None:
    """Hot experts go on at their other host, the others are loaded by who has room, in the same step."""
    with hosts_of(mixture, 3, kernels="plain") as hosts:
        placement = spread(mixture, [h.address.name for h in hosts])
        for host in hosts:
            host.hold(placement.held_by(host.address.name))
        runner = runner_over(mixture, plan_of(placement, hosts), kernels="plain")
        assert runner.experts is not None
        assert torch.equal(step(runner), want)
        hosts[1].stop()
        assert torch.equal(step(runner), want)
        report = runner.experts.report()
        assert report.lost == ("h1",)
        assert report.moved == len(placement.held_by("h1")) == 8
        hosts[0].stop()
        assert torch.equal(step(runner), want)
        until(lambda: hosts[2].report().held == 24)
        runner.close()


def test_copies_are_used_before_anything_is_loaded(mixture: Path, want: torch.Tensor) -> None:
    with hosts_of(mixture, 3, kernels="plain") as hosts:
        placement = spread(mixture, [h.address.name for h in hosts], copies=2)
        runner = runner_over(mixture, plan_of(placement, hosts), kernels="plain")
        assert torch.equal(step(runner), want)
        hosts[2].stop()
        assert torch.equal(step(runner), want)
        assert runner.experts is not None
        assert runner.experts.report().moved == 0
        runner.close()


def test_a_step_waits_for_a_host_and_then_fails_in_words(mixture: Path, want: torch.Tensor) -> None:
    with hosts_of(mixture, 2, kernels="plain") as hosts:
        placement = spread(mixture, ["h0", "h1"])
        small = [msgspec.structs.replace(h.address, capacity=12) for h in hosts]  # no room for the other's
        plan = ExpertsPlan(HostsView(1, placement, tuple(small)), SECRET, wait_s=0.05)
        runner = runner_over(mixture, plan, kernels="plain")
        assert torch.equal(step(runner), want)
        hosts[0].stop()
        with pytest.raises(Unavailable, match=r"experts of layer 0 have had no host for 0\.05 s; lost are h0"):
            step(runner)
        again = open_host(mixture, "h0", kernels="plain", life=2)
        assert runner.experts is not None
        runner.experts.offer(HostsView(2, placement, (again.address, small[1])))
        assert torch.equal(step(runner), want)
        assert runner.experts.report().lost == ()
        runner.close()
        again.stop()


def test_an_exchange_that_nobody_finished_harms_no_later_one(mixture: Path, want: torch.Tensor) -> None:
    with hosts_of(mixture, 2, kernels="plain") as hosts:
        runner = runner_over(mixture, plan_of(spread(mixture, ["h0", "h1"]), hosts), kernels="plain")
        assert runner.experts is not None
        for rows in (500, 5000):  # of which the later ones find no room on the way
            x, ids = torch.ones(rows, 32), torch.arange(2 * rows, dtype=torch.int32).view(rows, 2) % 8
            for _ in range(3):
                RemoteExperts(runner.experts, 1).start(x, ids)
            assert torch.equal(step(runner), want)
        assert runner.experts.report().lost == ()
        runner.close()


@pytest.mark.parametrize("tcp", [False, True])
def test_two_exchanges_are_under_way_and_neither_waits_for_the_other_to_be_taken(mixture: Path, tcp: bool) -> None:
    """Each has frames, and answers, for which the kernel has no room."""
    draw = torch.Generator().manual_seed(0)
    xs = [torch.randn(5000, 32, generator=draw) for _ in range(4)]
    ids = torch.randint(8, (5000, 2), generator=draw, dtype=torch.int32)
    weights = torch.rand(5000, 2, generator=draw)
    with hosts_of(mixture, 2, kernels="plain") as hosts:
        plan = plan_of(spread(mixture, ["h0", "h1"]), hosts, tcp=tcp)
        dispatcher = Dispatcher(plan, read_spec(mixture), make_ops("float32", "cpu", "plain", 1))
        layers = [RemoteExperts(dispatcher, layer) for layer in (0, 0, 1, 1)]
        one_by_one = [layer(x, ids, weights) for layer, x in zip(layers, xs, strict=True)]
        first, second = (layer.start(x, ids) for layer, x in zip(layers[:2], xs[:2], strict=True))
        taken = [first(weights)]
        third = layers[2].start(xs[2], ids)
        taken.append(second(weights))
        fourth = layers[3].start(xs[3], ids)
        taken += [third(weights), fourth(weights)]
        dispatcher.close()
    for got, want in zip(taken, one_by_one, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("rows", [2, 39])
def test_a_step_in_halves_has_the_bits_of_the_whole(mixture: Path, want: torch.Tensor, rows: int) -> None:
    with hosts_of(mixture, 3, kernels="plain") as hosts:
        placement = spread(mixture, [h.address.name for h in hosts])
        runner = runner_over(mixture, plan_of(placement, hosts), kernels="plain")
        runner.overlap.forced = True
        assert torch.equal(step(runner, TOKENS[:rows]), want[:rows])
        hosts[1].stop()  # found out by either half
        assert torch.equal(step(runner, TOKENS[:rows]), want[:rows])
        assert runner.experts is not None
        assert runner.experts.report().lost == ("h1",)
        runner.close()


def test_a_host_that_comes_while_a_step_waits_ends_the_waiting(mixture: Path, want: torch.Tensor) -> None:
    with hosts_of(mixture, 1, kernels="plain") as hosts:
        placement = spread(mixture, ["h0"])
        runner = runner_over(mixture, plan_of(placement, hosts), kernels="plain")
        hosts[0].stop()
        got: list[torch.Tensor] = []
        waiting = threading.Thread(target=lambda: got.append(step(runner)))
        waiting.start()
        assert runner.experts is not None
        until(lambda: runner.experts is not None and runner.experts.report().lost == ("h0",))
        again = open_host(mixture, "h0", kernels="plain", life=2)
        runner.experts.offer(HostsView(2, placement, (again.address,)))
        waiting.join(20)
        assert torch.equal(got[0], want)
        runner.close()
        again.stop()


def test_a_new_placement_takes_effect_between_steps_and_hosts_come_and_go(mixture: Path, want: torch.Tensor) -> None:
    with hosts_of(mixture, 3, kernels="plain") as hosts:
        two, three = spread(mixture, ["h0", "h1"]), spread(mixture, ["h2", "h1", "h0"], version=2, shift=1)
        runner = runner_over(mixture, plan_of(two, hosts[:2]), kernels="plain")
        dispatcher = runner.experts
        assert dispatcher is not None
        assert torch.equal(step(runner), want)
        x, ids, weights = torch.ones(1, 32), torch.tensor([[3, 4]], dtype=torch.int32), torch.ones(1, 2)
        finish = RemoteExperts(dispatcher, 0).start(x, ids)
        dispatcher.offer(HostsView(2, three, tuple(h.address for h in hosts)))
        assert dispatcher.report().version == 1, "an exchange is under way"
        finish(weights)
        assert dispatcher.report().version == 1, "a step is under way"
        RemoteExperts(dispatcher, 1)(x, ids, weights)
        assert dispatcher.report().version == 1
        RemoteExperts(dispatcher, 2)(x, ids, weights)
        assert dispatcher.report().version == 2
        assert torch.equal(step(runner), want)
        assert sum(map(sum, hosts[2].report().rows)) > 0
        dispatcher.offer(HostsView(1, two, ()))  # late
        assert torch.equal(step(runner), want)
        assert dispatcher.report().version == 2
        runner.close()


@pytest.fixture(scope="module")
def processes(mixture: Path) -> Iterator[list[Process]]:
    both = [
        Process(HostPlan(str(mixture), f"h{i}", 1, SECRET, kernels="plain", threads=1, capacity=24)) for i in range(2)
    ]
    yield both
    for each in both:
        each.end()


def test_a_stopped_host_is_lost_and_used_again_when_it_wakes(
    mixture: Path, want: torch.Tensor, processes: list[Process]
) -> None:
    placement = spread(mixture, ["h0", "h1"])
    view = HostsView(1, placement, tuple(p.address for p in processes))
    runner = runner_over(mixture, ExpertsPlan(view, SECRET, silence_s=0.3), kernels="plain")
    assert torch.equal(step(runner), want)
    assert runner.experts is not None
    os.kill(processes[1].process.pid, signal.SIGSTOP)
    assert torch.equal(step(runner), want)
    assert runner.experts.report().lost == ("h1",)
    os.kill(processes[1].process.pid, signal.SIGCONT)
    until(lambda: runner.experts is not None and not runner.experts.report().lost)
    before = processes[1].report().rows
    assert torch.equal(step(runner), want)
    assert processes[1].report().rows != before, "it is used again"
    runner.close()


def test_a_killed_process_is_lost(mixture: Path, want: torch.Tensor, processes: list[Process]) -> None:
    placement = spread(mixture, ["h0", "h1"])
    view = HostsView(1, placement, tuple(p.address for p in processes))
    runner = runner_over(mixture, ExpertsPlan(view, SECRET), kernels="plain")
    assert torch.equal(step(runner), want)
    processes[0].process.kill()
    assert torch.equal(step(runner), want)
    runner.close()


def test_a_host_maps_no_more_than_it_holds(tmp_path: Path) -> None:
    """Of a file of 25 MB, the sixth that it holds, and what the kernel reads around that."""
    path = write_mixture(tmp_path, hidden=256, size=320)
    process = Process(HostPlan(str(path), "h0", 1, SECRET, kernels="plain", threads=1, capacity=24))
    try:
        before, whole = mapped(process, path)
        assert process.ask(["hold", [[1, expert] for expert in (0, 1, 6, 7)]], HostReport) is not None
        until(lambda: process.report().held == 4)
        after, _ = mapped(process, path)
    finally:
        process.end()
    experts = 4 * process.report_bytes
    assert whole > 23e6
    assert before < 1e6
    assert experts <= after - before < experts + 1.5e6


def mapped(process: Process, path: Path) -> tuple[int, int]:
    """Bytes of the checkpoint that a process has in its memory, and bytes of it in all."""
    text = Path(f"/proc/{process.process.pid}/smaps").read_text()
    parts = [p for p in text.split("VmFlags")[:-1] if str(path) in p]
    size = (path / "model.safetensors").stat().st_size
    return sum(1024 * int(line.split()[1]) for p in parts for line in p.splitlines() if line.startswith("Rss:")), size


# One host ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def host(mixture: Path) -> Iterator[ExpertHost]:
    made = open_host(mixture, "h0", kernels="plain")
    yield made
    made.stop()


def test_it_holds_what_it_was_given_and_gives_it_back(host: ExpertHost) -> None:
    host.hold([(0, 1), (2, 7), (0, 1)])
    until(lambda: host.report().held == 2)
    host.keep([(2, 7)])
    assert host.report().held == 1
    assert host.report().expert_bytes == 3 * 32 * 16 * 4


def test_what_it_cannot_load_is_reported(host: ExpertHost) -> None:
    host.hold([(0, 8), (0, 0)])
    until(lambda: host.report().failure)
    assert host.report().failure == "layer 0 has 8 experts, not one numbered 8"
    until(lambda: host.report().held == 1)


def test_it_reads_its_own_experts_and_no_others(
    mixture: Path, host: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workers.model.weights import Checkpoint

    read: list[str] = []
    plain = Checkpoint.get

    def get(self: Checkpoint, name: str, *rest: object) -> torch.Tensor:
        read.append(name)
        return plain(self, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "get", get)
    host.hold([(1, 3)])
    until(lambda: host.report().held == 1)
    assert read == [f"model.layers.1.mlp.experts.3.{part}_proj.weight" for part in ("gate", "up", "down")]


def test_the_engine_reads_no_expert(mixture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workers.model.weights import Checkpoint

    read: list[str] = []
    plain = Checkpoint.get

    def get(self: Checkpoint, name: str, *rest: object) -> torch.Tensor:
        read.append(name)
        return plain(self, name, *rest)  # type: ignore[arg-type]

    with hosts_of(mixture, 1, kernels="plain") as hosts:
        monkeypatch.setattr(Checkpoint, "get", get)
        runner = runner_over(mixture, plan_of(spread(mixture, ["h0"]), hosts), kernels="plain")
        assert any("mlp.gate" in name for name in read)
        assert not [name for name in read if ".experts." in name]
        runner.close()


@pytest.mark.parametrize("tcp", [False, True])
def test_only_who_knows_the_secret_is_let_in(host: ExpertHost, tcp: bool) -> None:
    address = host.address
    local = "" if tcp else address.local
    with pytest.raises(ChannelError):
        connect(local, address.tcp, SECRET + "x", 5.0)
    channel, hello = connect(local, address.tcp, SECRET, 5.0)
    assert (hello.name, hello.life, hello.hidden) == ("h0", 1, 32)
    channel.close()


def test_noise_closes_a_connection_and_harms_nobody_else(host: ExpertHost) -> None:
    ip, port = host.address.tcp.rsplit(":", 1)
    for noise in (b"", b"x", b"GET / HTTP/1.1\r\n\r\n" * 10):
        with socket.create_connection((ip, int(port)), 5) as sock:
            sock.sendall(noise)
    channel, _ = connect("", host.address.tcp, SECRET, 5.0)
    wrong, _ = connect("", host.address.tcp, SECRET, 5.0)
    wrong.send(Header(Kind.COMPUTE, 0, 1, 1, 1, 12), memoryview(b"x" * 12))  # too short for a row
    with pytest.raises(ChannelError):
        wrong.receive()
    x, numbers = np.ones((1, 32), np.float32), np.array([0, 0], np.int32)
    channel.send(Header(Kind.COMPUTE, 0, 7, 1, 1, 136), memoryview(numbers.tobytes()), memoryview(x.tobytes()))
    header = channel.receive()
    assert (header.kind, header.sequence, header.size) == (Kind.RESULT, 7, 128)
    wrong.close()
    channel.close()


@pytest.mark.parametrize(
    ("layer", "numbers", "words"),
    [(0, [0, 8], "outside of 0 .. 7"), (0, [1, 0], "outside of 0 .. 0"), (9, [0, 0], "layer 9 has no experts")],
)
def test_what_it_cannot_compute_is_refused_in_words(
    host: ExpertHost, layer: int, numbers: list[int], words: str
) -> None:
    channel, _ = connect(host.address.local, host.address.tcp, SECRET, 5.0)
    asked, x = np.array(numbers, np.int32), np.ones((1, 32), np.float32)
    channel.send(Header(Kind.COMPUTE, layer, 1, 1, 1, 136), memoryview(asked.tobytes()), memoryview(x.tobytes()))
    header = channel.receive()
    assert header.kind is Kind.REFUSED
    assert words in channel.read(header.size).decode()
    channel.close()


def test_a_host_with_other_kernels_is_not_used(mixture: Path, host: ExpertHost) -> None:
    """Its bits could differ."""
    spec = read_spec(mixture)
    plan = plan_of(spread(mixture, ["h0"]), [host], wait_s=0.0)
    dispatcher = Dispatcher(plan, spec, make_ops("bfloat16", "cpu", "plain", 1))
    assert dispatcher.report().lost == ("h0",)
    dispatcher.close()


def test_a_placement_of_another_model_is_refused(mixture: Path, host: ExpertHost) -> None:
    placement = spread(mixture, ["h0"])
    short = msgspec.structs.replace(placement, layers=placement.layers[:2], table=placement.table[:2])
    said = re.escape("expert_hosts: the placement has experts {0: 8, 1: 8} by layer, the model {0: 8, 1: 8, 2: 8}")
    with pytest.raises(ConfigError, match=said):
        Dispatcher(plan_of(short, [host]), read_spec(mixture), make_ops("float32", "cpu", "plain", 1))
