"""What one GPU makes of the decoder: speeds as shares of what the card can do, the price of exactness, parity.

    python bench/gpu.py --json gpu.json          on a machine with a CUDA device
    python bench/gpu.py --device cpu --tiny      the same on a CPU with a tiny shape, to see that it runs

Needs torch alone (transformers is compared with where it is installed), no Ray, no checkpoint: weights are random, of
the shape of Llama-3-8B in bf16. Exit code 2 where the device is not there.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpu_experts import lines_of, measure_experts

from workers.kernels.cuda import CudaOps
from workers.kernels.ops import BLOCK, Batch, Ops
from workers.kernels.plain import PlainOps
from workers.model.config import parse_config
from workers.model.decoder import Decoder, load_decoder
from workers.model.load import Loader
from workers.model.spec import ModelSpec
from workers.model.weights import Part

LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "8b": LLAMA
    | {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192},
    "tiny": LLAMA
    | {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
}


@dataclass(frozen=True)
class Work:
    """How much of it: `prompt` tokens per sequence, `steps` decoded after them, at most `rows` in one prefill step."""

    counts: tuple[int, ...] = (1, 16, 64)
    prompt: int = 512
    steps: int = 16
    rows: int = 8192
    repeats: int = 3
    matrix: int = 8192
    copy_bytes: int = 1 << 31


TINY = Work(counts=(1, 3), prompt=24, steps=2, rows=48, repeats=1, matrix=256, copy_bytes=1 << 20)


class RandomTensors:
    """A tensor source whose values depend on the tensor's name alone."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def __contains__(self, name: str) -> bool:
        return True

    def get(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        whole = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype) * shape[-1] ** -0.5
        if len(shape) == 1:
            whole = whole * 0.1 + 1
        return whole if part is None else whole.narrow(part.dim, part.start, part.stop - part.start)


class Sequences:
    """`count` sequences side by side over one cache, each with a context of `context` positions at most."""

    def __init__(self, decoder: Decoder, count: int, context: int) -> None:
        a, spec = decoder.spec.attention, decoder.spec
        width = -(-context // BLOCK)
        self.decoder, self.count, self.at = decoder, count, 0
        self.device = decoder.device
        self.caches = [decoder.ops.cache(len(g.layers), count * width, a.kv_heads, a.head_dim) for g in spec.groups]
        self.table = torch.arange(count * width, dtype=torch.int32).view(count, width)

    def step(self, ids: Tensor, first: int = 0) -> Tensor:
        """Runs rows ids [S, n] of sequences first .. first + S at position `at`, without moving it: logits [S, V]."""
        s, n = ids.shape
        batch = Batch(
            positions=torch.arange(self.at, self.at + n).repeat(s).to(self.device),
            row_start=torch.arange(0, s * n + 1, n, dtype=torch.int32).to(self.device),
            tables=[self.table[first : first + s, : -(-(self.at + n) // BLOCK)].to(self.device)] * len(self.caches),
            row_seq=torch.arange(s, dtype=torch.int32).repeat_interleave(n).to(self.device),
        )
        sampled = torch.arange(n - 1, s * n, n).to(self.device)
        return self.decoder.forward(ids.reshape(-1).to(self.device), batch, self.caches, sampled)

    def prefill(self, ids: Tensor, rows: int) -> Tensor:
        """ids [count, n], in steps of about `rows` rows: logits [count, V]."""
        each = max(1, rows // ids.shape[1])
        logits = [self.step(part, i * each) for i, part in enumerate(ids.split(each))]
        self.at += ids.shape[1]
        return torch.cat(logits)

    def decode(self, logits: Tensor) -> Tensor:
        logits = self.step(logits.argmax(-1, keepdim=True))
        self.at += 1
        return logits


def clock(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def median_seconds(work: Callable[[], object], repeats: int, device: str) -> float:
    work()  # warm up
    taken = []
    for _ in range(repeats):
        start = clock(device)
        work()
        taken.append(clock(device) - start)
    return statistics.median(taken)


def card(device: str, work: Work) -> dict[str, float]:
    """What the device does at best: FLOP/s of a large bf16 product, bytes/s of a copy (read and write)."""
    a = torch.randn(work.matrix, work.matrix, device=device).bfloat16()
    product = median_seconds(lambda: a @ a, 10, device)
    source = torch.zeros(work.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), 10, device)
    return {"flops": 2 * work.matrix**3 / product, "bytes_per_s": 2 * work.copy_bytes / copy}


def parameters(spec: ModelSpec) -> tuple[int, int]:
    """(of all layers, of the head)."""
    a = spec.attention
    each = (a.heads * 2 + a.kv_heads * 2) * a.head_dim * spec.hidden
    return sum(each + 3 * f.size * spec.hidden for f in spec.ffn), spec.vocab_size * spec.hidden


def prefill_flops(spec: ModelSpec, count: int, prompt: int) -> float:
    layers, head = parameters(spec)
    attention = 4 * spec.layers * spec.attention.heads * spec.attention.head_dim * prompt * (prompt + 1) / 2
    return count * (2 * layers * prompt + 2 * head + attention)


def decode_bytes(spec: ModelSpec, count: int, context: int) -> float:
    """Read by one step: every weight, and every sequence's keys and values. Two bytes a number."""
    layers, head = parameters(spec)
    cached = 2 * spec.layers * spec.attention.kv_heads * spec.attention.head_dim * context
    return 2.0 * (layers + head + count * cached)


Speeds = dict[int, tuple[float, float]]  # sequences -> seconds of the whole prefill, seconds of a decode step


def prompts(spec: ModelSpec, count: int, length: int) -> Tensor:
    return torch.randint(spec.vocab_size, (count, length), generator=torch.Generator().manual_seed(count))


def measure(decoder: Decoder, work: Work, device: str) -> Speeds:
    speeds: Speeds = {}
    for count in work.counts:
        ids = prompts(decoder.spec, count, work.prompt)
        sequences = Sequences(decoder, count, work.prompt + work.steps)

        def prefill(sequences: Sequences = sequences, ids: Tensor = ids) -> Tensor:
            sequences.at = 0
            return sequences.prefill(ids, work.rows)

        first = prefill()

        def decode(sequences: Sequences = sequences, logits: Tensor = first) -> None:
            sequences.at = work.prompt
            for _ in range(work.steps):
                logits = sequences.decode(logits)

        speeds[count] = (
            median_seconds(prefill, work.repeats, device),
            median_seconds(decode, work.repeats, device) / work.steps,
        )
    return speeds


def measure_transformers(config: dict[str, Any], spec: ModelSpec, work: Work, device: str) -> Speeds:
    """The same work by `LlamaForCausalLM` with its dynamic cache, greedy, in bf16."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    keys = {k: v for k, v in config.items() if k not in ("architectures", "dtype")}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**keys)).eval()
    finally:
        torch.set_default_dtype(before)
    speeds: Speeds = {}
    for count in work.counts:
        ids = prompts(spec, count, work.prompt).to(device)
        each = max(1, work.rows // work.prompt)

        def run(ids: Tensor, steps: int) -> float:
            """Prefills; then the seconds of `steps` decode steps."""
            cache = DynamicCache()
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            start = clock(device)
            for _ in range(steps):
                token = logits[:, -1].argmax(-1, keepdim=True)
                logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return clock(device) - start

        def prefill(ids: Tensor = ids, each: int = each) -> None:
            for part in ids.split(each):
                run(part, 0)

        with torch.inference_mode():
            run(ids, 1)
            decode = statistics.median(run(ids, work.steps) for _ in range(work.repeats)) / work.steps
            speeds[count] = median_seconds(prefill, work.repeats, device), decode
    return speeds


def build(spec: ModelSpec, ops: Ops, device: str, source: RandomTensors) -> Decoder:
    place = torch.device(device)
    return load_decoder(spec, Loader(source, ops, place), ops, spec.max_context, place)


def row_law(decoder: Decoder, prompt: int) -> bool:
    """Whether a sequence has the same bits alone as among others, and in chunks as in one piece."""
    ids = prompts(decoder.spec, 3, prompt)
    together = Sequences(decoder, 3, prompt + 1)
    mates = together.prefill(ids, 3 * prompt)
    mates_next = together.decode(mates)
    alone = Sequences(decoder, 1, prompt + 1)
    cut = prompt // 3
    alone.prefill(ids[:1, :cut], prompt)
    logits = alone.prefill(ids[:1, cut:], prompt)
    return torch.equal(logits, mates[:1]) and torch.equal(alone.decode(logits), mates_next[:1])


def parity(device: str, steps: int = 16) -> dict[str, Any]:
    """The device in float32 against the plain operations on the CPU, on a small shape with the same weights."""
    spec = parse_config(SHAPES["tiny"] | {"dtype": "float32"})
    ids = prompts(spec, 2, 40)
    source = RandomTensors("cpu", torch.float32)

    def answer(ops: Ops, where: str) -> tuple[Tensor, Tensor]:
        sequences = Sequences(build(spec, ops, where, source), 2, 40 + steps)
        logits = [sequences.prefill(ids, 80)]
        for _ in range(steps):
            logits.append(sequences.decode(logits[-1]))
        stacked = torch.stack(logits).cpu()
        return stacked, stacked.argmax(-1)

    want, tokens = answer(PlainOps(torch.float32), "cpu")
    result: dict[str, Any] = {}
    for exact in (True, False):
        logits, made = answer(CudaOps(torch.float32, device, exact), device)
        mode = "exact" if exact else "fast"
        result[mode] = {
            "max_logit_difference": (logits - want).abs().max().item(),
            "tokens_equal": torch.equal(made, tokens),
        }
    return result


def rows_of(spec: ModelSpec, best: dict[str, float], work: Work, speeds: dict[str, Speeds]) -> Iterator[dict[str, Any]]:
    """One row per measure and number of sequences: tokens per second, share of the limit, ratios."""
    for count in work.counts:
        ideal = (
            prefill_flops(spec, count, work.prompt) / best["flops"],
            decode_bytes(spec, count, work.prompt + work.steps // 2) / best["bytes_per_s"],
        )
        for kind, name, tokens in ((0, "prefill", count * work.prompt), (1, "decode", count)):
            row: dict[str, Any] = {"measure": name, "sequences": count, "limit": tokens / ideal[kind]}
            for who, taken in speeds.items():
                row[who] = tokens / taken[count][kind]
                row[f"{who}_share"] = ideal[kind] / taken[count][kind]
            row["exact_price"] = speeds["exact"][count][kind] / speeds["fast"][count][kind]
            if "transformers" in speeds:
                row["fast_to_transformers"] = speeds["transformers"][count][kind] / speeds["fast"][count][kind]
            yield row


COLUMNS = {  # heading -> (key of a row, format)
    "measure": ("measure", "s"),
    "sequences": ("sequences", "d"),
    "limit": ("limit", ",.0f"),
    "fast": ("fast", ",.0f"),
    "of limit": ("fast_share", ".0%"),
    "exact": ("exact", ",.0f"),
    "of limit ": ("exact_share", ".0%"),
    "price": ("exact_price", ".2f"),
    "transformers": ("transformers", ",.0f"),
    "fast/transformers": ("fast_to_transformers", ".2f"),
}


def print_table(report: dict[str, Any]) -> None:
    best, law = report["best"], report["row_law"]
    print(f"{report['device']}, torch {torch.__version__}, shape {report['shape']}")
    print(f"measured: {best['flops'] / 1e12:.1f} TFLOP/s in bf16, {best['bytes_per_s'] / 1e9:.1f} GB/s; tokens/s below")
    lines = [list(COLUMNS)]
    for row in report["rows"]:
        lines.append([format(row[key], form) if key in row else "-" for key, form in COLUMNS.values()])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"same bits alone, among others and in chunks: exact {law['exact']}, fast {law['fast']}")
    for mode, found in report["parity"].items():
        difference, equal = found["max_logit_difference"], found["tokens_equal"]
        print(f"{mode} in float32 against the CPU: logits differ by {difference:.1e}, greedy tokens equal: {equal}")
    for text in lines_of(report["experts"], report["shape"]):
        print(text)
    if report["skipped"]:
        print(report["skipped"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that everything runs")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--no-transformers", action="store_true", help="leave the comparison out")
    parser.add_argument("--threads", type=int, help="of the CPU")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"no CUDA device: torch {torch.__version__} sees none (try --device cpu --tiny)", file=sys.stderr)
        return 2
    shape, work = ("tiny", TINY) if args.tiny else ("8b", Work())
    spec, device = parse_config(SHAPES[shape]), args.device
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "shape": shape, "skipped": ""}
    report |= {"best": card(device, work), "parity": parity(device), "row_law": {}}
    speeds: dict[str, Speeds] = {}
    for mode in ("fast", "exact"):
        ops = CudaOps(torch.bfloat16, device, exact=mode == "exact")
        decoder = build(spec, ops, device, RandomTensors(device, torch.bfloat16))
        report["row_law"][mode] = row_law(decoder, min(work.prompt, 300))
        speeds[mode] = measure(decoder, work, device)
        del decoder, ops
        free(device)
    if not args.no_transformers:
        try:
            speeds["transformers"] = measure_transformers(SHAPES[shape], spec, work, device)
        except ImportError as error:
            report["skipped"] = f"not compared with transformers: {error}"
    modes: dict[str, Ops] = {m: CudaOps(torch.bfloat16, device, exact=m == "exact") for m in ("fast", "exact")}
    report["experts"] = measure_experts(
        shape, modes, report["best"], device, lambda layer: median_seconds(layer, work.repeats, device)
    )
    report["rows"] = list(rows_of(spec, report["best"], work, speeds))
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def free(device: str) -> None:
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
