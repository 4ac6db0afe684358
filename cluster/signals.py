"""What signals ask of a running service."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Stopped(Exception):
    """Somebody asked the service to end."""


class Signals:
    """SIGINT and SIGTERM: the first asks to drain, the second not to wait. SIGHUP, where it `reloads`: asks to read the
    configuration again."""

    def __init__(self, reloads: bool = False) -> None:
        self._asked = threading.Event()
        self._stop = self._reload = False
        self._before: dict[int, object] = {}
        self._numbers = (signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if reloads else ()))

    def __enter__(self) -> Signals:
        self._before = {s: signal.getsignal(s) for s in self._numbers}
        self.install()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def install(self) -> None:
        """Takes the signals."""
        for number in self._numbers:
            signal.signal(number, self._handle)

    def ignore(self) -> None:
        """What is left takes a moment and has to be done."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._reload = True
        elif self._stop:
            raise Stopped
        else:
            self._stop = True
        self._asked.set()

    def check(self) -> None:
        """Raises Stopped where the service should end."""
        if self._stop:
            raise Stopped

    def wait(self) -> bool:
        """Until a signal comes: True where the configuration should be read again, False where the service should
        end."""
        while not (self._stop or self._reload):
            self._asked.wait(1.0)
            self._asked.clear()
        self._reload = False
        return not self._stop
