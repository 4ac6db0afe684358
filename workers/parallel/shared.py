"""A group of processes on one machine, through memory that they share (`workers/kernels/src/group.cpp`)."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import secrets
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from workers.kernels import build
from workers.kernels.native_attention import DTYPES
from workers.parallel.errors import GroupBroken
from workers.parallel.share import MOST_RANKS

CAPACITY = 4 << 20  # bytes that a rank gives at a time; more goes in pieces
LIMIT_S = 120.0  # no rank takes longer for its part of a step
SPINS = 5000  # about 0.2 ms: longer than the usual wait, where each rank has a core

_P, _L, _I, _U = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_uint32
_BACK = ctypes.POINTER(ctypes.c_long)
_FUNCTIONS = {
    "understudy_group_bytes": (_L, [_L, _L]),
    "understudy_group_make": (None, [_P, _L, _L, _L]),
    "understudy_group_join": (None, [_P, _L]),
    "understudy_group_joined": (_L, [_P]),
    "understudy_group_break": (None, [_P, _L]),
    "understudy_group_slot": (_P, [_P, _L, _U, _L, ctypes.POINTER(_I), _BACK]),
    "understudy_group_publish": (None, [_P, _L, _U, _L]),
    "understudy_group_wait": (_I, [_P, _L, _L, _U, _L, _BACK]),
    "understudy_group_given": (_P, [_P, _L, _U, _BACK]),
    "understudy_group_sum": (_I, [_P, _L, _U, _I, _P, _I, _P, _P, _L, _L, _L, _BACK]),
}
_WORDS = {1: "rank {} has given up", 2: "the process of rank {} is gone", 3: "rank {} did not answer for {:.0f} s"}


def make_memory(size: int, capacity: int = CAPACITY, spins: int | None = None) -> Path:
    """A file for a new group of `size` ranks on this machine, readable by this user alone. Whoever made it removes it;
    it may be removed as soon as all ranks have joined. Raises BuildError where the kernels cannot be built."""
    lib = _library()
    if not 1 <= size <= MOST_RANKS:
        raise ValueError(f"a group has 1 to {MOST_RANKS} ranks, not {size}")
    if spins is None:
        spins = SPINS if size <= len(os.sched_getaffinity(0)) else SPINS // 50
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(tempfile.gettempdir())
    path = place / f"understudy-group-{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.ftruncate(descriptor, lib.understudy_group_bytes(size, capacity))
        with mmap.mmap(descriptor, 0) as memory:
            base = ctypes.c_char.from_buffer(memory)
            lib.understudy_group_make(ctypes.addressof(base), size, capacity, spins)
            del base
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    return path


class SharedGroup:
    """See `workers.parallel.group.Group`. `path` is what `make_memory` made, `limit_s` the longest wait for a rank."""

    kind = "shared memory"

    def __init__(self, path: Path, rank: int, size: int, capacity: int = CAPACITY, limit_s: float = LIMIT_S) -> None:
        self.rank, self.size = rank, size
        self._lib = _library()
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        self._buffer = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._base = self._buffer.data_ptr()
        self._capacity, self._limit_ms = capacity, int(limit_s * 1000)
        self._number = 0
        self._why = ""
        self._culprit = ctypes.c_long(0)
        self._outcome = ctypes.c_int(0)
        self._back = ctypes.byref(self._culprit)
        self._closing = threading.Lock()
        self._lib.understudy_group_join(self._base, rank)

    def wait_until_joined(self, timeout_s: float) -> None:
        """Until every rank is there. Raises GroupBroken after `timeout_s` seconds."""
        end = time.monotonic() + timeout_s
        while (there := self._lib.understudy_group_joined(self._base)) < self.size:
            if time.monotonic() > end:
                raise GroupBroken(f"{there} of {self.size} ranks joined within {timeout_s:.0f} s")
            time.sleep(0.005)

    def sum(self, x: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        rows, columns = x.shape
        x = x.contiguous()
        y = torch.empty((rows, columns), dtype=dtype)
        most = max(1, self._capacity // (columns * x.element_size()))
        into, out = DTYPES[x.dtype], DTYPES[dtype]
        at, to = x.data_ptr(), y.data_ptr()
        for begin in range(0, rows, most):
            count = min(most, rows - begin)
            self._check(
                self._lib.understudy_group_sum(
                    self._base, self.rank, self._next(), into, at + begin * columns * x.element_size(), out,
                    to + begin * columns * y.element_size(), None if bias is None else bias.data_ptr(), count, columns,
                    self._limit_ms, self._back,
                )
            )  # fmt: skip
        return y

    def gather(self, x: Tensor, root: int | None = None, counts: Sequence[int] | None = None) -> list[Tensor]:
        x = x.contiguous()
        mine = root is None or root == self.rank
        heights = [x.shape[0]] * self.size if counts is None else counts
        parts = [x.new_empty(height, *x.shape[1:]) for height in heights] if mine else []
        row = math.prod(x.shape[1:]) * x.element_size()  # not its stride, which of a single row may be anything
        for begin in range(0, max(heights) * row, self._capacity):
            number = self._put(x.data_ptr() + begin, max(0, min(self._capacity, x.shape[0] * row - begin)))
            if not mine:
                continue
            self._wait(number, -1)
            for rank, part in enumerate(parts):
                address, count = self._given(rank, number)
                ctypes.memmove(part.data_ptr() + begin, address, count)
        return parts

    def tell(self, message: bytes) -> None:
        whole = len(message).to_bytes(8, "little") + message
        for begin in range(0, len(whole), self._capacity):
            piece = whole[begin : begin + self._capacity]
            self._put(piece, len(piece))

    def hear(self) -> bytes:
        parts: list[bytes] = []
        total, got = 8, 0
        while got < total:
            number = self._next()
            self._wait(number, 0, forever=True)
            parts.append(ctypes.string_at(*self._given(0, number)))
            if got == 0:
                total += int.from_bytes(parts[0][:8], "little")
            got += len(parts[-1])
            self._lib.understudy_group_publish(self._base, self.rank, number, 0)
        return b"".join(parts)[8:]

    def exchange(self, message: bytes) -> list[bytes]:
        if len(message) > self._capacity:
            raise ValueError(f"a message of {len(message)} bytes is larger than the {self._capacity} of a slot")
        number = self._put(message, len(message))
        self._wait(number, -1)
        return [ctypes.string_at(*self._given(rank, number)) for rank in range(self.size)]

    def abort(self, why: str) -> None:
        self._why = self._why or why
        with self._closing:
            if self._base:
                self._lib.understudy_group_break(self._base, self.rank)

    def close(self) -> None:
        with self._closing:
            self._base = 0
        self._buffer = torch.empty(0)

    def _next(self) -> int:
        if not self._base:
            raise GroupBroken("the group is closed")
        self._number = (self._number + 1) & 0xFFFFFFFF
        return self._number

    def _put(self, data: bytes | int, count: int) -> int:
        """Gives `count` bytes to the next operation; its number."""
        number = self._next()
        slot = self._lib.understudy_group_slot(
            self._base, self.rank, number, self._limit_ms, ctypes.byref(self._outcome), self._back
        )
        if not slot:
            self._check(self._outcome.value)
        ctypes.memmove(slot, data, count)
        self._lib.understudy_group_publish(self._base, self.rank, number, count)
        return number

    def _wait(self, number: int, of: int, forever: bool = False) -> None:
        limit = 0 if forever else self._limit_ms
        self._check(self._lib.understudy_group_wait(self._base, self.rank, of, number, limit, self._back))

    def _given(self, rank: int, number: int) -> tuple[int, int]:
        size = ctypes.c_long(0)
        address = self._lib.understudy_group_given(self._base, rank, number, ctypes.byref(size))
        return address, size.value

    def _check(self, outcome: int) -> None:
        if outcome == 0:
            return
        if outcome not in _WORDS:
            raise TypeError("the sum takes float32, or the dtype that comes out, in float32, bfloat16 or float16")
        why = _WORDS[outcome].format(self._culprit.value, self._limit_ms / 1000)
        raise GroupBroken(self._why or why)


def _library() -> ctypes.CDLL:
    lib, _ = build.load()
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
