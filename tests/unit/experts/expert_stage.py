"""Expert hosts in threads of this process, for a checkpoint, and an engine's runner over them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from workers.engine.contract import EngineConfig
from workers.engine.runner import Runner
from workers.experts.host import ExpertHost
from workers.experts.placement import ExpertsPlan, Homes, HostReport, HostsView, Placement
from workers.experts.process import HostPlan
from workers.experts.shelf import Shelf
from workers.kernels.choose import make_ops
from workers.model.config import read_spec
from workers.model.spec import MoeFfn

SECRET = "a-secret-for-tests"


def open_host(
    path: Path, name: str, *, kernels: str, dtype: str = "float32", life: int = 1, capacity: int = 10**6
) -> ExpertHost:
    """A host with nothing on its shelf, listening."""
    shelf = Shelf.open(path, read_spec(path), make_ops(dtype, "cpu", kernels, 1))
    host = ExpertHost(shelf, name=name, life=life, secret=SECRET, capacity=capacity)
    host.start()
    return host


def spread(path: Path, names: Sequence[str], version: int = 1, copies: int = 1, shift: int = 0) -> Placement:
    """Expert e of each layer at host (e + layer + shift) mod N, and at the next ones where there are `copies`."""
    spec = read_spec(path)
    layers = tuple(i for i, ffn in enumerate(spec.ffn) if isinstance(ffn, MoeFfn))

    def homes(layer: int, expert: int) -> Homes:
        first = expert + layer + shift
        return tuple(((first + copy) % len(names), 1 / copies) for copy in range(copies))

    counts = {i: ffn.experts for i, ffn in enumerate(spec.ffn) if isinstance(ffn, MoeFfn)}
    table = tuple(tuple(homes(layer, e) for e in range(counts[layer])) for layer in layers)
    return Placement(version, layers, tuple(names), table)


def plan_of(
    placement: Placement,
    hosts: Sequence[ExpertHost],
    number: int = 1,
    silence_s: float = 5.0,
    wait_s: float = 20.0,
    tcp: bool = False,
) -> ExpertsPlan:
    """`tcp`: as if they were on other nodes."""
    addresses = tuple(msgspec.structs.replace(h.address, local="") if tcp else h.address for h in hosts)
    return ExpertsPlan(HostsView(number, placement, addresses), SECRET, silence_s, wait_s)


@contextmanager
def hosts_of(path: Path, count: int, *, kernels: str, dtype: str = "float32") -> Iterator[list[ExpertHost]]:
    hosts = [open_host(path, f"h{i}", kernels=kernels, dtype=dtype) for i in range(count)]
    try:
        yield hosts
    finally:
        for host in hosts:
            host.stop()


def runner_over(path: Path, plan: ExpertsPlan, *, kernels: str, dtype: str = "float32", **more: object) -> Runner:
    config = EngineConfig(
        model_dir=str(path), kernels=kernels, dtype=dtype, threads=1, max_running=4, experts=plan, **more
    )  # type: ignore[arg-type]
    return Runner.from_checkpoint(config)


class Process:
    """A host in a process of its own, without Ray."""

    def __init__(self, plan: HostPlan) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "workers.experts.process", "127.0.0.1"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        report, _, said = self.ask(plan, tuple[HostReport | None, str, str])
        assert report is not None, said
        self.address, self.report_bytes = report.address, report.expert_bytes

    def ask(self, order: object, kind: object) -> object:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(order) + b"\n")
        self.process.stdin.flush()
        return msgspec.json.decode(self.process.stdout.readline(), type=kind)  # type: ignore[call-overload]

    def report(self) -> HostReport:
        return self.ask(["report"], HostReport)  # type: ignore[return-value]

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
