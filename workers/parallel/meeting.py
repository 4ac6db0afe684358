"""Where the ranks of a group find each other: rank 0 offers a place, everybody joins there."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from workers.parallel.group import Group

log = logging.getLogger(__name__)

JOIN_S = 120.0  # importing torch on a busy machine takes its time


class Meeting(msgspec.Struct, frozen=True):
    """`place` is the path of shared memory on one machine, or HOST:PORT where rank 0 listens."""

    kind: Literal["shared", "gloo", "nccl"]
    size: int
    place: str


def offer(size: int, one_machine: bool, address: str, device: str) -> Meeting:
    """Called in rank 0's process. `one_machine`: all ranks run on it; `address`: where others reach it.

    Shared memory on one machine's CPUs, where the kernels can be built; else gloo, and NCCL between GPUs.
    """
    if device.startswith("cuda"):
        return Meeting("nccl", size, f"{address}:{_free_port(address)}")
    if one_machine:
        from workers.kernels.build import BuildError
        from workers.parallel.shared import make_memory

        try:
            return Meeting("shared", size, str(make_memory(size)))
        except BuildError as reason:
            log.warning("no shared memory between ranks without the kernels; gloo is many times slower: %s", reason)
    return Meeting("gloo", size, f"{address}:{_free_port(address)}")


def join(meeting: Meeting, rank: int, device: str, timeout_s: float = JOIN_S) -> Group:
    """This process's end of the group. Returns at rank 0 when all are there; raises GroupBroken after `timeout_s`."""
    if meeting.kind == "shared":
        from workers.parallel.shared import SharedGroup

        group = SharedGroup(Path(meeting.place), rank, meeting.size)
        if rank == 0:
            try:
                group.wait_until_joined(timeout_s)
            finally:
                Path(meeting.place).unlink(missing_ok=True)  # from here on it goes with its ranks, however they end
        return group
    from workers.parallel.torch_group import TorchGroup

    host, _, port = meeting.place.rpartition(":")
    return TorchGroup(host, int(port), rank, meeting.size, device if meeting.kind == "nccl" else "cpu", timeout_s)


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
