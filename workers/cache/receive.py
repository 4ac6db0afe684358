"""A reply's values received by one foreign call, during which the interpreter is free: `src/receive.cpp`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from workers.kernels.build import BuildError, load

CLOSED, SILENT, BROKEN, NO_REPLY = -1, -2, -3, -4  # what went wrong; BROKEN: with an errno


class _Buffer(ctypes.Structure):
    """`struct Buffer`."""

    _fields_ = (
        ("socket", ctypes.c_int),
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_long),
        ("begin", ctypes.c_long),
        ("end", ctypes.c_long),
    )


class Receiver:
    """Receives from a socket whose timeout is the kernel's. What was read ahead is in `buffer`, which whoever parses
    the rest shares: bytes [begin, end) of it."""

    def __init__(self, function: Any, socket: int, buffer: bytearray) -> None:
        self._function = function
        self._own = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        self._buffer = _Buffer(socket, ctypes.addressof(self._own), len(buffer))

    def values(self, into: Sequence[memoryview], begin: int, end: int) -> tuple[int, list[int], int, int]:
        """(0 or what went wrong, what became of each value, begin, end)."""
        count, buffer = len(into), self._buffer
        buffer.begin, buffer.end = begin, end
        held = [(ctypes.c_char * 0).from_buffer(place) for place in into]  # each place stays while it is written to
        places = (ctypes.c_void_p * count)(*[ctypes.addressof(place) for place in held])
        sizes = (ctypes.c_long * count)(*[len(place) for place in into])
        states = (ctypes.c_int * count)()
        outcome = self._function(ctypes.byref(buffer), places, sizes, states, count)
        return outcome, list(states), buffer.begin, buffer.end


def make_receiver(socket: int, buffer: bytearray) -> Receiver | None:
    """None where there are no kernels: whoever asks then receives by himself."""
    function = _function()
    return None if function is None else Receiver(function, socket, buffer)


def why() -> str:
    """Why the last call is BROKEN."""
    return os.strerror(ctypes.get_errno())


@lru_cache(maxsize=1)
def _function() -> Any:
    try:
        _, library = load()
    except BuildError:
        return None
    function = ctypes.CDLL(str(library.path), use_errno=True).understudy_receive_values
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
    function.restype = ctypes.c_long
    return function
