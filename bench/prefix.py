"""The prefix store: what a prefix costs from each tier, how fast it loads, what Redis's troubles cost.

    python bench/prefix.py service      # two replicas of 494 M parameters: time to first token, cold and from each tier
    python bench/prefix.py engine       # the same of engines alone, in one process
    python bench/prefix.py bandwidth    # loading blocks beside a plain `recv_into` from the same Redis
    python bench/prefix.py faults       # times to first token with the store and without, while Redis is in trouble
    python bench/prefix.py tenants      # whether one tenant's prompts show in another's times to first token
    python bench/prefix.py saves        # what writing through costs a step

`service` runs `understudy serve --replicas 2` with a device cache of one prompt, sends prompts of a 2,048-token
prefix, and sorts the answers by what the service itself said about where the prefix was; medians. `faults` runs two
engines of the bundled model in one process, one with the store and one without, in turns on the same prompts.
`tenants` sends the same prompts with two tokens, interleaved, and gives the AUC of times to first token (0.5: not told
apart; ties half).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT / "bench"))
from a_service import UNDERSTUDY, service  # noqa: E402
from prefix_faults import run_faults  # noqa: E402

PREFIX, SUFFIX = 2048, 16


def leaders(admin: str) -> list[int]:
    """Pids of the replicas that are ready."""
    said = subprocess.run(
        [UNDERSTUDY, "status", "--json", "--admin", admin], capture_output=True, text=True, check=False
    )
    if said.returncode:
        return []
    status = json.loads(said.stdout)
    ready = {r["id"] for r in status["replicas"] if "READY" in str(r["state"]).upper()}
    return [p["pid"] for p in status["processes"] if p["role"] == "shard" and p["replica"] in ready]


def first_token(client: Any, prompt: list[int]) -> tuple[float, dict[str, int]]:
    """Seconds to the first token, and prompt tokens by where they were found."""
    begun = time.perf_counter()
    with client.generate(prompt, max_tokens=1, ignore_eos=True, temperature=0.0, timeout=600.0) as stream:
        next(iter(stream))
        seconds = time.perf_counter() - begun
        cached = stream.prompt.cached_tokens
        return seconds, {"device": cached.device, "host": cached.host, "store": cached.store}


def run_service(arguments: argparse.Namespace) -> dict[str, Any]:
    from redis_server import free_port
    from serve import random_checkpoint

    from understudy.client import Client

    checkpoint = arguments.checkpoint or random_checkpoint()
    rng, times = random.Random(3), {"cold": [], "device": [], "host": [], "store": []}
    flags = ["--model", f"m={checkpoint}", "--replicas", "2", "--max-context", "2304", "--host-cache-bytes", "512MiB"]
    flags += ["--cache-bytes", "32MiB", "--heartbeat-timeout", "60"]
    admin = f"127.0.0.1:{(port := free_port())}"
    with service(*flags, admin=port) as here, Client(here.address) as client:

        def ask(prefix: list[int]) -> None:
            seconds, cached = first_token(client, [*prefix, *rng.choices(range(1000, 150_000), k=SUFFIX)])
            tier = max(cached, key=lambda t: cached[t])
            if cached[tier] == PREFIX or not any(cached.values()):
                times[tier if cached[tier] else "cold"].append(seconds)
            print(f"{seconds:8.3f} s  {cached}", file=sys.stderr)

        prefixes = [rng.choices(range(1000, 150_000), k=PREFIX) for _ in range(arguments.rounds)]
        for prefix in prefixes:
            for _ in range(3):
                ask(prefix)
        for _ in range(3):
            for prefix in prefixes:  # where the device has the last one alone
                ask(prefix)
        before = leaders(admin)
        for pid in before:  # what replicas held is gone: Redis is as it was
            os.kill(pid, signal.SIGKILL)
        while len(set(leaders(admin)) - set(before)) < 2:
            time.sleep(1.0)
        first_token(client, [5])  # the wires are up again
        for prefix in prefixes:
            ask(prefix)
    medians = {tier: statistics.median(found) for tier, found in times.items() if found}
    shares = {tier: seconds / medians["cold"] for tier, seconds in medians.items()}
    return {"seconds": times, "median": medians, "share_of_cold": shares}


def run_engine(arguments: argparse.Namespace) -> dict[str, Any]:
    """Two engines of 494 M parameters in this process, without the service around them: one writes, both read."""
    from redis_server import TestRedis
    from serve import random_checkpoint

    from workers.cache.orders import StoreConfig
    from workers.engine import EngineConfig, Request
    from workers.engine.build import build_engine

    rng, times, count = random.Random(3), {"cold": [], "device": [], "host": [], "store": []}, 0
    checkpoint = str(arguments.checkpoint or random_checkpoint())
    with TestRedis() as redis:

        def engine() -> Any:
            store = StoreConfig(host_bytes=512 << 20, url=redis.url, timeout_s=10.0)
            made = build_engine(EngineConfig(checkpoint, max_context=2304, cache_bytes=32 << 20, store=store))
            ask(made, rng.choices(range(1000, 150_000), k=300), record=False)
            return made

        def ask(engine: Any, prefix: list[int], record: bool = True) -> None:
            nonlocal count
            count += 1
            begun = time.perf_counter()
            engine.add(Request(f"r{count}", [*prefix, *rng.choices(range(1000, 150_000), k=SUFFIX)], 1))
            (output,) = [o for o in iter_steps(engine) if o.token_ids]
            seconds = time.perf_counter() - begun
            cached = {"device": output.cached_tokens, "host": output.cached_host, "store": output.cached_store}
            tier = max(cached, key=lambda t: cached[t])
            if record:
                print(f"{seconds:8.3f} s  {cached}", file=sys.stderr)
                if cached[tier] == PREFIX or not any(cached.values()):
                    times[tier if cached[tier] else "cold"].append(seconds)
            while engine._runner.store.busy:
                time.sleep(0.001)

        first = engine()
        prefixes = [rng.choices(range(1000, 150_000), k=PREFIX) for _ in range(arguments.rounds)]
        for prefix in prefixes:
            for _ in range(3):
                ask(first, prefix)
        for _ in range(2):
            for prefix in prefixes:  # the device has the last one alone
                ask(first, prefix)
        first.close()
        for _ in range(2):
            second = engine()
            for prefix in prefixes:
                ask(second, prefix)
            second.close()
    medians = {tier: statistics.median(found) for tier, found in times.items() if found}
    shares = {tier: seconds / medians["cold"] for tier, seconds in medians.items()}
    return {"seconds": times, "median": medians, "share_of_cold": shares}


def iter_steps(engine: Any) -> Iterator[Any]:
    while engine.has_work():
        yield from engine.step()


def run_bandwidth(arguments: argparse.Namespace) -> dict[str, Any]:
    """128 blocks of the 494 M shape (24 MiB), in turns."""
    import torch
    from redis_server import TestRedis

    from workers.cache.events import Tier
    from workers.cache.orders import Fetch, Load, Save, StoreConfig
    from workers.cache.store import BlockStore
    from workers.cache.values import value_name
    from workers.kernels.native import NativeOps

    blocks, result = 128, {}
    for kind in ("unix", "tcp"):
        with TestRedis(tcp=kind == "tcp") as redis:
            cache = NativeOps(torch.bfloat16, threads=os.cpu_count()).cache(24, 2 * blocks, 2, 64)
            cache.storage.random_(0, 255)
            store = BlockStore([cache], StoreConfig(url=redis.url, timeout_s=30.0))
            keys = [random.Random(i).randbytes(32) for i in range(blocks)]
            for at in range(0, blocks, 32):
                store.apply([], [Save(keys[i], (i,)) for i in range(at, at + 32)], [])
                while store.busy:
                    time.sleep(0.001)
            place = memoryview(bytearray(4 << 20))
            names = [value_name(key, 0, head) for key in keys for head in range(2)]
            size = len(names) * (64 + cache.value_bytes)
            pairs = []
            for turn in range(arguments.rounds * 4):
                fetches = [Fetch(i, keys[i], (blocks + i,)) for i in range(blocks)]
                begun = time.perf_counter()
                store.apply([], [], [Load(turn, fetches[::-1])])
                left = blocks
                while left:
                    store.wait(10.0)
                    events = store.poll()
                    assert all(e.ok for e in events)
                    left -= len(events)
                loaded = size / (time.perf_counter() - begun)
                pairs.append((loaded, size / plain_receive(redis, names, cache.value_bytes + 64, place)))
            ratios = sorted(a / b for a, b in pairs)
            result[kind] = {
                "load_GB_s": statistics.median(a for a, _ in pairs) / 1e9,
                "recv_into_GB_s": statistics.median(b for _, b in pairs) / 1e9,
                "best_load_GB_s": max(a for a, _ in pairs) / 1e9,
                "best_recv_into_GB_s": max(b for _, b in pairs) / 1e9,
                "ratio_median": statistics.median(ratios),
                "reported_GB_s": store.rate(Tier.STORE) / 1e9,
            }
            store.close()
    return result


def plain_receive(redis: Any, names: list[bytes], value: int, place: memoryview) -> float:
    """Seconds to receive the values by MGETs of about 2 MiB into one piece of memory, without looking at them."""
    family, where = (socket.AF_INET, ("127.0.0.1", redis.port)) if redis.port else (socket.AF_UNIX, redis.socket)
    with socket.socket(family) as wire:
        wire.connect(where)
        begun = time.perf_counter()
        for at in range(0, len(names), 20):
            some = names[at : at + 20]
            words = b"".join(b"$%d\r\n%s\r\n" % (len(n), n) for n in (b"MGET", *some))
            wire.sendall(b"*%d\r\n%s" % (len(some) + 1, words))
            left = len(b"*%d\r\n" % len(some)) + len(some) * (len(b"$%d\r\n" % value) + value + 2)
            while left:
                left -= wire.recv_into(place[: min(left, len(place))])
        return time.perf_counter() - begun


def auc(hits: list[float], others: list[float]) -> float:
    """The chance that a hit is sooner than another, ties half."""
    ranked = sorted([(x, 0) for x in hits] + [(x, 1) for x in others])
    wins = below = 0.0
    at = 0
    while at < len(ranked):
        end = at
        while end < len(ranked) and ranked[end][0] == ranked[at][0]:
            end += 1
        same = ranked[at:end]
        mine, theirs = sum(1 for _, k in same if k == 0), sum(1 for _, k in same if k == 1)
        wins += theirs * (below + mine / 2)
        below += mine
        at = end
    return wins / (len(hits) * len(others))


def run_tenants(arguments: argparse.Namespace) -> dict[str, Any]:
    from understudy.client import Client

    rng = random.Random(17)
    tokens = Path(tempfile.mkdtemp()) / "tokens"
    tokens.write_text("a red\nb blue\n")
    times: dict[str, list[float]] = {"others' hit": [], "no hit": [], "own hit": []}
    with service("--tokens", str(tokens)) as at, Client(at.address, token="a") as a, Client(at.address, token="b") as b:
        for _ in range(arguments.tries):
            known, fresh = (rng.choices(range(200, 2000), k=320) for _ in range(2))
            first_token(a, known)
            turns = [("others' hit", known, b), ("no hit", fresh, b), ("own hit", known, a)]
            rng.shuffle(turns)
            for name, prompt, client in turns:
                times[name].append(first_token(client, prompt)[0])
    return {
        "tries_per_class": arguments.tries,
        "auc_between_tenants": auc(times["others' hit"], times["no hit"]),
        "auc_within_a_tenant": auc(times["own hit"], times["no hit"]),
        "median_ms": {name: 1e3 * statistics.median(found) for name, found in times.items()},
    }


def run_saves(arguments: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the engine's thread to copy out what a step has filled, of the 494 M shape."""
    import torch
    from redis_server import TestRedis

    from workers.cache.orders import Save, StoreConfig
    from workers.cache.store import BlockStore
    from workers.kernels.native import NativeOps

    with TestRedis() as redis:
        cache = NativeOps(torch.bfloat16, threads=os.cpu_count()).cache(24, 64, 2, 64)
        cache.storage.random_(0, 255)
        store, result, rng = BlockStore([cache], StoreConfig(url=redis.url)), {}, random.Random(1)
        for blocks in (1, 32):
            found = []
            for _ in range(50):
                saves = [Save(rng.randbytes(32), (i,)) for i in range(blocks)]
                begun = time.thread_time()
                wall = time.perf_counter()
                store.apply([], saves, [])
                found.append((time.perf_counter() - wall, time.thread_time() - begun))
                while store.busy:
                    time.sleep(0.001)
            result[f"{blocks} blocks"] = {"ms": 1e3 * statistics.median(w for w, _ in found)}
        store.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["service", "engine", "bandwidth", "faults", "tenants", "saves"])
    parser.add_argument("--checkpoint", type=Path, help="of `service`: another one of that shape")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--tries", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="where the results go")
    arguments = parser.parse_args()
    run = {
        "service": run_service,
        "engine": run_engine,
        "bandwidth": run_bandwidth,
        "faults": run_faults,
        "tenants": run_tenants,
    }
    results = (run | {"saves": run_saves})[arguments.what](arguments)
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
