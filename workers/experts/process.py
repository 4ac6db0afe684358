"""An expert host as a process: opens the checkpoint, then serves. The plain class beneath the Ray actor.

Without Ray: `python -m workers.experts.process IP` takes a `HostPlan` and then orders, each a line of JSON, such as
`["hold", [[0, 1], [0, 2]]]`; it answers each with a line, and ends with its standard input.
"""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from understudy.errors import UnderstudyError
from workers.experts.placement import HostReport

if TYPE_CHECKING:
    from workers.experts.host import ExpertHost

log = logging.getLogger(__name__)

ROOM_SHARE = 0.8  # of a host's memory: experts that come and go need room for a moment beside those that stay


class HostPlan(msgspec.Struct, frozen=True):
    """What a host is started with. `model_dir`, `dtype`, `device`, `kernels` are the engine's: only equal kernels give
    equal bits. `name` and `life` as in `HostAddress`; `neighbours` are hosts that share this node's memory, itself
    included; `capacity` in experts, None: what its share of the memory holds."""

    model_dir: str
    name: str
    life: int
    secret: str
    dtype: str = "auto"
    device: str = "cpu"
    kernels: str = "auto"
    threads: int | None = None
    capacity: int | None = None
    neighbours: int = 1

    def __repr__(self) -> str:
        return f"HostPlan({self.name!r}, life {self.life})"


class HostProcess:
    """Started with a plan; every method is quick but `start`. Failures of `start` are reported, not raised."""

    def __init__(self, plan: HostPlan, ip: str) -> None:
        os.environ["OMP_NUM_THREADS"] = str(plan.threads or os.cpu_count() or 1)
        self._plan, self._ip = plan, ip
        self._host: ExpertHost | None = None

    def start(self) -> tuple[HostReport | None, str, str]:
        """(its report, "", "") once it listens, or (None, kind of the error, what it says)."""
        _yield_to_engines()
        try:
            self._host = open_host(self._plan, self._ip)
            self._host.start()
        except UnderstudyError as error:
            return None, error.kind, error.message
        except Exception as error:
            log.exception("the expert host could not be started")
            return None, "INTERNAL", f"{type(error).__name__}: {error}"
        return self._host.report(), "", ""

    def report(self) -> HostReport | None:
        """None before it has been started."""
        return None if self._host is None else self._host.report()

    def hold(self, places: list[tuple[int, int]]) -> None:
        """See `ExpertHost.hold`."""
        if self._host is not None:
            self._host.hold(places)

    def keep(self, places: list[tuple[int, int]]) -> None:
        """See `ExpertHost.keep`."""
        if self._host is not None:
            self._host.keep(places)

    def stop(self) -> None:
        """See `ExpertHost.stop`."""
        if self._host is not None:
            self._host.stop()


def _yield_to_engines() -> None:
    """Of this thread and those that it starts: a host that is woken on an engine's core does not interrupt it, which
    may still have to send to other hosts. Where it finds a free core it starts at once all the same."""
    with suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def open_host(plan: HostPlan, ip: str) -> ExpertHost:
    """A host with nothing on its shelf. Brings torch into the process. Raises CheckpointError, ConfigError."""
    import torch

    from workers.engine.sizes import available_memory
    from workers.experts.host import ExpertHost
    from workers.experts.shelf import Shelf
    from workers.kernels.choose import make_ops
    from workers.model.config import read_spec

    path = Path(plan.model_dir)
    spec = read_spec(path)
    ops = make_ops(spec.dtype if plan.dtype == "auto" else plan.dtype, plan.device, plan.kernels, plan.threads)
    shelf = Shelf.open(path, spec, ops, plan.device)
    most = sum(shelf.experts)
    if plan.capacity is not None:
        capacity = min(plan.capacity, most)
    else:
        memory = int(available_memory(torch.device(plan.device)) * ROOM_SHARE) // plan.neighbours
        capacity = min(memory // max(1, shelf.expert_bytes), most)
    return ExpertHost(shelf, name=plan.name, life=plan.life, secret=plan.secret, capacity=capacity, ip=ip, node=ip)


def main(ip: str) -> None:
    """One host over standard input and output, for tests and measurements."""
    host = HostProcess(msgspec.json.decode(sys.stdin.readline(), type=HostPlan), ip)

    def say(answer: object) -> None:
        sys.stdout.write(msgspec.json.encode(answer).decode() + "\n")
        sys.stdout.flush()

    say(host.start())
    for line in sys.stdin:
        order, *places = msgspec.json.decode(line)
        if order == "hold":
            host.hold([(layer, expert) for layer, expert in places[0]])
        elif order == "keep":
            host.keep([(layer, expert) for layer, expert in places[0]])
        say(host.report())
    host.stop()


if __name__ == "__main__":
    main(sys.argv[1])
