"""Experts on hosts of their own: what they cost on one machine, with a lost host and a new placement; skewed loads over
many hosts.

    python bench/experts.py engine      # an engine with its experts on 2 hosts beside the same engine with them at home
    python bench/experts.py engine --size olmoe       # the same with experts as large as OLMoE-1B-7B's, of 2 layers
    python bench/experts.py overlap     # a leader and a host with a core each: steps whole, and in two halves
    python bench/experts.py simulate    # balance, moves and throughput of 8 to 256 hosts, computed

`engine`: a checkpoint of OLMoE's kind with random bf16 weights (64 experts, 8 for a token; of 1024 x 512 in 4 layers,
428 M parameters, or of 2048 x 1024 in 2 layers, 873 M; made on the first run), 16 sequences, 16 tokens in, 64 more out,
greedy. At home: one process with all CPUs. Apart: a leader with as many threads, and 2 hosts that share the CPUs. Runs
of the two take turns. `overlap`: four prompts of 1,000 tokens in steps of 512 rows, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experts_stage import CACHE, ROOT, SHAPE, SIZES, Hosts, run_b16, run_prompts, write_checkpoint

# An engine on this machine --------------------------------------------------------------------------------------------


def engine_command(arguments: argparse.Namespace) -> None:
    import torch

    from router.experts import make_placement
    from workers.engine.build import build_engine
    from workers.engine.contract import EngineConfig
    from workers.experts.placement import ExpertsPlan, HostsView

    SHAPE.update(SIZES[arguments.size])
    arguments.checkpoint = arguments.checkpoint or CACHE / f"{arguments.size}-64x8-random"
    write_checkpoint(arguments.checkpoint)
    cpus, secret = len(os.sched_getaffinity(0)), "bench"
    layers, experts = range(SHAPE["num_hidden_layers"]), SHAPE["num_experts"]
    config = EngineConfig(
        model_dir=str(arguments.checkpoint), threads=cpus, max_running=16, cache_bytes=256 << 20, chunk_tokens=256
    )
    hosts = Hosts(arguments.checkpoint, 2, arguments.host_threads or max(1, cpus // 2), secret)
    try:
        capacity = {a.name: a.capacity for a in hosts.addresses}
        placement = make_placement(None, layers, [[1.0] * experts for _ in layers], capacity)
        for i, address in enumerate(hosts.addresses):
            hosts.hold(i, placement.held_by(address.name))
        plan = ExpertsPlan(HostsView(1, placement, tuple(hosts.addresses)), secret)
        import msgspec

        home, apart = build_engine(config), build_engine(msgspec.structs.replace(config, experts=plan))
        for engine in (home, apart):
            run_b16(engine, "warm", 8)
        rates: dict[str, list[float]] = {"home": [], "apart": []}
        cpu = {"home": 0.0, "apart": 0.0}
        tokens = {}
        for turn in range(arguments.repeat):
            for name, engine in (("home", home), ("apart", apart)):
                before = cpu_seconds(hosts)
                rate, _, tokens[name] = run_b16(engine, f"{name}{turn}")
                rates[name].append(round(rate, 1))
                cpu[name] += cpu_seconds(hosts) - before
        if tokens["home"] != tokens["apart"]:
            raise RuntimeError("the tokens differ")
        ratios = sorted(apart / home for home, apart in zip(rates["home"], rates["apart"], strict=True))
        best = {name: max(each) for name, each in rates.items()}
        print(json.dumps({"torch": torch.__version__, "cpus": cpus, "tokens_per_second": rates}, indent=1))
        print(f"at home {best['home']:.1f} tokens/s, apart {best['apart']:.1f}: {best['apart'] / best['home']:.2f}")
        print(f"of {len(ratios)} pairs {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        print(f"CPU time of all processes, apart over at home: {cpu['apart'] / cpu['home']:.2f}")
        print(f"one exchange with nothing to compute: {empty_exchange(apart):.0f} us")
        kill_and_switch(apart, hosts, placement, plan)
    finally:
        hosts.close()


def cpu_seconds(hosts: Hosts) -> float:
    """Of this process and the hosts, since they began."""
    import psutil

    return time.process_time() + sum(sum(psutil.Process(p.pid).cpu_times()[:2]) for p in hosts.processes)


def empty_exchange(engine: Any) -> float:
    """Microseconds of one layer's exchange with two hosts for one row of one expert each, less nothing."""
    import torch

    from workers.experts.dispatch import RemoteExperts

    layer = RemoteExperts(engine.experts, SHAPE["num_hidden_layers"] - 1)
    x = torch.zeros(1, SHAPE["hidden_size"], dtype=torch.bfloat16)
    ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        layer(x, ids, weights)
        times.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(times)


def kill_and_switch(engine: Any, hosts: Hosts, placement: Any, plan: Any) -> None:
    """The slowest step when a placement is switched, and when a host is killed, over the median."""
    import msgspec

    from workers.experts.placement import HostsView

    _, calm, want = run_b16(engine, "calm")
    median = statistics.median(calm[1:])
    table = tuple(tuple(tuple((1 - h, s) for h, s in of) for of in row) for row in placement.table)
    turned = msgspec.structs.replace(placement, version=2, table=table)
    for i, address in enumerate(hosts.addresses):
        hosts.tell(i, "hold", turned.held_by(address.name))  # while the next run computes
    _, loading, same = run_b16(engine, "loading")
    if same != want:
        raise RuntimeError("the tokens differ while hosts load")
    for i, address in enumerate(hosts.addresses):
        hosts.hold(i, turned.held_by(address.name))
    engine.experts.offer(HostsView(2, turned, tuple(hosts.addresses)))
    _, switched, same = run_b16(engine, "switched")
    if same != want or engine.experts.report().version != 2:
        raise RuntimeError("the placement was not switched, or the tokens differ")
    for i, address in enumerate(hosts.addresses):
        hosts.tell(i, "keep", turned.held_by(address.name))
    print(f"median step {1e3 * median:.1f} ms; slowest of the calm run {max(calm[1:]) / median:.2f} medians")
    print(f"slowest while every expert is loaded anew beside {max(loading[1:]) / median:.2f} medians, with the switch "
          f"{max(switched[1:]) / median:.2f}")  # fmt: skip
    _, killed, same = run_b16(engine, "killed", at_step_20=hosts.processes[0].kill)
    if same != want:
        raise RuntimeError("the tokens differ after a host was killed")
    print(f"a host is killed, seven in eight of its experts had no copy: the step that loads them takes "
          f"{max(killed[1:]):.2f} s; later ones, without its cores, {statistics.median(killed[24:]) / median:.2f} "
          "medians")  # fmt: skip


# A leader and a host with a core each ---------------------------------------------------------------------------------


def overlap_command(arguments: argparse.Namespace) -> None:
    """Steps whole and in halves, in turns, and then as the engine chooses."""
    from router.experts import make_placement
    from workers.engine.build import build_engine
    from workers.engine.contract import EngineConfig
    from workers.experts.placement import ExpertsPlan, HostsView

    SHAPE.update(SIZES[arguments.size])
    checkpoint, secret = CACHE / f"{arguments.size}-64x8-random", "bench"
    write_checkpoint(checkpoint)
    layers = range(SHAPE["num_hidden_layers"])
    mine, theirs = sorted(os.sched_getaffinity(0))[:2]
    os.sched_setaffinity(0, {theirs})
    hosts = Hosts(checkpoint, 1, 1, secret)
    os.sched_setaffinity(0, {mine})
    try:
        capacity = {a.name: a.capacity for a in hosts.addresses}
        placement = make_placement(None, layers, [[1.0] * SHAPE["num_experts"] for _ in layers], capacity)
        hosts.hold(0, placement.held_by("h0"))
        plan = ExpertsPlan(HostsView(1, placement, tuple(hosts.addresses)), secret)
        config = EngineConfig(model_dir=str(checkpoint), threads=1, max_running=16, cache_bytes=256 << 20,
                              chunk_tokens=512, experts=plan)  # fmt: skip
        engine: Any = build_engine(config)
        overlap = engine._runner.overlap
        overlap.forced = False
        run_prompts(engine, "warm")
        ratios, tokens = [], []
        for turn in range(arguments.repeat):
            rates = []
            for overlap.forced in (False, True):
                rate, made = run_prompts(engine, f"{turn}-{overlap.forced}")
                rates.append(rate)
                tokens.append(made)
            ratios.append(rates[1] / rates[0])
            print(f"whole {rates[0]:.0f} tokens/s, in halves {rates[1]:.0f}: {ratios[-1]:.2f}")
        if any(each != tokens[0] for each in tokens):
            raise RuntimeError("the tokens differ")
        print(f"of {len(ratios)} pairs {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        overlap.forced = None
        for turn in range(2):
            print(f"as it chooses {run_prompts(engine, f'free{turn}')[0]:.0f} tokens/s")
    finally:
        hosts.close()


# Many hosts, computed ------------------------------------------------------------------------------------------------


def zipf(experts: int, exponent: float, seed: int) -> list[float]:
    """Loads of experts in random order."""
    loads = [1e6 / (rank + 1) ** exponent for rank in range(experts)]
    random.Random(seed).shuffle(loads)
    return loads


def throughput(placement: Any, loads: Sequence[Sequence[float]], steps: int = 50) -> float:
    """Rows computed in the time in which one busy host computes one."""
    import numpy as np

    from workers.experts.split import Split

    dice, hosts = np.random.default_rng(0), len(placement.hosts)
    rows = longest = 0
    for homes, load in zip(placement.table, loads, strict=True):
        split, shares = Split(homes), np.array(load) / sum(load)
        for _ in range(steps):
            experts = dice.choice(len(load), 256 * hosts, p=shares)
            rows += len(experts)
            longest += int(np.bincount(split(experts), minlength=hosts).max())
    return rows / longest


def simulate_command(arguments: argparse.Namespace) -> None:
    """Throughput is in hosts that would be busy all the time: of steps with 256 rows per host, whose experts are drawn
    by the loads and which the dispatcher's own code splits; a layer lasts as long as its slowest host."""
    from router.experts import balance, make_placement, moves

    columns = ("hosts", "experts", "room for each", "Zipf", "balance before", "after", "throughput before", "after")
    columns += ("experts loaded", "balance with one host lost", "ms per layer")
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    for hosts, experts, exponent in (
        (8, 64, 1.0), (8, 256, 1.0), (16, 256, 1.0), (32, 256, 1.0), (64, 256, 1.0), (128, 256, 1.0), (256, 256, 1.0),
        (8, 64, 0.5), (64, 256, 0.5), (8, 64, 1.5), (64, 256, 1.5),
    ):  # fmt: skip
        room = -(-experts // hosts) + 2
        capacity = {f"h{i:03}": arguments.layers * room for i in range(hosts)}
        layers = range(arguments.layers)
        even = [[1.0] * experts for _ in layers]
        loads = [zipf(experts, exponent, seed) for seed in layers]
        first = make_placement(None, layers, even, capacity)
        begin = time.perf_counter()
        after = make_placement(first, layers, loads, capacity)
        took = time.perf_counter() - begin
        fits = (hosts - 1) * room >= experts
        left = {n: c for n, c in capacity.items() if n != "h000"}
        lost = f"{balance(make_placement(after, layers, loads, left), loads):.2f}" if fits else "no room"
        row = (
            f"{hosts}", f"{experts}", f"{room}", f"{exponent:g}", f"{balance(first, loads):.2f}",
            f"{balance(after, loads):.2f}", f"{throughput(first, loads):.1f}", f"{throughput(after, loads):.1f}",
            f"{moves(first, after)} of {after.copies}", lost,
            f"{1e3 * took / arguments.layers:.0f}",
        )  # fmt: skip
        print(f"| {' | '.join(row)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    engine = commands.add_parser("engine")
    engine.add_argument("--size", choices=SIZES, default="small")
    engine.add_argument("--checkpoint", type=Path)
    engine.add_argument("--host-threads", type=int, help="of each host; without it they share the CPUs")
    engine.add_argument("--repeat", type=int, default=4)
    engine.set_defaults(run=engine_command)
    both = commands.add_parser("overlap")
    both.add_argument("--size", choices=SIZES, default="small")
    both.add_argument("--repeat", type=int, default=4)
    both.set_defaults(run=overlap_command)
    simulate = commands.add_parser("simulate")
    simulate.add_argument("--layers", type=int, default=4)
    simulate.set_defaults(run=simulate_command)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
