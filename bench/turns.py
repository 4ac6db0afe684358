"""A plain greedy batch by two commits, in turn: what a change did to throughput.

    git worktree add /tmp/before COMMIT
    python bench/turns.py --before /tmp/before --pairs 8 --turns 40

Each engine has a process of its own, and only one works at a time, a few steps each, in the order A B, B A, A B, …:
whatever else the machine does falls on both. Where a process's memory happens to lie makes several per cent, so that
pairs of new processes are made; a pair's ratio is the median of its turns'. The work is that of bench/engine.py's
`b16`: 16 sequences are decoded, prompts of 16 random ids, greedy, nothing ends early.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
SEQUENCES, PROMPT, LENGTH = 16, 16, 64


def child(checkpoint: str, steps: int) -> None:
    """Answers every line of stdin with the seconds that `steps` steps took."""
    from workers.engine import EngineConfig, Request, Sampling, build, core

    engine = build.build_engine(
        EngineConfig(checkpoint, dtype="bfloat16", max_context=2048, max_running=SEQUENCES, prefix_cache=False)
    )
    print(json.dumps({"root": str(Path(core.__file__).resolve().parents[2])}), flush=True)
    dice = random.Random(0)
    left = 0
    for _ in sys.stdin:
        if left < steps:
            while engine.has_work():
                engine.step()
            for i in range(SEQUENCES):
                prompt = [dice.randrange(1000, 100_000) for _ in range(PROMPT)]
                engine.add(Request(str(i), prompt, LENGTH, Sampling(temperature=0)))
            engine.step()  # the prompts
            left = LENGTH - 2
        begun = time.perf_counter()
        made = sum(len(o.token_ids) for _ in range(steps) for o in engine.step())
        took = time.perf_counter() - begun
        left -= steps
        if made != steps * SEQUENCES:
            raise RuntimeError(f"{steps} steps made {made} tokens")
        print(json.dumps({"seconds": took}), flush=True)
    engine.close()


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    lines: IO[str] | None = process.stdout
    line = lines.readline() if lines else ""
    if not line:
        raise SystemExit(f"the child ended with status {process.wait()}; its words are above")
    found: dict[str, Any] = json.loads(line)
    return found


def start(root: Path, args: argparse.Namespace) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-P",
        __file__,
        "--child",
        "--steps",
        str(args.steps),
        "--checkpoint",
        str(args.checkpoint),
    ]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(root)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if Path(answer(process)["root"]) != root.resolve():
        raise SystemExit(f"{root}: other sources were imported")
    return process


def turn(process: subprocess.Popen[str]) -> float:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(answer(process)["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--steps", type=int, default=4, help="of one side in a turn")
    parser.add_argument(
        "--checkpoint", type=Path, default=Path.home() / ".cache/understudy/bench/qwen2.5-0.5b-random",
        help="made by bench/engine.py",
    )  # fmt: skip
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(str(args.checkpoint), args.steps)
        return
    if args.before is None:
        parser.error("--before is needed")
    print(f"Made by `python bench/turns.py {' '.join(sys.argv[1:])}`.\n")
    print("| pair | before, tokens/s | now, tokens/s | now / before |\n|--:|--:|--:|--:|", flush=True)
    ratios = []
    for number in range(1, args.pairs + 1):
        before, now, ratio = pair(args)
        ratios.append(ratio)
        print(f"| {number} | {before:.1f} | {now:.1f} | {ratio:.3f} |", flush=True)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    print(
        f"\nnow / before: mean {statistics.mean(ratios):.3f}, standard error {error:.3f}, "
        f"median {statistics.median(ratios):.3f}."
    )


def pair(args: argparse.Namespace) -> tuple[float, float, float]:
    """Tokens per second of either side, medians, and the median ratio of their turns."""
    sides = {"before": start(args.before, args), "now": start(ROOT, args)}
    for _ in range(3):  # warms up
        for process in sides.values():
            turn(process)
    rates: dict[str, list[float]] = {"before": [], "now": []}
    for i in range(args.turns):
        for name in ("before", "now") if i % 2 == 0 else ("now", "before"):
            rates[name].append(SEQUENCES * args.steps / turn(sides[name]))
    for process in sides.values():
        process.communicate(timeout=60)
    each = [now / before for before, now in zip(rates["before"], rates["now"], strict=True)]
    return statistics.median(rates["before"]), statistics.median(rates["now"]), statistics.median(each)


if __name__ == "__main__":
    main()
