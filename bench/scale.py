"""A step load under the autoscaling of replicas (Serve's, by our policy) and of nodes (Ray's).

    python bench/scale.py                       # 1 client, 64, 1 again; writes bench/results/scale.md, .json, .svg

A Ray cluster of its own whose head has one CPU; every further node has one, and comes when something that needs a CPU
finds none: Ray's autoscaler, by `ray.cluster_utils.AutoscalingCluster`, whose nodes are processes of this machine. That
ends every other Ray of the machine when it starts: the bench refuses where there is one. While it runs, whoever reaches
this machine's address reaches that Ray. The service joins it; each of its replicas needs one CPU. Its engine computes
nothing and takes the time of `--rows` rows a second.

Every client asks for one of a few answers again and again and compares it with what it was before the load came:
nothing may be lost or differ, on the way down neither. Every half second the operators' view is written down.

    decision     when the number of wanted replicas grew
    first token  when a replica that came of it made its first token for a client
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import socket
import statistics
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from a_service import service
from chart import Panel, Series, chart
from ray_nodes import ray_with_nodes

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, PROMPT, OUT = 8, 64, 96
EVERY_S = 0.5
WARM_UP_TOKENS = 2  # what a replica makes before it is ready


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def flags(address: str, arguments: argparse.Namespace) -> list[str]:
    """Of a service on that Ray."""
    made = ["--ray-address", address, "--engine", "fake", "--fake-rows", str(arguments.rows)]
    made += ["--max-running", str(arguments.running), "--replicas", f"1:{arguments.most}", "--threads", "1"]
    made += ["--scale-down-seconds", str(arguments.down), "--heartbeat-timeout", "5", "--drain-seconds", "5"]
    return [*made, "--redis-url", "none", "--model", f"bench={ROOT / 'models' / 'demo'}"]


@dataclass
class Sample:
    """The operators' view at a moment, in seconds since the beginning."""

    at: float
    clients: int
    running: int
    waiting: int
    ready: int
    wanted: int
    nodes: int
    why: str


@dataclass
class Log:
    """What was seen. Moments by replica and life: when it was first seen, ready, and had made a token for a client."""

    samples: list[Sample] = field(default_factory=list)
    decisions: list[tuple[float, int, int, str]] = field(default_factory=list)  # when, from, to, why
    seen: dict[str, float] = field(default_factory=dict)
    ready: dict[str, float] = field(default_factory=dict)
    first_token: dict[str, float] = field(default_factory=dict)
    cold_starts: dict[str, dict[str, float]] = field(default_factory=dict)
    answers: int = 0
    different: int = 0
    errors: list[str] = field(default_factory=list)
    waits_ms: list[tuple[float, float]] = field(default_factory=list)  # when, and until a first token


class Bench:
    """Clients, and an observer, on one event loop."""

    def __init__(self, client: Any, admin: Any, nodes: Any) -> None:
        self._client, self._admin, self._nodes = client, admin, nodes
        self._began = time.monotonic()
        self._clients: list[asyncio.Task[None]] = []
        self._expected: list[tuple[int, ...]] = []
        self.log = Log()

    def now(self) -> float:
        return time.monotonic() - self._began

    async def learn(self) -> None:
        """The answers as they are without load."""
        for number in range(PROMPTS):
            self._expected.append(await self._answer(number))

    async def _answer(self, number: int) -> tuple[int, ...]:
        prompt = [3 + (number * 131 + i * 17) % 200 for i in range(PROMPT)]
        begun, first, tokens = self.now(), 0.0, []
        stream = self._client.generate(
            prompt, seed=number, temperature=1.0, max_tokens=OUT, ignore_eos=True, bypass_prefix_cache=True
        )
        async for piece in stream:
            if not tokens:
                first = self.now()
            tokens += piece.token_ids
        self.log.waits_ms.append((begun, (first - begun) * 1000))
        return tuple(tokens)

    async def _ask(self, number: int) -> None:
        while True:
            try:
                answer = await self._answer(number % PROMPTS)
            except Exception as error:  # it is counted
                self.log.errors.append(f"{self.now():.1f} s: {type(error).__name__}: {error}")
                await asyncio.sleep(0.5)
                continue
            self.log.answers += 1
            self.log.different += answer != self._expected[number % PROMPTS]
            number += 7

    async def turn_to(self, clients: int) -> None:
        """So many clients from now on. Those that leave finish nothing: their streams are cancelled."""
        while len(self._clients) < clients:
            self._clients.append(asyncio.create_task(self._ask(len(self._clients))))
        leaving, self._clients = self._clients[clients:], self._clients[:clients]
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)

    async def watch(self) -> None:
        while True:
            with suppress(Exception):
                self._note(await self._admin.status(timeout=5.0), await asyncio.to_thread(self._nodes))
            await asyncio.sleep(EVERY_S)

    def _note(self, status: Any, nodes: int) -> None:
        now, log, (model,) = self.now(), self.log, status.models
        for r in status.replicas:
            life = f"{r.id}/{r.epoch}"
            log.seen.setdefault(life, now)
            if r.state == READY:
                log.ready.setdefault(life, now)
                if r.generated_tokens > WARM_UP_TOKENS:
                    log.first_token.setdefault(life, now)
                if r.HasField("cold_start"):
                    log.cold_starts[life] = {
                        f.name: getattr(r.cold_start, f.name) for f, _ in r.cold_start.ListFields()
                    }
        before = log.samples[-1].wanted if log.samples else model.replicas_wanted
        if model.replicas_wanted != before:
            said = f"{model.scaling.reason}: {model.scaling.detail}"
            log.decisions.append((now - model.scaling.age_s, before, model.replicas_wanted, said))
        log.samples.append(
            Sample(
                round(now, 2), len(self._clients), sum(r.running for r in status.replicas),
                sum(r.waiting for r in status.replicas), model.replicas_ready, model.replicas_wanted, nodes,
                model.scaling.reason,
            )
        )  # fmt: skip


READY = 2  # REPLICA_STATE_READY


async def measure(address: str, admin: str, arguments: argparse.Namespace) -> Log:
    import ray

    from understudy import AsyncClient

    def nodes() -> int:
        return sum(bool(n["Alive"]) for n in ray.nodes())

    async with AsyncClient(address) as client, AsyncClient(admin) as operators:
        bench = Bench(client, operators, nodes)
        await bench.learn()
        watching = asyncio.create_task(bench.watch())
        for clients, seconds in ((1, arguments.before), (arguments.clients, arguments.load), (1, arguments.after)):
            print(f"{bench.now():6.1f} s: {clients} clients", file=sys.stderr)
            await bench.turn_to(clients)
            await asyncio.sleep(seconds)
        await bench.turn_to(0)
        watching.cancel()
        return bench.log


def waits(log: Log) -> list[dict[str, float]]:
    """Of each replica that came after a decision for more: seconds from there to its being there, ready, making."""
    ups = [d for d in log.decisions if d[2] > d[1]]
    rows = []
    for life, ready in sorted(log.ready.items(), key=lambda item: item[1]):
        made = [d for d in ups if d[0] <= log.seen[life] + EVERY_S]
        if not made or log.seen[life] < ups[0][0]:
            continue
        decision = made[-1][0]
        row = {"seen": log.seen[life] - decision, "ready": ready - decision}
        if life in log.first_token:
            row["first_token"] = log.first_token[life] - decision
        rows.append({k: round(v, 2) for k, v in row.items()})
    return rows


def summary(log: Log, arguments: argparse.Namespace) -> dict[str, Any]:
    load_from, load_to = arguments.before, arguments.before + arguments.load

    def median(start: float, stop: float) -> float:
        inside = [w for t, w in log.waits_ms if start <= t < stop]
        return round(statistics.median(inside), 1) if inside else 0.0

    first = [r["first_token"] for r in waits(log) if "first_token" in r]
    return {
        "answers": log.answers,
        "different": log.different,
        "errors": len(log.errors),
        "most_ready": max(s.ready for s in log.samples),
        "most_nodes": max(s.nodes for s in log.samples),
        "ready_at_the_end": log.samples[-1].ready,
        "nodes_at_the_end": log.samples[-1].nodes,
        "decisions": [(round(t, 1), a, b, why) for t, a, b, why in log.decisions],
        "replicas_after_a_decision_s": waits(log),
        "decision_to_first_token_s": {"median": statistics.median(first), "max": max(first)} if first else {},
        "first_token_ms": {
            "before": median(0, load_from),
            "first half of the load": median(load_from, (load_from + load_to) / 2),
            "second half of the load": median((load_from + load_to) / 2, load_to),
            "after": median(load_to, load_to + arguments.after),
        },
    }


def picture(log: Log, arguments: argparse.Namespace) -> str:
    """Load above, replicas and nodes below, over time."""

    def of(name: str) -> list[tuple[float, float]]:
        return [(s.at, float(getattr(s, name))) for s in log.samples]

    highest = max(max(s.nodes, s.wanted, s.ready) for s in log.samples) + 1
    load = [
        Series("clients", "#444", of("clients"), "5 3"),
        Series("sequences running", "#1b7", of("running")),
        Series("waiting", "#c42", of("waiting")),
    ]
    counts = [
        Series("replicas wanted", "#c42", of("wanted"), "5 3"),
        Series("replicas ready", "#1b7", of("ready")),
        Series("nodes", "#36c", of("nodes"), "2 3"),
    ]
    return chart([Panel(arguments.clients, load), Panel(highest, counts)], log.samples[-1].at)


def table(result: dict[str, Any], arguments: argparse.Namespace, machine: str) -> str:
    first = result["first_token_ms"]
    lines = [
        "# A step load, with replicas and nodes that come and go",
        "",
        f"On {machine}. 1 client for {arguments.before:g} s, {arguments.clients} for {arguments.load:g} s, 1 again for "
        f"{arguments.after:g} s; {PROMPT} tokens in, {OUT} out. Engines that compute nothing and take the time of "
        f"{arguments.rows:g} rows a second; {arguments.running} sequences at once at each replica: `bench/scale.py`.",
        "",
        "![replicas over time beside the load](scale.svg)",
        "",
        "| | |",
        "|---|---|",
        f"| answers, of which differ, errors | {result['answers']:,}, {result['different']}, {result['errors']} |",
        f"| replicas ready at most, at the end | {result['most_ready']}, {result['ready_at_the_end']} |",
        f"| nodes at most, at the end | {result['most_nodes']}, {result['nodes_at_the_end']} |",
    ]
    if result["decision_to_first_token_s"]:
        d = result["decision_to_first_token_s"]
        lines.append(
            f"| from a decision to a new replica's first token, s | median {d['median']:.1f}, max {d['max']:.1f} |"
        )
    lines += [f"| median ms to a first token, {k} | {v:,.0f} |" for k, v in first.items()]
    lines += ["", "Decisions:", "", "| s | from | to | why |", "|---:|---:|---:|---|"]
    lines += [f"| {t:.1f} | {a} | {b} | {why} |" for t, a, b, why in result["decisions"]]
    lines += [
        "",
        "Each replica that came, seconds after the decision:",
        "",
        "| seen | ready | first token |",
        "|---:|---:|---:|",
    ]
    for row in result["replicas_after_a_decision_s"]:
        lines.append(f"| {row['seen']:.1f} | {row['ready']:.1f} | {row.get('first_token', float('nan')):.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--most", type=int, default=6, help="replicas at most")
    parser.add_argument("--running", type=int, default=16, help="sequences that a replica runs at once")
    parser.add_argument("--rows", type=float, default=400, help="rows a second of its engine")
    parser.add_argument("--before", type=float, default=20)
    parser.add_argument("--load", type=float, default=120)
    parser.add_argument("--after", type=float, default=150)
    parser.add_argument("--down", type=float, default=20, help="--scale-down-seconds")
    parser.add_argument("--idle-node-minutes", type=float, default=0.25)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service is taken down, too
    with ray_with_nodes(arguments.most, arguments.idle_node_minutes) as address:
        import ray

        ray.init(address=address, configure_logging=False, log_to_driver=False)
        try:
            admin = free_port()
            with service(*flags(address, arguments), admin=admin) as (clients_at, _):
                log = asyncio.run(measure(clients_at, f"127.0.0.1:{admin}", arguments))
        finally:
            ray.shutdown()
    result = summary(log, arguments)
    machine = f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), load {os.getloadavg()[0]:.1f}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(result, arguments, machine)
    print(text)
    for error in log.errors[:5]:
        print(error, file=sys.stderr)
    (arguments.out / "scale.md").write_text(text)
    (arguments.out / "scale.svg").write_text(picture(log, arguments))
    record = {"machine": machine, "arguments": {k: str(v) for k, v in vars(arguments).items() if k != "out"}}
    record["results"] = result
    record |= {"samples": [list(asdict(s).values()) for s in log.samples], "errors": log.errors[:20]}
    record["cold_starts"] = log.cold_starts
    (arguments.out / "scale.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
