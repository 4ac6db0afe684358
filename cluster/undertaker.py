"""Sees to it that nothing outlives the service on this machine, not even when it is killed.

Ray's processes die with the one that started them, except for two agents that wait for ever for a cluster that is
gone. Every process that Ray starts inherits a mark in its environment that no other service has, and writes to files
in a directory that no other service has (some overwrite their environment with a title). `bury` ends those; `watch`
runs this file as a process that does so when the pipe to its parent breaks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "UNDERSTUDY_INSTANCE"


def ours(mark: str, directory: Path) -> list[psutil.Process]:
    """Processes that carry the mark or hold a file in `directory` open, this one excepted."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and _is_ours(process, mark, f"{directory}{os.sep}"):
                found.append(process)
    return found


def _is_ours(process: psutil.Process, mark: str, inside: str) -> bool:
    with suppress(psutil.AccessDenied):
        if process.environ().get(MARK) == mark:
            return True
    return any(file.path.startswith(inside) for file in process.open_files())


def bury(mark: str, directory: Path, patience_s: float) -> int:
    """Waits up to `patience_s` seconds for our processes to end, then kills them; how many had to be."""
    end = time.monotonic() + patience_s
    while (left := ours(mark, directory)) and time.monotonic() < end:
        psutil.wait_procs(left, timeout=max(0.05, min(0.5, end - time.monotonic())))
    killed: set[int] = set()
    while left:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
                killed.add(process.pid)
        psutil.wait_procs(left, timeout=2.0)
        left = ours(mark, directory)
    return len(killed)


def watch(mark: str, directory: Path) -> subprocess.Popen[bytes]:
    """Starts the process that buries when this one ends, however it ends, and then removes `directory`.

    Closing its stdin is the way to end it.
    """
    environment = {k: v for k, v in os.environ.items() if k != MARK}
    return subprocess.Popen(
        [sys.executable, "-I", __file__, mark, str(directory)],
        stdin=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C in the terminal is not meant for it
    )


def main(mark: str, directory: Path) -> None:
    sys.stdin.buffer.read()  # until the parent is gone
    bury(mark, directory, 0.0)
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
