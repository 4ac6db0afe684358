"""Two hosts on one machine: network namespaces with a wire between them, for tests."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

HOSTS = ("10.77.31.1", "10.77.31.2")


@contextmanager
def two_networks() -> Iterator[list[str]]:
    """Names of two network namespaces whose hosts are 10.77.31.1 and 10.77.31.2, joined by a wire of their own."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and `ip` (iproute2)")
    names = [f"understudy-{os.getpid()}-{i}" for i in (1, 2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    made = []
    try:
        for name in names:
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespace can be made here: {error.stderr.strip()}")
            made.append(name)
        ip("link", "add", "us1", "netns", names[0], "type", "veth", "peer", "name", "us2", "netns", names[1])
        for i, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.77.31.{i}/24", "dev", f"us{i}")
            ip("-n", name, "link", "set", f"us{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def cut(name: str, number: int) -> None:
    """Breaks the wire at the end of host `number`, 1 or 2, in the namespace `name`."""
    subprocess.run(["ip", "-n", name, "link", "set", f"us{number}", "down"], check=True)


def mend(name: str, number: int) -> None:
    """Joins it again."""
    subprocess.run(["ip", "-n", name, "link", "set", f"us{number}", "up"], check=True)
