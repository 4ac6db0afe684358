"""A group over torch's collectives: gloo between CPU nodes, NCCL between GPUs; what the leader tells goes over sockets.

Sums are gathered and added here, over the ranks' tree: what the library adds up by itself has an order of its own. A
collective has a time limit; the wait for the leader's next word has none, and ends when its connection does.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from workers.parallel.errors import GroupBroken
from workers.parallel.group import tree_sum

LIMIT_S = 120.0
LOOK_S = 0.5  # between looks whether the group is broken


class TorchGroup:
    """See `workers.parallel.group.Group`. `device` is cpu (gloo) or cuda:N (NCCL, and gloo for messages)."""

    def __init__(
        self, host: str, port: int, rank: int, size: int, device: str = "cpu", timeout_s: float = LIMIT_S
    ) -> None:
        """Rank 0 listens on `host`:`port`. Returns when all ranks are there; raises GroupBroken after `timeout_s`."""
        self.rank, self.size = rank, size
        self.device = torch.device(device)
        self.kind = "nccl" if self.device.type == "cuda" else "gloo"
        self._broken = threading.Event()
        self._why = ""
        self._wires: list[socket.socket] = []
        limit = timedelta(seconds=timeout_s)
        try:
            store = dist.TCPStore(host, port, size, rank == 0, limit)
            self._wires = _lead(store, host, size, timeout_s) if rank == 0 else [_join(store, host, timeout_s)]
            own = host if rank == 0 else self._wires[0].getsockname()[0]
            self._gloo: Any = _gloo(dist.PrefixStore("gloo", store), rank, size, own, limit)
            self._data: Any = self._gloo
            if self.kind == "nccl":
                options = dist.ProcessGroupNCCL.Options()
                self._data = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)
        except (RuntimeError, OSError) as error:
            self.close()
            raise GroupBroken(f"the group at {host}:{port} did not come together: {_first_line(error)}") from error
        self._store = store

    def sum(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        if x.dtype not in (torch.float32, dtype):
            raise TypeError("the sum takes float32, or the dtype that comes out, in float32, bfloat16 or float16")
        total = tree_sum(self.gather(x))
        return (total if bias is None else total + bias).to(dtype)

    def gather(self, x: Tensor, root: int | None = None, counts: Sequence[int] | None = None) -> list[Tensor]:
        heights = [x.shape[0]] * self.size if counts is None else counts
        even = x.new_zeros(max(heights), *x.shape[1:])
        even[: x.shape[0]] = x
        parts = [torch.empty_like(even) for _ in range(self.size)]
        if even.numel():
            self._do(lambda: self._data.allgather([parts], [even]))
        return [part[:n] for part, n in zip(parts, heights, strict=True)] if root in (None, self.rank) else []

    def tell(self, message: bytes) -> None:
        for wire in self._wires:
            try:
                wire.sendall(len(message).to_bytes(8, "little") + message)
            except OSError as error:
                raise GroupBroken(self._why or f"a rank is gone: {error}") from error

    def hear(self) -> bytes:
        (wire,) = self._wires
        try:
            return _receive(wire, int.from_bytes(_receive(wire, 8), "little"))
        except OSError as error:
            raise GroupBroken(self._why or f"rank 0 is gone: {error}") from error

    def exchange(self, message: bytes) -> list[bytes]:
        lengths = [torch.empty(1, dtype=torch.int64) for _ in range(self.size)]
        self._do(lambda: self._gloo.allgather([lengths], [torch.tensor([len(message)])]))
        most = max(int(length) for length in lengths)
        mine = torch.zeros(max(most, 1), dtype=torch.uint8)
        if message:
            mine[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._do(lambda: self._gloo.allgather([parts], [mine]))
        return [part[: int(n)].numpy().tobytes() for part, n in zip(parts, lengths, strict=True)]

    def abort(self, why: str) -> None:
        self._why = self._why or why
        self._broken.set()
        for wire in self._wires:
            with suppress(OSError):  # it is closed already
                wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.abort("the group is closed")
        for wire in self._wires:
            wire.close()

    def _do(self, begin: Any) -> None:
        if self._broken.is_set():
            raise GroupBroken(self._why)
        try:
            work = begin()
            while not _done(work):
                if self._broken.is_set():
                    raise GroupBroken(self._why)
        except GroupBroken:
            raise
        except RuntimeError as error:
            raise GroupBroken(self._why or f"a rank is gone: {_first_line(error)}") from error


def _gloo(store: Any, rank: int, size: int, address: str, limit: timedelta) -> Any:
    """Gloo on the interface by which the leader is reached, not on the one that this machine's name resolves to."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = limit
    return dist.ProcessGroupGloo(store, rank, size, options)


def _done(work: Any) -> bool:
    """Waits for a while. A wait that runs out ends nothing but itself."""
    try:
        work.wait(timedelta(seconds=LOOK_S))
    except RuntimeError:
        if work.is_completed():
            raise
        return False
    return True


def _lead(store: Any, host: str, size: int, timeout_s: float) -> list[socket.socket]:
    """The leader's wires, of rank 1, 2 and so on: whoever shows the secret that lies in the store."""
    secret = secrets.token_bytes(16)
    wires: dict[int, socket.socket] = {}
    with socket.create_server((host, 0)) as server:
        server.settimeout(timeout_s)
        store.set("secret", secret.hex())
        store.set("port", str(server.getsockname()[1]))
        while len(wires) < size - 1:
            wire, _ = server.accept()
            wire.settimeout(timeout_s)
            with suppress(OSError):
                said = _receive(wire, len(secret) + 4)
                if secrets.compare_digest(said[:-4], secret):
                    wires[int.from_bytes(said[-4:], "little")] = _kept(wire)
    return [wires[rank] for rank in sorted(wires)]


def _join(store: Any, host: str, timeout_s: float) -> socket.socket:
    rank = store.add("ranks", 1)  # which one does not matter: all are told the same
    wire = socket.create_connection((host, int(store.get("port"))), timeout_s)
    wire.sendall(bytes.fromhex(store.get("secret").decode()) + int(rank).to_bytes(4, "little"))
    return _kept(wire)


def _kept(wire: socket.socket) -> socket.socket:
    """Waits as long as it takes, and hears within a minute of a machine that is gone."""
    wire.settimeout(None)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            wire.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return wire


def _receive(wire: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view, got = memoryview(data), 0
    while got < count:
        read = wire.recv_into(view[got:])
        if not read:
            raise ConnectionError("its connection has ended")
        got += read
    return bytes(data)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:300]
