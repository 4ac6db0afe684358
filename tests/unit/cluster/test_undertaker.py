"""Nothing outlives the service, however it ends."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import psutil

from cluster import undertaker

_PARENT = """
import os, subprocess, sys
from pathlib import Path
from cluster import undertaker
mark, directory = sys.argv[1], Path(sys.argv[2])
undertaker.watch(mark, directory)
sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
marked = subprocess.Popen(sleep, start_new_session=True, env=os.environ | {undertaker.MARK: mark})
with (directory / "log").open("w") as log:
    writing = subprocess.Popen(sleep, start_new_session=True, stdout=log)
print(marked.pid, writing.pid, flush=True)
sys.stdin.read()
"""


def sleeper(mark: str) -> subprocess.Popen[bytes]:
    """A process that runs: before its first line, /proc may not show its environment yet."""
    program = "import time; print(flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {undertaker.MARK: mark}, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout as up:
        assert up.readline() == b"\n"
    return process


def test_only_ours_are_buried(tmp_path: Path) -> None:
    mark, other = secrets.token_hex(8), secrets.token_hex(8)
    ours, theirs = sleeper(mark), sleeper(other)
    try:
        assert [p.pid for p in undertaker.ours(mark, tmp_path)] == [ours.pid]
        assert undertaker.bury(mark, tmp_path, 0.0) == 1
        assert not psutil.pid_exists(ours.pid)
        ours.wait(10)
        assert theirs.poll() is None
        assert undertaker.bury(mark, tmp_path, 5.0) == 0
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait(10)


def test_a_killed_parent_leaves_neither_process_nor_directory(tmp_path: Path) -> None:
    mark, directory = secrets.token_hex(8), tmp_path / "session"
    directory.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, mark, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert sorted(p.pid for p in undertaker.ours(mark, directory)) == sorted(children)
        parent.kill()
    while undertaker.ours(mark, directory) or directory.exists():
        pass  # pytest's timeout is the limit
