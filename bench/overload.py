"""What a service does that is asked for ten times what it can.

    python bench/overload.py                    # writes bench/results/overload.md, .json

One replica whose engine computes nothing and takes the time of `--rows` rows a second, behind everything else that a
service has. First its capacity: more and more clients that each ask again at once; the best counts. Then ten times as
many requests a second as it answered then, at random moments, whoever waits: a tenth of them urgent (priority 1), six
tenths normal (0), three tenths low (-1). Those that are refused do not come back.

    goodput       output tokens a second of answers that came whole
    first token   from a request to its first token, of those that were taken: it bounds the time in the queue
    refused       with RESOURCE_EXHAUSTED and RetryInfo; how long until the refusal was there
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a_service import service

ROOT = Path(__file__).resolve().parent.parent
PROMPT, OUT = 32, 32
CLASSES = {1: ("urgent", 0.1), 0: ("normal", 0.6), -1: ("low", 0.3)}


def flags(arguments: argparse.Namespace) -> list[str]:
    """Of the service."""
    made = ["--engine", "fake", "--fake-rows", str(arguments.rows), "--max-running", str(arguments.running)]
    made += ["--max-queue", str(arguments.queue), "--redis-url", "none"]
    return [*made, "--model", f"bench={ROOT / 'models' / 'demo'}"]


@dataclass
class Seen:
    """What became of the requests of one class. Seconds."""

    whole: int = 0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    retry_after: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def offered(self) -> int:
        return self.whole + len(self.refused) + self.failed.total()


async def ask(client: Any, seen: Seen, priority: int, seed: int) -> None:
    """One request, to its end or refusal."""
    from understudy.errors import Overloaded

    dice, begun, first, tokens = random.Random(seed), time.perf_counter(), 0.0, 0
    prompt = [dice.randrange(3, 200) for _ in range(PROMPT)]
    try:
        stream = client.generate(
            prompt, priority=priority, max_tokens=OUT, ignore_eos=True, bypass_prefix_cache=True, seed=seed
        )
        async for piece in stream:
            first = first or time.perf_counter()
            tokens += len(piece.token_ids)
    except Overloaded as error:
        seen.refused.append(time.perf_counter() - begun)
        seen.retry_after.append(error.retry_after_s)
    except Exception as error:  # it is counted
        seen.failed[type(error).__name__] += 1
    else:
        seen.first.append(first - begun)
        seen.whole += tokens == OUT
        seen.tokens += tokens


async def capacity(client: Any, clients: int, seconds: float) -> float:
    """Tokens a second of so many clients that ask again at once; the first fifth of the time does not count."""
    seen, ended = Seen(), asyncio.Event()

    async def again(number: int) -> None:
        while not ended.is_set():
            await ask(client, seen, 0, number)
            number += clients

    tasks = [asyncio.create_task(again(i)) for i in range(clients)]
    await asyncio.sleep(seconds / 5)
    before, begun = seen.tokens, time.perf_counter()
    await asyncio.sleep(4 * seconds / 5)
    rate = (seen.tokens - before) / (time.perf_counter() - begun)
    ended.set()
    await asyncio.gather(*tasks)
    return rate


async def overload(client: Any, per_second: float, seconds: float) -> tuple[dict[int, Seen], float]:
    """Requests at random moments, `per_second` on average; what became of them by priority, and tokens a second from
    the end of the first fifth of the time to its end."""
    dice, seen = random.Random(1), {priority: Seen() for priority in CLASSES}
    weights = [share for _, share in CLASSES.values()]
    tasks: set[asyncio.Task[None]] = set()
    begun, due, marks = time.perf_counter(), 0.0, []
    for at in (seconds / 5, seconds):
        while (due := due + dice.expovariate(per_second)) < at:
            await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
            priority = dice.choices(list(CLASSES), weights)[0]
            task = asyncio.create_task(ask(client, seen[priority], priority, dice.randrange(1 << 30)))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        marks.append((time.perf_counter(), sum(s.tokens for s in seen.values())))
    await asyncio.gather(*tasks)
    (start, before), (stop, after) = marks
    return seen, (after - before) / (stop - start)


async def run(address: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from understudy import AsyncClient

    async with AsyncClient(address) as client:
        capacities = {}
        for clients in arguments.clients:
            capacities[clients] = round(await capacity(client, clients, arguments.seconds / 2), 1)
            print(f"{clients:4d} clients: {capacities[clients]:,.0f} tokens/s", file=sys.stderr)
        best = max(capacities.values())
        offered = arguments.times * best / OUT
        seen, goodput = await overload(client, offered, arguments.seconds)
    return {
        "capacity": capacities,
        "best": best,
        "offered_per_s": round(offered, 1),
        "goodput": round(goodput, 1),
        "share": round(goodput / best, 3),
        "classes": {CLASSES[p][0]: summary(s) for p, s in seen.items()},
    }


def summary(seen: Seen) -> dict[str, Any]:
    return {
        "offered": seen.offered,
        "whole": seen.whole,
        "refused": len(seen.refused),
        "with_retry_info": sum(r > 0 for r in seen.retry_after),
        "failed": dict(seen.failed),
        "first_token_ms": quantiles(seen.first),
        "refused_after_ms": quantiles(seen.refused),
        "come_back_s": {k: v / 1000 for k, v in quantiles(seen.retry_after).items()},
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {name: round(1000 * ordered[min(int(q * len(ordered)), len(ordered) - 1)], 1) for name, q in at.items()}


def table(result: dict[str, Any], arguments: argparse.Namespace, machine: str) -> str:
    places = arguments.running + arguments.queue
    lines = [
        f"# {arguments.times:g} times what it can",
        "",
        f"On {machine}. {PROMPT} tokens in, {OUT} out; an engine that computes nothing and takes the time of "
        f"{arguments.rows:g} rows a second, {arguments.running} sequences at once, {arguments.queue} that may wait. "
        "See `bench/overload.py`.",
        "",
        f"Capacity: {', '.join(f'{v:,.0f} tokens/s with {k} clients' for k, v in result['capacity'].items())}. "
        f"Offered then: {result['offered_per_s']:,.0f} requests/s. **Goodput {result['goodput']:,.0f} tokens/s, "
        f"{result['share']:.1%} of the best.**",
        "",
        "| class | offered | answered whole | refused | of which with RetryInfo | other ends "
        "| first token, ms: p50, p99, max | refused after, ms: p50, p99, max | come back in, s: p50, max |",
        "|---|---:|---:|---:|---:|---|---|---|---|",
    ]

    def three(values: dict[str, float]) -> str:
        return ", ".join(f"{values[k]:,.0f}" for k in ("p50", "p99", "max")) if values else "-"

    for name, c in result["classes"].items():
        back = ", ".join(f"{c['come_back_s'][k]:.1f}" for k in ("p50", "max")) if c["come_back_s"] else "-"
        ends = ", ".join(f"{n} {k}" for k, n in c["failed"].items()) or "-"
        lines.append(
            f"| {name} | {c['offered']:,} | {c['whole']:,} | {c['refused']:,} | {c['with_retry_info']:,} | {ends} "
            f"| {three(c['first_token_ms'])} | {three(c['refused_after_ms'])} "
            f"| {back} |"
        )
    bound = places * OUT / result["best"]
    lines += [
        "",
        f"{places} sequences at most are taken at a time: at {result['best']:,.0f} tokens/s their answers take "
        f"{bound:.1f} s, which is about what an urgent or normal one waits. Of eight that are admitted one is whoever "
        "has waited longest, so that a low one does not wait for as long as higher ones keep coming.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1000, help="rows a second of the engine")
    parser.add_argument("--running", type=int, default=16, help="sequences that run at once")
    parser.add_argument("--queue", type=int, default=32, help="--max-queue")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--times", type=float, default=10, help="times the capacity that is offered")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    with service(*flags(arguments)) as (address, _):
        result = asyncio.run(run(address, arguments))
    machine = f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), load {os.getloadavg()[0]:.1f}"
    text = table(result, arguments, machine)
    print(text)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "overload.md").write_text(text)
    record = {"machine": machine, "arguments": {k: str(v) for k, v in vars(arguments).items() if k != "out"}}
    record["results"] = result
    (arguments.out / "overload.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
