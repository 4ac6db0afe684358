"""One model over several processes: what dividing it costs, and what its parts cost.

    python bench/parallel.py tensor                  # 1 process with 2 threads beside 2 processes with 1 thread each
    python bench/parallel.py tensor --invariant      # and both with sums over the fixed tree
    python bench/parallel.py reduce                  # an all-reduce through shared memory beside gloo's, in us
    python bench/parallel.py control                 # what a step's plan costs on its way to the ranks

`tensor` runs a checkpoint of Qwen2.5-0.5B's shape (494 M parameters, made on the first run; `bench/engine.py` tells
its measures) in turn in one process and in N, `--repeat` times, and prints the ratio of each turn. Experts on hosts of
their own are in `bench/experts.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine import ROOT, machine, make_checkpoint, measure

MEASURES = ("prefill", "b1", "b16", "mix")


def rank_of(args: argparse.Namespace) -> dict[str, Any]:
    """What one rank's process does: rank 0 measures, the others follow. `args.rank` is RANK/SIZE/MEETING."""
    import msgspec

    from workers.engine import EngineConfig, Request, Sampling
    from workers.engine.build import build_engine, build_rank
    from workers.parallel.meeting import Meeting, join

    rank, size, place = args.rank.split("/", 2)
    config = EngineConfig(
        str(args.checkpoint), dtype=args.dtype, max_context=2048, max_running=16, threads=args.threads,
        prefix_cache=False, tensor_parallel=int(size), tensor_parallel_invariant=args.invariant,
    )  # fmt: skip
    group = None if size == "1" else join(msgspec.json.decode(place, type=Meeting), int(rank), "cpu")
    if rank != "0":
        assert group is not None
        build_rank(config, group).follow()
        return {}
    engine = build_engine(config, None, group)

    def generate(prompts: list[list[int]], out: int) -> float:
        start = time.perf_counter()
        for i, prompt in enumerate(prompts):
            engine.add(Request(str(i), prompt, out, Sampling(temperature=0)))
        while engine.has_work():
            engine.step()
        return time.perf_counter() - start

    result = measure(generate, 1)
    engine.close()
    return result


def tensor(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    make_checkpoint(args.checkpoint)
    cases = {
        "1 process": (1, args.cores, False),
        f"{args.ranks} processes": (args.ranks, args.cores // args.ranks, False),
    }
    if args.invariant:
        cases |= {f"{name}, invariant": (size, threads, True) for name, (size, threads, _) in cases.items()}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for turn in range(args.repeat):
        for name, (size, threads, invariant) in cases.items():
            print(f"turn {turn + 1} of {args.repeat}: {name} ...", file=sys.stderr, flush=True)
            runs[name].append(run_ranks(args, size, max(1, threads), invariant))
    first = next(iter(cases))
    lines = ["| | " + " | ".join(MEASURES) + " |", "|---|" + "---:|" * len(MEASURES)]
    for name, made in runs.items():
        each = [f"{statistics.median(run[m] for run in made):.1f}" for m in MEASURES]
        lines.append(f"| {name}, tokens/s | " + " | ".join(each) + " |")
    for name, made in runs.items():
        if name != first:
            ratios = [[run[m] / base[m] for run, base in zip(made, runs[first], strict=True)] for m in MEASURES]
            each = [f"{statistics.median(r):.2f} ({min(r):.2f} to {max(r):.2f})" for r in ratios]
            lines.append(f"| {name} / {first} | " + " | ".join(each) + " |")
    return "\n".join(lines), {"runs": runs}


def run_ranks(args: argparse.Namespace, size: int, threads: int, invariant: bool) -> dict[str, float]:
    import msgspec

    from workers.parallel.meeting import Meeting, offer

    meeting = Meeting("shared", 1, "") if size == 1 else offer(size, True, "127.0.0.1", "cpu")
    flags = ["tensor", "--checkpoint", str(args.checkpoint), "--threads", str(threads), "--dtype", args.dtype]
    flags += ["--invariant"] if invariant else []
    place = msgspec.json.encode(meeting).decode()
    children = [
        subprocess.Popen(
            [sys.executable, __file__, *flags, "--rank", f"{rank}/{size}/{place}"], stdout=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        said, _ = children[0].communicate(timeout=900)
        for child in children[1:]:
            child.wait(30)
    finally:
        for child in children:
            with suppress(ProcessLookupError):
                child.kill()
    made: dict[str, float] = json.loads(said)
    return made


def on_threads(groups: list[Any], work: Callable[[Any], float]) -> float:
    """What rank 0 measured while all ran."""
    results: dict[int, float] = {}
    threads = [threading.Thread(target=lambda g=g: results.__setitem__(g.rank, work(g))) for g in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results[0]


def child_group(args: argparse.Namespace) -> None:
    """The other rank of `reduce` and `control`, in a process of its own."""
    import msgspec

    from workers.parallel.meeting import Meeting, join

    place, what = args.follow.split("|", 1)
    group = join(msgspec.json.decode(place, type=Meeting), 1, "cpu")
    WORKS[what](group)


def with_other(meeting: Any, what: str) -> float:
    """Seconds per operation, as rank 0 sees it; rank 1 is another process."""
    import msgspec

    from workers.parallel.meeting import join

    place = msgspec.json.encode(meeting).decode()
    child = subprocess.Popen([sys.executable, __file__, "reduce", "--follow", f"{place}|{what}"])
    try:
        return WORKS[what](join(meeting, 0, "cpu"))
    finally:
        child.wait(30)


def _sums(group: Any, columns: int, dtype: str, count: int) -> float:
    import torch

    x = torch.ones(1, columns, dtype=getattr(torch, dtype))
    for _ in range(50):
        group.sum(x, x.dtype)
    start = time.perf_counter()
    for _ in range(count):
        group.sum(x, x.dtype)
    return (time.perf_counter() - start) / count


def _plans(group: Any, sequences: int, blocks: int, count: int) -> float:
    """A plan's way: encoded, told, decoded, and one small sum, as a step's first one waits for it."""
    from array import array

    import torch

    from workers.engine.plan import Chunk, StepPlan
    from workers.parallel.wire import decode_plan, encode_plan

    plan = StepPlan(0, [Chunk(str(i), 100, [5], (array("i", range(blocks)),), 1) for i in range(sequences)])
    x, spent = torch.ones(1, 16), 0.0
    for _ in range(count):
        start = time.perf_counter()
        if group.rank == 0:
            group.tell(encode_plan(plan))
        else:
            decode_plan(group.hear())
        group.sum(x, x.dtype)
        spent += time.perf_counter() - start
    return spent / count


SIZES = (896, 28_672, 1 << 20)
WORKS: dict[str, Callable[[Any], float]] = {
    **{f"sum-{n}": lambda g, n=n: _sums(g, n, "float32", max(20, 2_000_000 // (n + 2000))) for n in SIZES},
    **{f"plan-{s}-{b}": lambda g, s=s, b=b: _plans(g, s, b, 300) for s, b in ((1, 8), (16, 8), (16, 128), (64, 512))},
}


def reduce(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from workers.parallel.meeting import offer

    lines, figures = ["| floats | shared memory, us | gloo, us | ratio |", "|---:|---:|---:|---:|"], {}
    for size in SIZES:
        ours, gloo = (
            1e6 * with_other(offer(2, one, "127.0.0.1", "cpu"), f"sum-{size}") for one in (True, False)
        )  # fmt: skip
        figures[str(size)] = {"shared_us": ours, "gloo_us": gloo}
        lines.append(f"| {size:,} | {ours:.1f} | {gloo:.0f} | {gloo / ours:.0f} |")
    return "\n".join(lines), figures


def control(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    from workers.parallel.meeting import offer

    lines, figures = ["| sequences | blocks each | us per step |", "|---:|---:|---:|"], {}
    for what in (w for w in WORKS if w.startswith("plan")):
        _, sequences, blocks = what.split("-")
        figures[what] = 1e6 * with_other(offer(2, True, "127.0.0.1", "cpu"), what)
        lines.append(f"| {sequences} | {blocks} | {figures[what]:.0f} |")
    return "\n".join(lines), figures


def parse() -> argparse.Namespace:
    import os

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "understudy" / "bench"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tensor", "reduce", "control"))
    parser.add_argument("--checkpoint", type=Path, default=cache / "qwen2.5-0.5b-random")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--invariant", action="store_true", help="also with sums over the fixed tree")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    for hidden in ("--threads", "--rank", "--follow"):
        parser.add_argument(hidden, type=int if hidden == "--threads" else str, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.rank:
        print(json.dumps(rank_of(args)))
        return
    if args.follow:
        child_group(args)
        return
    where = machine()
    text, figures = {"tensor": tensor, "reduce": reduce, "control": control}[args.what](args)
    about = f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f} at the start."
    flags = "".join(f" --{k}" for k in ("invariant",) if getattr(args, k))
    flags += f" --repeat {args.repeat}" if args.repeat != 3 else ""
    flags += f" --dtype {args.dtype}" if args.dtype != "bfloat16" else ""
    print(f"{text}\n\n{about}")
    name = f"parallel-{args.what}"
    args.out.mkdir(parents=True, exist_ok=True)
    head = f"# bench/parallel.py {args.what}\n\nMade by `python bench/parallel.py {args.what}{flags}`.\n\n"
    (args.out / f"{name}.md").write_text(f"{head}{text}\n\n{about}\n")
    (args.out / f"{name}.json").write_text(json.dumps({"machine": where, "figures": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
