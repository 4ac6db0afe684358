"""Linear kernels beside each other, in one run: `python bench/linears.py [--layers 6] [--rows 1 16 256 1024]`.

Weights of one Qwen2.5-0.5B layer (and, with --head, of its vocabulary), several layers of them, so that they come
from memory as they do in a model: ours as they are (raw) and in twelve bits (coded), and oneDNN's where this CPU lets
torch pack bfloat16. Each round times every implementation in turn; the table shows medians, GB/s of bfloat16 weights
whatever was read, and how many times faster than the first one each is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.native import NativeOps
from workers.kernels.native_linear import PACKINGS, NativeLinear

HIDDEN, FEED_FORWARD, QKV, VOCABULARY = 896, 4864, 1152, 151936
LAYER = ((QKV, HIDDEN), (HIDDEN, HIDDEN), (2 * FEED_FORWARD, HIDDEN), (HIDDEN, FEED_FORWARD))

Call = Callable[[Tensor], Tensor]


def onednn(weight: Tensor) -> Call:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.clone(), 16)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def run(calls: list[Call], inputs: dict[int, Tensor], widths: list[int]) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter  # a busy machine: own time
    start = clock()
    for call, k in zip(calls, widths, strict=True):
        call(inputs[k])
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", help="generic, avx512bf16 or amx; default: the best there is")
    parser.add_argument("--packing", nargs="+", choices=PACKINGS, default=["raw", "coded"])
    parser.add_argument("--head", action="store_true", help="the vocabulary's weight instead of layers")
    parser.add_argument("--plain", action="store_true", help="also torch's F.linear")
    parser.add_argument("--shape", type=int, nargs=2, help="only this N and K")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layer = ((VOCABULARY, HIDDEN),) if options.head else (tuple(options.shape),) if options.shape else LAYER
    weights = [(torch.randn(n, k) * 0.02).bfloat16() for _ in range(options.layers) for n, k in layer]
    kinds: dict[str, list[Any]] = {}
    ops = NativeOps(torch.bfloat16, threads=options.threads, isa=options.isa)
    for packing in options.packing:
        kinds[packing] = [NativeLinear(ops.lib, ops.family, w, None, torch.bfloat16, packing) for w in weights]
        print(f"{packing}: {sum(linear.bytes for linear in kinds[packing]) / 1e6:.0f} MB")
    try:
        kinds["oneDNN"] = [onednn(w) for w in weights]
    except RuntimeError as error:
        print(f"oneDNN is left out: {error}")
    if options.plain:
        kinds["F.linear"] = [lambda x, w=w: F.linear(x, w) for w in weights]
    widths = [w.shape[1] for w in weights]
    values = sum(w.numel() for w in weights)
    print(f"{values * 2 / 1e6:.0f} MB of bf16 weights, {ops.isa}, {options.threads} threads; ms, GB/s, GFLOP/s")
    for rows in options.rows:
        inputs = {k: torch.randn(rows, k).bfloat16() for k in set(widths)}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(options.rounds):
            for name, calls in kinds.items():
                times[name].append(run(calls, inputs, widths))
        line = f"{rows:5d} rows"
        first = next(iter(kinds))
        reference = statistics.median(times[first])
        for name in kinds:
            t = statistics.median(times[name])
            line += f" | {name} {t * 1e3:8.2f} {values * 2 / t / 1e9:5.1f} {2 * values * rows / t / 1e9:6.0f}"
            line += f" x{reference / t:4.2f} (best x{min(times[first]) / min(times[name]):4.2f})"
        print(line, flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
