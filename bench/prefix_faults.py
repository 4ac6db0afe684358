"""Redis in trouble: times to first token of an engine with the store beside one without. `bench/prefix.py faults`."""

from __future__ import annotations

import argparse
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class Throttle:
    """A TCP proxy in front of a Unix socket, in a process of its own, so that it takes nothing from the engines'
    interpreter."""

    def __init__(self, path: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.url = f"redis://127.0.0.1:{self._process.stdout.readline().strip()}"

    def let_through(self, bytes_s: float | None) -> None:
        """So much each way; None: all."""
        assert self._process.stdin is not None
        print(bytes_s or 0, file=self._process.stdin, flush=True)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class Pump:
    """What that process does."""

    def __init__(self, path: str) -> None:
        self.bytes_s: float | None = None
        self._path, self._server = path, socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            with suppress(OSError):
                near, _ = self._server.accept()
                far = socket.socket(socket.AF_UNIX)
                try:
                    far.connect(self._path)
                except OSError:
                    near.close()
                    continue
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(1 << 14 if self.bytes_s else 1 << 20):
                if self.bytes_s:
                    time.sleep(len(data) / self.bytes_s)
                b.sendall(data)
        for s in (a, b):
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)


def run_faults(arguments: argparse.Namespace) -> dict[str, Any]:
    from redis_server import TestRedis

    from workers.cache.orders import StoreConfig
    from workers.engine import EngineConfig, Request
    from workers.engine.build import build_engine

    rng, count = random.Random(11), 0
    redis = TestRedis(maxmemory="64mb", maxmemory_policy="allkeys-lru")
    redis.start()
    proxy = Throttle(redis.socket)

    def engine(store: StoreConfig | None) -> Any:
        return build_engine(EngineConfig(str(ROOT / "models" / "demo"), store=store, max_running=8))

    def play(engine: Any, prompt: list[int]) -> tuple[float, list[int], tuple[int, int]]:
        nonlocal count
        count += 1
        begun, first, tokens, cached = time.perf_counter(), 0.0, [], (0, 0)
        engine.add(Request(f"r{count}", prompt, 4))
        while engine.has_work():
            for output in engine.step():
                assert not output.error, output.error
                if output.token_ids and not first:
                    first = time.perf_counter() - begun
                    cached = (output.cached_host, output.cached_store)
                tokens += output.token_ids
        return first, tokens, cached

    with_store, without = engine(StoreConfig(host_bytes=0, url=proxy.url)), engine(None)
    other = engine(StoreConfig(host_bytes=0, url=redis.url))  # fills Redis with what is asked for later
    for e in (with_store, without, other):
        play(e, rng.choices(range(200, 2000), k=400))

    def pairs(known: bool) -> list[tuple[float, float, int]]:
        """Half of the prompts are in Redis, where `known`."""
        found = []
        for i in range(arguments.pairs):
            prompt = rng.choices(range(200, 2000), k=rng.randrange(200, 480))
            if known and i % 2:
                play(other, prompt)
                while other._runner.store.busy:
                    time.sleep(0.001)
            turns = [(with_store, True), (without, False)]
            rng.shuffle(turns)
            said = {mine: play(e, prompt) for e, mine in turns}
            assert said[True][1] == said[False][1]
            found.append((said[True][0], said[False][0], said[True][2][1]))
        return found

    def full(on: bool) -> None:
        client = redis.client()
        client.config_set("maxmemory-policy", "noeviction" if on else "allkeys-lru")
        client.config_set("maxmemory", 1 if on else 64 << 20)
        client.close()

    def stall() -> None:
        redis.signal(signal.SIGSTOP)
        threading.Timer(5.0, lambda: redis.signal(signal.SIGCONT)).start()

    def load() -> Callable[[], None]:
        """Others keep Redis busy."""
        stop = threading.Event()
        code = (
            "import redis,sys; c=redis.Redis(unix_socket_path=sys.argv[1]); v=b'x'*100000\n"
            "while True: c.mset({f'{i}':v for i in range(20)}); c.mget([f'{i}' for i in range(20)])"
        )
        child = subprocess.Popen([sys.executable, "-c", code, redis.socket])
        return lambda: (stop.set(), child.kill(), child.wait())[0]

    results: dict[str, Any] = {}

    def record(name: str, known: bool = False) -> None:
        found = pairs(known)
        mine, plain = sorted(a for a, _, _ in found), sorted(b for _, b, _ in found)
        at = lambda xs, q: xs[min(len(xs) - 1, int(q * len(xs)))]  # noqa: E731
        ratios = sorted(a / b for a, b, _ in found)
        results[name] = {
            "pairs": len(found), "hits": sum(1 for _, _, t in found if t),
            "p50_ratio": at(mine, 0.5) / at(plain, 0.5), "p95_ratio": at(mine, 0.95) / at(plain, 0.95),
            "median_of_ratios": at(ratios, 0.5), "p50_ms_without": 1e3 * at(plain, 0.5),
        }  # fmt: skip
        print(name, results[name], file=sys.stderr)

    record("healthy, nothing known")
    record("healthy, half known", known=True)
    stop = load()
    record("under load")
    stop()
    full(True)
    record("full")
    full(False)
    proxy.let_through(5e6)
    record("5 MB/s", known=True)
    proxy.let_through(None)
    stall()
    record("stalled for 5 s")
    time.sleep(5.0)
    redis.kill()
    record("stopped")
    redis.start()
    record("restarted, empty")
    time.sleep(5.0)
    record("healthy again, half known", known=True)
    results["counts"] = {
        k: v for k, v in ((n, getattr(with_store.stats(), n)) for n in with_store.stats().__struct_fields__)
        if k.startswith("store")
    }  # fmt: skip
    for e in (with_store, without, other):
        e.close()
    proxy.close()
    redis.__exit__()
    return results


def main(path: str) -> None:
    pump = Pump(path)
    print(pump.port, flush=True)
    for line in sys.stdin:
        pump.bytes_s = float(line) or None


if __name__ == "__main__":
    main(sys.argv[1])
