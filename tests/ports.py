"""Ports for what a test starts: outside of those that the kernel gives to whoever asks for any, and that Ray's workers
take, so that nobody gets one between its choice and its use."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack

_PORTS = range(20_000, 32_000)
_dice = random.SystemRandom()  # tests run beside each other


def free_port(neighbours: int = 1) -> int:
    """The first of so many neighbours that are all free."""
    while True:
        first = _dice.choice(_PORTS[:-neighbours])
        with ExitStack() as probes:
            try:
                for port in range(first, first + neighbours):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
