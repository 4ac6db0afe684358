"""Linear kernels against oneDNN, in one run: `python bench/linears.py [--layers 6] [--rows 1 16 256 1024]`.

Weights of one Qwen2.5-0.5B layer (and, with --head, of its vocabulary), several layers of them, so that they come
from memory as they do in a model. Each round times every implementation in turn; the table shows medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.native import NativeOps

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
    parser.add_argument("--isa", nargs="+", default=["amx"])
    parser.add_argument("--head", action="store_true", help="the vocabulary's weight instead of layers")
    parser.add_argument("--plain", action="store_true", help="also torch's F.linear")
    parser.add_argument("--shape", type=int, nargs=2, help="only this N and K")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layer = ((VOCABULARY, HIDDEN),) if options.head else (tuple(options.shape),) if options.shape else LAYER
    weights = [torch.randn(n, k).bfloat16() for _ in range(options.layers) for n, k in layer]
    kinds: dict[str, list[Call]] = {}
    for isa in options.isa:
        ops = NativeOps(torch.bfloat16, threads=options.threads, isa=isa)
        kinds[isa] = [ops.linear(w) for w in weights]
    kinds["oneDNN"] = [onednn(w) for w in weights]
    if options.plain:
        kinds["F.linear"] = [lambda x, w=w: F.linear(x, w) for w in weights]
    widths = [w.shape[1] for w in weights]
    values = sum(w.numel() for w in weights)
    print(f"{values * 2 / 1e6:.0f} MB of bf16 weights, {options.threads} threads; ms, GB/s of weights, GFLOP/s")
    for rows in options.rows:
        inputs = {k: torch.randn(rows, k).bfloat16() for k in set(widths)}
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for _ in range(options.rounds):
            for name, calls in kinds.items():
                times[name].append(run(calls, inputs, widths))
        line = f"{rows:5d} rows"
        reference = statistics.median(times["oneDNN"])
        for name in kinds:
            t = statistics.median(times[name])
            line += f" | {name} {t * 1e3:8.2f} {values * 2 / t / 1e9:5.1f} {2 * values * rows / t / 1e9:6.0f}"
            line += f" x{reference / t:4.2f} (best x{min(times['oneDNN']) / min(times[name]):4.2f})"
        print(line, flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
