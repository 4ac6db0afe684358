"""A network that breaks between a gateway and one of its replicas, and is mended."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from networks import HOSTS, cut, mend, two_networks

PROGRAM = str(Path(__file__).with_name("across.py"))
ROOT = Path(__file__).parents[2]


def test_streams_go_on_when_the_network_is_cut(text_model: Path) -> None:
    """One replica beside the gateway, one behind a wire that is cut under streams for as long as they last."""
    with two_networks() as names:
        started: list[subprocess.Popen[str]] = []

        def start(host: int, *words: str) -> subprocess.Popen[str]:
            command = ["ip", "netns", "exec", names[host], sys.executable, PROGRAM, *words]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
            started.append(process)
            return process

        def said(process: subprocess.Popen[str]) -> str:
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("says ")), "")
            return line.removeprefix("says ").strip()

        try:
            leaders = [start(i, "leader", f"r{i}", HOSTS[i], str(text_model)) for i in range(2)]
            addresses = [f"r{i}={said(leader)}" for i, leader in enumerate(leaders)]
            gateway = start(0, "gateway", *addresses, str(text_model))
            assert said(gateway) == "streaming"
            cut(names[1], 2)
            assert gateway.stdin is not None
            gateway.stdin.write("go on\n")
            gateway.stdin.flush()
            assert said(gateway) == "ended"
            mend(names[1], 2)
            told = json.loads(said(gateway))
            assert told["same"]
            assert told["failovers"] >= 1
        finally:
            for process in started:
                process.kill()
                process.communicate()
