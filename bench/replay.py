"""Mooncake's traces through the real index and policy, against simulated replicas; and the index at its largest.

python bench/replay.py run --trace DIR/conversation_trace.jsonl --replicas 16 64 --write FILE.json
python bench/replay.py index --write FILE.json
python bench/replay.py report FILE.json... --write bench/results/replay

A run needs Mooncake's traces (docs/benchmarks.md says where they come from). A load of 0.7 means: so many requests that
replicas taken in turn, which know nothing of prefixes, are busy 70 % of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from router.port import Query
from router.simulate import MODEL, STRATEGIES, Machine, simulate
from router.state import Router
from router.traces import Arrival, Trace, hits_without_bounds, mix
from workers.cache.events import Changes
from workers.engine import EngineInfo, EngineStats

LEAST = 200  # requests per replica


def run(
    trace: Trace, replicas: int, loads: Sequence[float], machine: Machine, names: set[str]
) -> Iterable[dict[str, Any]]:
    """One row for each load and strategy."""
    requests = LEAST * replicas
    tiles = -(-requests // len(trace.at))
    cold = tiles * float(trace.prompt_tokens.sum()) / (machine.prefill_rate * replicas)
    busy = float(simulate(trace.tiled(requests, cold / 0.7), replicas, "round robin", machine).busy.mean())
    for load in loads:
        arrivals = trace.tiled(requests, busy / load)
        for strategy in STRATEGIES:
            if names and strategy not in names:
                continue
            began = time.process_time()
            row = one(arrivals, replicas, strategy, machine)
            yield row | {"load": load, "seconds": round(time.process_time() - began, 1)}


def one(arrivals: list[Arrival], replicas: int, strategy: str, machine: Machine) -> dict[str, Any]:
    outcome = simulate(arrivals, replicas, strategy, machine)
    waits = outcome.first_token
    return {
        "replicas": replicas,
        "strategy": strategy,
        "requests": len(arrivals),
        "hit_rate": outcome.hit_rate,
        "hits": {tier: tokens / outcome.tokens for tier, tokens in outcome.hits.items()},
        "mean_s": float(waits.mean()),
        "p50_s": float(np.percentile(waits, 50)),
        "p99_s": float(np.percentile(waits, 99)),
        "imbalance": outcome.imbalance,
        "busy": float(outcome.busy.mean()) / arrivals[-1].at,
        "decisions": {str(reason): count for reason, count in outcome.decisions.items()},
    }


# The index at its largest.


class _Clock:
    time = 0.0

    def now(self) -> float:
        return self.time


def index(replicas: int = 1000, blocks: int = 10_000_000, prompt: int = 256, shared: int = 32) -> dict[str, Any]:
    """Memory and decisions per second of a router that knows `blocks` blocks of `replicas` replicas.

    Each replica holds prompts of `prompt` blocks, whose first `shared` are one of 64 system prompts; the requests ask
    for a prompt that is held somewhere, for one that begins like it, or for a new one, in turns. Times are of one core.
    """
    clock, before = _Clock(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    router = Router(clock, heartbeat_timeout=1e9)
    info = EngineInfo(MODEL, "f", "n", "", "", 1 << 20, 1, 16, 1, 1, 64, 512)
    each = blocks // replicas // (prompt - shared)
    began, told, held = time.process_time(), 0, []
    for slot in range(replicas):
        router.register(str(slot), "", 1, info)
        for i in range(each):
            number = slot * each + i
            names = _prompt(number, number % 64, prompt, shared)
            held.append(number)
            changes = Changes(i * prompt, False, bytes([1]) * prompt, names)
            router.beat(str(slot), 1, EngineStats(prefill_rows=1 + i, prefill_seconds=1e-4 * (1 + i)), changes)
            told += prompt
    filling = time.process_time() - began
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    stats = router.figures().index
    rng = np.random.default_rng(0)
    queries = []
    for turn in range(3000):
        number = int(rng.integers(len(held)))
        tail = number if turn % 3 == 0 else (1 << 40) + turn
        start = number % 64 if turn % 3 < 2 else (1 << 20) + turn
        queries.append(Query(MODEL, prompt * 16, keys=_prompt(tail, start, prompt, shared)))
    took = []
    for query in queries:
        clock.time += 0.001
        began = time.process_time()
        lease = router.assign(query).lease
        took.append(time.process_time() - began)
        router.release([lease])
    began = time.process_time()
    router.unregister("0", 1)
    vanish = time.process_time() - began
    return {
        "replicas": replicas,
        "blocks": stats.blocks,
        "table_bytes_per_block": stats.nbytes / stats.blocks,
        "process_bytes_per_block": memory * 1024 / stats.blocks,
        "changes_per_second": told / filling,
        "decisions_per_second": len(took) / sum(took),
        "decision_us_p50": 1e6 * statistics.median(took),
        "decision_us_p99": 1e6 * float(np.percentile(took, 99)),
        "vanish_ms": 1e3 * vanish,
        "holder_sets": stats.sets,
        "decisions": {r: c for r, c in router.figures().decisions.items() if c},
    }


def _prompt(tail: int, start: int, prompt: int, shared: int) -> bytes:
    """Names of a prompt's blocks: `shared` of system prompt `start`, the rest its own."""
    first = (np.uint64(1) << np.uint64(63)) + np.uint64(start * shared) + np.arange(shared, dtype=np.uint64)
    rest = np.uint64(tail * prompt) + np.arange(prompt - shared, dtype=np.uint64)
    return mix(np.concatenate([first, rest])).tobytes()


# What is written.


def report(files: Sequence[Path]) -> tuple[dict[str, Any], str]:
    """All of them together, as data and as a page."""
    parts = [json.loads(file.read_text()) for file in files]
    runs: dict[str, dict[tuple[int, float, str], dict[str, Any]]] = {}
    bounds: dict[str, list[int]] = {}
    for part in parts:
        for row in part.get("rows", ()):
            runs.setdefault(part["trace"], {})[row["replicas"], row["load"], row["strategy"]] = row
        if "without_bounds" in part:
            bounds[part["trace"]] = part["without_bounds"]
    for rows in runs.values():  # a way to choose means something beside the others only
        for replicas, load in {key[:2] for key in rows}:
            group = [(replicas, load, name) for name in STRATEGIES]
            if not all(key in rows for key in group):
                for key in group:
                    rows.pop(key, None)
    sizes = next((part["index"] for part in parts if "index" in part), None)
    machine = next(part["machine"] for part in parts if "machine" in part)
    data = {
        "host": next(part["host"] for part in parts),
        "machine": machine,
        "without_bounds": bounds,
        "rows": {trace: list(rows.values()) for trace, rows in runs.items()},
        "index": sizes,
    }
    lines = [_HEAD.format(**machine, least=LEAST, host=data["host"])]
    for trace, (hits, blocks) in sorted(bounds.items()):
        lines.append(f"| {trace} | {hits:,} | {blocks:,} | {hits / blocks:.2%} |")
    for trace in sorted(runs):
        lines += ["", f"## {trace}", "", _COLUMNS]
        for (replicas, load, name), row in sorted(runs[trace].items(), key=_place):
            hits = " + ".join(f"{share:.1%}" for share in row["hits"].values())
            lines.append(
                f"| {replicas:,} | {load:.0%} | {name}{row.get('note', '')} | {hits} "
                f"| {row['mean_s']:.3f} | {row['p50_s']:.3f} | {row['p99_s']:.2f} "
                f"| {row['imbalance']:.2f} | {row['busy']:.0%} |"
            )
    if sizes is not None:
        lines += ["", _INDEX.format(**sizes)]
    return data, "\n".join(lines) + "\n"


def _place(item: tuple[tuple[int, float, str], Any]) -> tuple[int, float, int]:
    (replicas, load, name), _ = item
    return replicas, load, STRATEGIES.index(name)


_HEAD = """# Traces replayed through the router

`bench/replay.py` sends Mooncake's conversation and synthetic traces through the real index and policy
(`router/index.py`, `router/policy.py`, `router/state.py`) to simulated replicas (`router/simulate.py`), which report
every half second, as in a cluster. Run on {host}.

A simulated replica: {prefill_rate:,.0f} prompt tokens per second, slowed by one row of {rows} for each sequence that
decodes; {token_s} s per token of an answer; {places} sequences at once; a device cache of {device_blocks} blocks of
{block_tokens} tokens, a host tier of {host_blocks} at {host_rate:,.0f} tokens/s, and a store shared by all, of
{store_blocks} blocks per replica, at {store_rate:,.0f} tokens/s. Each tier gives up first what was unused longest; all
blocks are written to the store.

Each trace is tiled, with fresh block names in each copy, until every replica sees at least {least} requests. A load of
70 % is the rate at which replicas taken in turn are busy 70 % of the time (found by a run at another rate, so that the
figure below may differ a little).

`expected time` is this project's router. The others know without delay what they go by. `least of two`: of two drawn
at random the one that will be free sooner. `prefix affinity`: the replica that last got most of the prompt and has it
still, where that is over half of the prompt; else the least of two.

Hits are shares of all prompt tokens, on device + host + store. Times are to the first token. `imbalance` is the busiest
replica's time over the mean, `busy` the mean share of the time. Sizes and loads that are not listed were not run yet.

## Without bounds

Nothing is ever given up, and what any replica has counts: what the index finds of each trace.

| trace | blocks found | of | share |
|---|---:|---:|---:|"""

_COLUMNS = """| replicas | load | strategy | hits | mean, s | p50, s | p99, s | imbalance | busy |
|---:|---:|---|---:|---:|---:|---:|---:|---:|"""

_INDEX = """## The index at its largest

{blocks:,} blocks on {replicas:,} replicas, prompts of 256 blocks of which the first 32 are one of 64 system prompts.
Times are of one core, which others used as well.

| | |
|---|---:|
| table, bytes per block | {table_bytes_per_block:.1f} |
| whole process at its peak, bytes per block | {process_bytes_per_block:.1f} |
| changes taken in, per second | {changes_per_second:,.0f} |
| decisions per second (256 keys, all {replicas:,} replicas considered) | {decisions_per_second:,.0f} |
| a decision, p50 and p99, µs | {decision_us_p50:.0f}, {decision_us_p99:.0f} |
| a replica vanishes, ms | {vanish_ms:.0f} |"""


def host() -> str:
    """The machine, in words."""
    cpu = next((x.split(":")[1].strip() for x in _lines("/proc/cpuinfo") if x.startswith("model name")), "")
    return f"{len(os.sched_getaffinity(0))} cores of {cpu or platform.processor()}, Python {platform.python_version()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    replay = commands.add_parser("run")
    replay.add_argument("--trace", type=Path, required=True)
    replay.add_argument("--replicas", type=int, nargs="+", default=[4, 16, 64, 1000])
    replay.add_argument("--loads", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    replay.add_argument("--strategies", nargs="+", default=[], choices=STRATEGIES)
    for name, value in asdict(Machine()).items():
        replay.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    largest = commands.add_parser("index")
    largest.add_argument("--blocks", type=int, default=10_000_000)
    largest.add_argument("--replicas", type=int, default=1000)
    pages = commands.add_parser("report")
    pages.add_argument("files", type=Path, nargs="+")
    for command in (replay, largest, pages):
        command.add_argument("--write", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "report":
        data, page = report(given.files)
        given.write.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        given.write.with_suffix(".md").write_text(page)
        return
    if given.command == "index":
        sizes = index(given.replicas, given.blocks)
        given.write.write_text(json.dumps({"host": host(), "index": sizes}, indent=1))
        print(json.dumps(sizes, indent=1))
        return
    machine = replace(Machine(), **{name: getattr(given, name) for name in asdict(Machine())})
    trace, rows = Trace.read(given.trace), []
    whole = {"host": host(), "machine": asdict(machine), "trace": given.trace.stem.removesuffix("_trace")}
    whole["without_bounds"] = hits_without_bounds(trace, 16)
    for replicas in given.replicas:
        for row in run(trace, replicas, given.loads, machine, set(given.strategies)):
            rows.append(row)
            print(json.dumps(row), flush=True)
            given.write.write_text(json.dumps(whole | {"rows": rows}))


if __name__ == "__main__":
    main()
