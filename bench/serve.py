"""The whole service beside its own engine, on the same work in one run.

    python bench/serve.py                          # the bundled model
    python bench/serve.py --checkpoint DIR         # another; `random-0.5b` makes one of 494 M parameters
    python bench/serve.py --fake                   # an engine that computes nothing: what one gateway carries

Three programs: the service (`understudy serve`), the engine by itself in a process of its own, the clients in another.
Each round measures the engine with the idle service up, then the service with the idle engine up; the best round of
each counts. The work: 1, 16 or 64 streams at once, 32 random tokens in, 128 out, nothing ends early, nothing cached.

    rate      output tokens per second from the first request to the last token, prefill included
    adjusted  the same, with the time taken off that the clients' process used of this machine's cores
    ttft      median milliseconds from a request to its first token
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from a_service import service

ROOT = Path(__file__).resolve().parent.parent
PROMPT, OUT = 32, 128


@dataclass
class Measured:
    """One round: tokens per second, median milliseconds to the first token, CPU seconds by process."""

    streams: int
    tokens: int
    seconds: float
    ttft_ms: float
    cpu: dict[str, float]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def adjusted(self) -> float:
        free = self.seconds - self.cpu.get("clients", 0.0) / (os.cpu_count() or 1)
        return self.tokens / free


def prompts(streams: int, vocabulary: int, seed: int) -> list[list[int]]:
    dice = random.Random(seed)
    return [[dice.randrange(3, vocabulary) for _ in range(PROMPT)] for _ in range(streams)]


# The engine by itself: a child that reads {"streams", "seed"} per line and answers with what it measured.


def engine_child(checkpoint: str, threads: int | None, fake: bool) -> None:
    from workers.engine import EngineConfig
    from workers.engine.fake import FakeEngine
    from workers.engine.loop import EngineLoop

    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    engine: Any
    if fake:
        engine = FakeEngine()
    else:
        from workers.engine.build import build_engine

        engine = build_engine(EngineConfig(checkpoint, threads=threads))
    with EngineLoop(engine) as loop:
        engine_round(loop, 2, 0)
        print(json.dumps({"vocab_size": loop.info.vocab_size, "numerics_id": loop.info.numerics_id}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(engine_round(loop, asked["streams"], asked["seed"])), flush=True)


def engine_round(loop: Any, streams: int, seed: int) -> dict[str, Any]:
    from workers.engine import Request, Sampling

    begun: dict[str, float] = {}
    first: dict[str, float] = {}
    made, ended, done = 0, 0, threading.Event()

    def sink(output: Any) -> None:
        nonlocal made, ended
        now = time.perf_counter()
        for sequence in output.outputs:
            made += len(sequence.token_ids)
            first.setdefault(sequence.id, now)
            ended += sequence.finish is not None
        if ended == streams:
            done.set()

    before, start = time.process_time(), time.perf_counter()
    with loop.attach(sink) as session:
        for number, prompt in enumerate(prompts(streams, loop.info.vocab_size, seed)):
            begun[str(number)] = time.perf_counter()
            session.submit(Request(str(number), prompt, OUT, Sampling(0.0), bypass_prefix_cache=True))
        done.wait()
    seconds = time.perf_counter() - start
    ttft = statistics.median(first[i] - begun[i] for i in begun) * 1000
    return asdict(Measured(streams, made, seconds, ttft, {"engine": time.process_time() - before}))


# The clients: the same protocol.


def clients_child(address: str, model: str) -> None:
    asyncio.run(_clients(address, model))


async def _clients(address: str, model: str) -> None:
    from understudy import AsyncClient

    async with AsyncClient(address) as client:
        served = next(m for m in await client.models() if m.name == model)
        await _client_round(client, model, served.vocab_size, 2, 0)
        print(json.dumps({"vocab_size": served.vocab_size, "numerics_id": served.numerics_id}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            measured = await _client_round(client, model, served.vocab_size, asked["streams"], asked["seed"])
            print(json.dumps(measured), flush=True)


async def _client_round(client: Any, model: str, vocabulary: int, streams: int, seed: int) -> dict[str, Any]:
    async def one(prompt: list[int]) -> tuple[int, float]:
        begun, first, made = time.perf_counter(), 0.0, 0
        stream = client.generate(
            prompt, model=model, temperature=0.0, max_tokens=OUT, ignore_eos=True, bypass_prefix_cache=True
        )
        async for piece in stream:
            first = first or time.perf_counter()
            made += len(piece.token_ids)
        return made, first - begun

    before, start = time.process_time(), time.perf_counter()
    told = await asyncio.gather(*(one(p) for p in prompts(streams, vocabulary, seed)))
    seconds = time.perf_counter() - start
    ttft = statistics.median(t for _, t in told) * 1000
    cpu = {"clients": time.process_time() - before}
    return asdict(Measured(streams, sum(m for m, _ in told), seconds, ttft, cpu))


class Child:
    """A program that answers one line of JSON for each it reads."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hello = self._answer()

    def ask(self, **what: int) -> Measured:
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return Measured(**self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a child ended: {self.process.args}")
        told: dict[str, Any] = json.loads(line)
        return told

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def cpu_by_role(pid: int) -> dict[str, float]:
    """CPU seconds so far of everything that the service has started."""
    used: dict[str, float] = {}
    for process in psutil.Process(pid).children(recursive=True):
        title = " ".join(process.cmdline()[:1])
        role = next((r for key, r in _ROLES.items() if key in title), "ray and serve")
        times = process.cpu_times()
        used[role] = used.get(role, 0.0) + times.user + times.system
    return used


_ROLES = {
    "ray::Leader": "leader",
    ":gateway": "gateway",
    ":replica-": "supervisor",
    "ray::DirectoryActor": "router",
}


def run(arguments: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    flags = ["--model", f"bench={checkpoint}"] + (["--engine", "fake"] if arguments.fake else [])
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    results: dict[str, Any] = {}
    with service(*flags, *threads) as (address, pid):
        engine = Child("--child", "engine", "--checkpoint", str(checkpoint), *threads, *(["--fake"] * arguments.fake))
        clients = Child("--child", "clients", "--address", address)
        if not arguments.fake and engine.hello["numerics_id"] != clients.hello["numerics_id"]:
            raise SystemExit(
                "the engine by itself and the service's compute differently; the kernels changed meanwhile"
            )
        for streams in arguments.streams:
            alone: list[Measured] = []
            served: list[Measured] = []
            for number in range(arguments.rounds):
                alone.append(engine.ask(streams=streams, seed=number))
                before = cpu_by_role(pid)
                measured = clients.ask(streams=streams, seed=number)
                after = cpu_by_role(pid)
                measured.cpu |= {r: round(after[r] - before.get(r, 0.0), 3) for r in sorted(after)}
                served.append(measured)
            results[str(streams)] = summary(alone, served)
            print(f"{streams:3d} streams: {json.dumps(results[str(streams)])}", file=sys.stderr)
        engine.close()
        clients.close()
    return results


def summary(alone: list[Measured], served: list[Measured]) -> dict[str, Any]:
    """The best round of each; CPU seconds are those of the service's best round."""
    engine, best = max(m.rate for m in alone), max(served, key=lambda m: m.rate)
    ttft_alone, ttft = min(m.ttft_ms for m in alone), min(m.ttft_ms for m in served)
    return {
        "engine": round(engine, 1),
        "service": round(best.rate, 1),
        "ratio": round(best.rate / engine, 3),
        "adjusted": round(best.adjusted, 1),
        "adjusted_ratio": round(best.adjusted / engine, 3),
        "ttft_engine_ms": round(ttft_alone, 2),
        "ttft_service_ms": round(ttft, 2),
        "ttft_above_ms": round(ttft - ttft_alone, 2),
        "seconds": round(best.seconds, 3),
        "cpu_s": {k: round(v, 3) for k, v in best.cpu.items()},
    }


def table(results: dict[str, Any], what: str, machine: str) -> str:
    lines = [
        f"# Service beside engine: {what}",
        "",
        f"On {machine}. {PROMPT} tokens in, {OUT} out; see `bench/serve.py` for what the columns mean.",
        "",
        "| streams | engine, tok/s | service, tok/s | ratio | without clients' CPU | engine's ttft, ms | above, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for streams, r in results.items():
        lines.append(
            f"| {streams} | {r['engine']:,.0f} | {r['service']:,.0f} | {r['ratio']:.3f} | {r['adjusted_ratio']:.3f} "
            f"| {r['ttft_engine_ms']:.1f} | {r['ttft_above_ms']:.1f} |"
        )
    lines += ["", "CPU seconds per second of the service's best round, by process:", ""]
    for streams, r in results.items():
        shares = ", ".join(f"{k} {v / r['seconds']:.2f}" for k, v in r["cpu_s"].items())
        lines.append(f"- {streams} streams: {shares}")
    return "\n".join(lines) + "\n"


def random_checkpoint() -> Path:
    """Qwen2.5-0.5B's shape with random weights, as `bench/engine.py` makes it, and a tokenizer that speaks bytes."""
    sys.path.insert(0, str(ROOT / "bench"))
    from engine import make_checkpoint  # type: ignore[import-not-found]  # the neighbour in this folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "understudy" / "bench"
    path = cache / "qwen2.5-0.5b-random"
    path.parent.mkdir(parents=True, exist_ok=True)
    make_checkpoint(path)
    if not (path / "tokenizer.json").is_file():
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        words = alphabet + [f"token{i}" for i in range(151_936 - len(alphabet))]
        tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(path / "tokenizer.json"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=str(ROOT / "models" / "demo"))
    parser.add_argument("--fake", action="store_true", help="an engine that computes nothing")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--child", choices=("engine", "clients"), help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child == "engine":
        engine_child(arguments.checkpoint, arguments.threads, arguments.fake)
    elif arguments.child == "clients":
        clients_child(arguments.address, "bench")
    else:
        checkpoint = random_checkpoint() if arguments.checkpoint == "random-0.5b" else Path(arguments.checkpoint)
        results = run(arguments, checkpoint)
        what = "fake engine" if arguments.fake else checkpoint.name
        machine = (
            f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), load {os.getloadavg()[0]:.1f}"
        )
        text = table(results, what, machine)
        print(text)
        name = "serve-fake" if arguments.fake else "serve"
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{name}.md").write_text(text)
        record = {"what": what, "machine": machine, "results": results}
        (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
