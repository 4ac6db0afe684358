"""How long a replica's leader takes to start, by its parts, with its weights in the page cache and without.

    python bench/start.py                        # writes bench/results/start.md, .json

Every start is a process of its own, as it is in a service, without Ray. `cold` starts find none of the checkpoint in
the page cache: the kernel was asked to drop it, and `mincore` says how much it kept. `unbuilt`: nor the library of
kernels. A service reads the weights and builds the kernels while torch is imported; `in turn`: it does not. `first
format`: from then on, an answer of one token that is held to JSON; asked for at once in turn, else after the replica
was idle, when it prepares for that.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("warm, in turn", "warm", "cold, in turn", "cold", "unbuilt, in turn", "unbuilt")


def drop(directory: Path) -> float:
    """Asks the kernel to forget the weights; the share that it kept."""
    kept = pages = 0
    for file in sorted(directory.glob("*.safetensors")):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapped:
            count = (len(mapped) + mmap.PAGESIZE - 1) // mmap.PAGESIZE
            there = (ctypes.c_ubyte * count)()
            start = (ctypes.c_char * len(mapped)).from_buffer(mapped)
            if ctypes.CDLL(None).mincore(start, ctypes.c_size_t(len(mapped)), there):
                raise OSError("mincore failed")
            del start
            kept, pages = kept + sum(b & 1 for b in there), pages + count
        os.close(descriptor)
    return kept / pages if pages else 0.0


def nothing_ahead() -> None:
    """From here on everything of a start is done in turn."""
    from workers.kernels import build
    from workers.model import ahead

    ahead.read_ahead = lambda _directory: None
    build.build_ahead = lambda: None


def child(checkpoint: str, ahead: bool, ordered: float) -> None:
    """Starts a leader, says how long that took, and stops it."""
    from cluster.wire import LeaderServer
    from workers.actors import Leader, build_real_engine
    from workers.engine import EngineConfig
    from workers.engine.contract import Grammar, Request
    from workers.engine.loop import EngineLoop

    if not ahead:
        nothing_ahead()

    async def first_format(loop: EngineLoop) -> float:
        begun, ended = time.monotonic(), asyncio.Event()
        here = asyncio.get_running_loop()
        with loop.attach(lambda output: output.outputs and here.call_soon_threadsafe(ended.set)) as session:
            session.submit(Request("format", [0, 0, 0], 1, grammar=Grammar("json")))
            await ended.wait()
        return time.monotonic() - begun

    wire = lambda loop: LeaderServer(loop, replica="m-0", epoch=1, secret="s")  # noqa: E731

    async def start() -> tuple[Any, float]:
        engines: list[Any] = []

        def build(*arguments: Any) -> Any:
            engines.append(build_real_engine(*arguments))
            return engines[-1]

        leader = Leader(EngineConfig(checkpoint, name="m"), build, wire, ordered=ordered)
        report = await leader.start()
        if ahead:  # what `Pulse` does when the engine is idle
            await asyncio.to_thread(engines[0].formats.prepare)
        took = await first_format(leader._loop) if leader._loop is not None else 0.0
        await leader.stop()
        return report, took

    report, took = asyncio.run(start())
    if report.cold_start is None:
        raise SystemExit(f"it did not start: {report.error}")
    parts = {name: getattr(report.cold_start, name) for name in report.cold_start.__struct_fields__}
    print(json.dumps(parts | {"total_s": report.cold_start.total_s, "format_s": took}))


def one(checkpoint: Path, way: str) -> dict[str, float]:
    """One start in a process of its own."""
    kept = drop(checkpoint) if way.startswith("cold") else 1.0
    with tempfile.TemporaryDirectory() as empty:
        unbuilt = {"UNDERSTUDY_CACHE": empty} if way.startswith("unbuilt") else {}
        command = [sys.executable, __file__, "--child", str(time.time()), "--checkpoint", str(checkpoint)]
        command += [] if way.endswith("in turn") else ["--ahead"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | unbuilt)
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told | {"kept": kept}


def table(results: dict[str, list[dict[str, float]]], size: int, machine: str, name: str) -> str:
    parts = ("process_s", "imports_s", "weights_s", "engine_s", "warm_up_s", "total_s", "format_s")
    lines = [
        f"# Starts of {name}",
        "",
        f"On {machine}. {size / 1e6:,.0f} MB of weights; medians of {len(results['warm'])} starts, seconds; "
        "see `bench/start.py`.",
        "",
        "| | process | imports | weights, read and packed | rest of the engine | first tokens | total | first format "
        "| in the cache |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for way, starts in results.items():
        medians = [statistics.median(s[p] for s in starts) for p in parts]
        kept = statistics.median(s["kept"] for s in starts)
        lines.append(f"| {way} | " + " | ".join(f"{m:.2f}" for m in medians) + f" | {kept:.0%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=None, help="a directory (a random one of 494 M parameters)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--ahead", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(str(arguments.checkpoint), arguments.ahead, arguments.child)
        return
    checkpoint = arguments.checkpoint
    if checkpoint is None:
        sys.path.insert(0, str(ROOT / "bench"))
        from serve import random_checkpoint  # type: ignore[import-not-found]  # the neighbour in this folder

        checkpoint = random_checkpoint()
    one(checkpoint, "warm")  # kernels are built, everything else is in the page cache
    results: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way, starts in results.items():
            starts.append(one(checkpoint, way))
            print(f"{way}: {json.dumps(starts[-1])}", file=sys.stderr)
    size = sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
    machine = f"{os.cpu_count()} cores ({platform.processor() or platform.machine()}), load {os.getloadavg()[0]:.1f}"
    text = table(results, size, machine, checkpoint.name)
    print(text)
    (arguments.out / "start.md").write_text(text)
    (arguments.out / "start.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
