"""A service to measure: `understudy serve` from its start until the block ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

UNDERSTUDY = str(Path(sys.executable).with_name("understudy"))
_STOP_S = 120.0


class Running(NamedTuple):
    """`address` is for clients."""

    address: str
    pid: int


@contextmanager
def service(*flags: str, admin: int = 0) -> Iterator[Running]:
    """With these flags, on free ports; `admin`: where operators find it."""
    ports = ["--port", "0", "--admin-port", str(admin), "--metrics-port", "0"]
    process = subprocess.Popen([UNDERSTUDY, "serve", *ports, *flags], stdout=subprocess.PIPE, text=True)
    # A benchmark that is told to end takes the service down as well.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("understudy: ready on "):
                threading.Thread(target=process.stdout.read, daemon=True).start()  # so that it never waits for us
                yield Running(line.split()[-1], process.pid)
                return
        raise SystemExit("the service did not start")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
        signal.signal(signal.SIGTERM, before)
