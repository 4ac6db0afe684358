"""`understudy serve` in a process of its own, with everything Ray brings, and what tests ask of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
from ports import free_port

from understudy.client import Client
from understudy.v1 import admin_pb2
from workers.kernels.build import cache_dir

UNDERSTUDY = str(Path(sys.executable).with_name("understudy"))
TOKEN = "a-token-for-tests"
READY_S = 180


class Service:
    """`understudy serve` with flags; ports are free ones unless said otherwise. Use `running`."""

    def __init__(self, logs: Path, flags: list[str], environment: Mapping[str, str]) -> None:
        self.address = ""
        self.output: list[str] = []
        self._logs = logs
        self._flags = flags
        self._environment = environment
        self.ports = {"admin": free_port(), "metrics": free_port(neighbours=2)}
        self.process: subprocess.Popen[str] = self._start()

    @property
    def admin(self) -> str:
        return f"127.0.0.1:{self.ports['admin']}"

    def _start(self) -> subprocess.Popen[str]:
        ports = ["--port", "0", "--admin-port", str(self.ports["admin"]), "--metrics-port", str(self.ports["metrics"])]
        # Logs of its own; kernels that every service shares, for building them takes longer than most tests.
        environment = {"UNDERSTUDY_CACHE": str(cache_dir().parent)} | os.environ
        environment |= {"XDG_CACHE_HOME": str(self._logs), "COLUMNS": "200"} | dict(self._environment)
        return subprocess.Popen(
            [UNDERSTUDY, "serve", *ports, *self._flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )

    def wait_until_ready(self) -> None:
        """Reads the console until the ready line."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line.rstrip("\n"))
            found = re.fullmatch(r"understudy: ready on (\S+)\n", line)
            if found:
                self.address = found.group(1)
                return
        raise AssertionError("the service ended before it was ready:\n" + "\n".join(self.output))

    def read_until(self, pattern: str) -> str:
        """Reads the console until a line that matches, which is returned."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output.append(line.rstrip("\n"))
            if re.fullmatch(pattern, self.output[-1]):
                return self.output[-1]
        raise AssertionError(f"the service ended before it said {pattern}:\n" + "\n".join(self.output))

    def client(self, token: str | None = TOKEN) -> Client:
        return Client(self.address, token=token)

    def status(self) -> admin_pb2.GetStatusResponse:
        with Client(self.admin) as client:
            return client.status(timeout=10)

    def metric(self, name: str) -> float:
        """The sum of a counter or gauge over its labels and over all gateways."""
        total = 0.0
        for port in range(self.ports["metrics"], self.ports["metrics"] + 2):
            with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
                lines = page.read().decode().splitlines()
            total += sum(float(x.rsplit(" ", 1)[1]) for x in lines if re.match(rf"{name}(\{{|\s)", x))
        return total

    def processes(self) -> list[psutil.Process]:
        """Everything that it has started."""
        return [p for p in psutil.Process(self.process.pid).children(recursive=True) if p.is_running()]

    def stop(self) -> list[str]:
        """SIGTERM; what it said from then on. Asserts that it ends well and leaves nothing."""
        started = self.processes()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.stdout is not None
        said = self.process.stdout.read().splitlines()
        assert self.process.wait(60) == 0, said
        assert alive(started) == []
        assert not self.directory.exists()
        return said

    @property
    def directory(self) -> Path:
        return Path(tempfile.gettempdir()) / f"understudy-{self.process.pid}"

    def read_logs(self) -> str:
        """All that was written to logs, for a failure's report."""
        files = sorted([*self._logs.rglob("*.log"), *self._logs.rglob("*.err"), *self.directory.rglob("worker*.err")])
        return "\n".join(f"== {f}\n{f.read_text(errors='replace')[-3000:]}" for f in files if f.stat().st_size)


@contextmanager
def running(logs: Path, flags: list[str], environment: Mapping[str, str] | None = None) -> Iterator[Service]:
    """A service from its start until the block ends; killed where that ends badly."""
    service = Service(logs, flags, environment or {})
    try:
        yield service
    finally:
        if service.process.poll() is None:
            service.process.kill()  # its watcher buries the rest
        service.process.wait(10)
        if service.process.stdout is not None:
            service.process.stdout.close()


def until(predicate: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits for what another process does."""
    end = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def idle(status: admin_pb2.GetStatusResponse) -> bool:
    """No sequence runs or waits, and only the prefix tree holds blocks."""
    return all(r.running == r.waiting == r.cache.blocks_in_use == 0 for r in status.replicas)


def make_tiny_llama(directory: Path, **changes: Any) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, as transformers writes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        **(sizes | changes), num_key_value_heads=2, vocab_size=256, max_position_embeddings=512, eos_token_id=None
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return directory
