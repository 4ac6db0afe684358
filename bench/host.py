"""What the engine itself costs per step of a plain greedy batch, beside another commit's: all but the forward.

    git worktree add /tmp/before COMMIT
    python bench/host.py --before /tmp/before --step-ms 188

A runner that computes nothing gives prepared logits, so that scheduling, block tables, choosing and reporting are left.
Both sides run in processes of their own, in turn; a time is the least of its repeats, in seconds of the process's own
CPU, which hardly notices what else the machine does. `--step-ms`: what a real step takes, of which the difference is
the share that the batch loses.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES = (1, 16, 64)
VOCAB, PROMPT, STEPS = 1000, 64, 400


class Prepared:
    """Logits for every row that is asked for."""

    def __init__(self) -> None:
        import torch

        self._logits = torch.randn(max(SIZES), VOCAB, generator=torch.Generator().manual_seed(0))

    def run(self, plan: Any) -> Any:
        wanted = sum(int(getattr(chunk, "wanted", getattr(chunk, "sample", 0))) for chunk in plan.chunks)
        return self._logits[:wanted]

    def close(self) -> None:
        pass


def microseconds(sequences: int, repeats: int) -> float:
    """CPU time of one step in which every sequence is decoded."""
    import torch

    from workers.cache.manager import CacheManager
    from workers.engine import EngineInfo, Request, Sampling
    from workers.engine.core import EngineCore
    from workers.kernels.plain import PlainOps

    torch.set_num_threads(1)
    blocks = sequences * (PROMPT + STEPS + 32) // 16 + 8
    info = EngineInfo("m", "f", "n", "a", "float32", 4096, VOCAB, 16, blocks, 0, max(SIZES), 8192)
    best = float("inf")
    for _ in range(repeats):
        cache = CacheManager([blocks], [None], 16)
        engine = EngineCore(Prepared(), info, cache, PlainOps(torch.float32))
        for i in range(sequences):
            prompt = [(i * 7 + p) % VOCAB for p in range(PROMPT)]
            engine.add(
                Request(f"r{i}", prompt, STEPS + 8, Sampling(temperature=0), eos_ids=[VOCAB - 1], min_tokens=STEPS)
            )
        for _ in range(3):
            engine.step()
        times = []
        for _ in range(STEPS // 20):
            begun = time.process_time()
            for _ in range(19):
                engine.step()
            times.append((time.process_time() - begun) / 19)
        best = min(best, *times)
        engine.close()
    return best * 1e6


def side(root: Path, repeats: int) -> list[float]:
    """Of each of SIZES, in a new process over the sources in `root`."""
    done = subprocess.run(
        [sys.executable, "-P", __file__, "--child", "--repeats", str(repeats)],
        env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    if Path(found["root"]) != root.resolve():
        raise SystemExit(f"{root}: sources of {found['root']} were imported")
    return found["times"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of the commit to compare with")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of each measure in a process")
    parser.add_argument("--step-ms", type=float, help="what a real step of 16 sequences takes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        from workers.engine import core

        times = [microseconds(n, args.repeats) for n in SIZES]
        print(json.dumps({"root": str(Path(core.__file__).resolve().parents[2]), "times": times}))
        return
    if args.before is None:
        parser.error("--before is needed")
    pairs = [(side(args.before, args.repeats), side(ROOT, args.repeats)) for _ in range(args.pairs)]
    print(f"Made by `python bench/host.py {' '.join(sys.argv[1:])}`.\n")
    print("| sequences | before, us a step | now, us a step | now / before, each pair |\n|--:|--:|--:|---|")
    for i, size in enumerate(SIZES):
        before, now = (statistics.median(pair[j][i] for pair in pairs) for j in (0, 1))
        ratios = " ".join(f"{b[i] / a[i]:.2f}" for a, b in pairs)
        print(f"| {size} | {before:.0f} | {now:.0f} | {ratios} |")
        if args.step_ms and size == 16:
            share = (now - before) / 1000 / args.step_ms
    if args.step_ms:
        print(f"\nOf a step of {args.step_ms:g} ms at 16 sequences: {100 * share:+.3f} %.")


if __name__ == "__main__":
    main()
