"""Our engine beside its peers on the same work, in one run on one machine, each program alone in its own process.

    python bench/engine.py                                  # us and, where installed, transformers
    python bench/engine.py --vllm-python VENV/bin/python --llama-cpp DIR --llama-gguf FILE
    python bench/engine.py --inexact                        # and the price of exactness

The work: a checkpoint of Qwen2.5-0.5B's shape with random bf16 weights (494 M parameters; made on the first run),
greedy, nothing ends early, prompts of random token ids:

    prefill    one prompt of 1,024 tokens, 1 token out: prompt tokens per second
    b1, b16    1 or 16 sequences, 16 tokens in, 64 more out: output tokens per second in all, the first token taken off
    mix        16 requests at once, 256 in, 64 out: output tokens per second, prefill included

`--inexact` also runs our engine over torch's own calls (packed linears, scaled_dot_product_attention), which do not
keep one order of summation: what exactness costs is what they gain.

Prints ratios to every peer and the share of the limit: what this machine could do if every step read each weight once
at the measured bandwidth or did each multiplication once at the measured rate, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MEASURES = ("prefill", "b1", "b16", "mix")
VOCABULARY = range(1000, 100_000)  # of the prompts
ROOT = Path(__file__).resolve().parent.parent
Generate = Callable[[list[list[int]], int], float]  # (prompts, tokens to make) -> seconds


@dataclass
class Shape:
    """What the limit needs to know of a checkpoint."""

    parameters: int
    embedding: int  # parameters of the embedding, which is also the head
    bytes: int


# What every program does.


def measure(generate: Generate, repeat: int) -> dict[str, float]:
    """Tokens per second of the four measures, the best of `repeat` runs each."""
    dice = random.Random(0)

    def seconds(count: int, length: int, out: int) -> float:
        def prompts() -> list[list[int]]:
            return [[dice.choice(VOCABULARY) for _ in range(length)] for _ in range(count)]

        return min(generate(prompts(), out) for _ in range(repeat))

    generate([[dice.choice(VOCABULARY) for _ in range(16)]], 4)  # warms up
    result = {"prefill": 1024 / seconds(1, 1024, 1)}
    for name, count in (("b1", 1), ("b16", 16)):
        result[name] = 64 * count / (seconds(count, 16, 65) - seconds(count, 16, 1))
    result["mix"] = 16 * 64 / seconds(16, 256, 64)
    return result


def child_ours(checkpoint: str, repeat: int, threads: int | None, dtype: str) -> dict[str, Any]:
    from workers.engine import EngineConfig, FinishReason, Request, Sampling
    from workers.engine.build import build_engine

    engine = build_engine(
        EngineConfig(checkpoint, dtype=dtype, max_context=2048, max_running=16, threads=threads, prefix_cache=False)
    )
    forward = engine._runner.run
    inside, steps = 0.0, 0

    def timed(plan: Any) -> Any:
        nonlocal inside, steps
        start = time.perf_counter()
        logits = forward(plan)
        inside, steps = inside + time.perf_counter() - start, steps + 1
        return logits

    engine._runner.run = timed  # type: ignore[method-assign]

    def generate(prompts: list[list[int]], out: int) -> float:
        start = time.perf_counter()
        for i, prompt in enumerate(prompts):
            engine.add(Request(str(i), prompt, out, Sampling(temperature=0)))
        while engine.has_work():
            for output in engine.step():
                if output.finish not in (None, FinishReason.LENGTH):
                    raise RuntimeError(f"sequence {output.id} ended with {output.finish!r}: {output.error}")
        return time.perf_counter() - start

    result: dict[str, Any] = dict(measure(generate, repeat))
    for name, count in (("b1", 1), ("b16", 16)):
        inside, steps = 0.0, 0
        whole = generate([[1000 + i] * 16 for i in range(count)], 64)
        result[f"overhead_ms_{name}"] = 1000 * (whole - inside) / steps
    result["version"] = engine.info.numerics_id
    engine.check_idle()
    engine.close()
    return result


def child_inexact(checkpoint: str, repeat: int, threads: int | None, dtype: str) -> dict[str, Any]:
    """Ours, with torch's own calls in place of kernels that keep the row law."""
    import torch

    from workers.engine import runner
    from workers.kernels.cuda import CudaOps

    if threads:
        torch.set_num_threads(threads)
    runner.make_ops = lambda name, *_: CudaOps(getattr(torch, name), "cpu", exact=False)
    return child_ours(checkpoint, repeat, threads, dtype)


def child_transformers(checkpoint: str, repeat: int, threads: int | None, dtype: str) -> dict[str, Any]:
    import torch
    import transformers

    if threads:
        torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], out: int) -> float:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": out, "min_new_tokens": out, "do_sample": False, "pad_token_id": 0}
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(ids, attention_mask=torch.ones_like(ids), eos_token_id=None, **options)
        elapsed = time.perf_counter() - start
        if made.shape[1] != ids.shape[1] + out:
            raise RuntimeError(f"transformers made {made.shape[1] - ids.shape[1]} tokens instead of {out}")
        return elapsed

    return {**measure(generate, repeat), "version": f"transformers {transformers.__version__}"}


def child_vllm(checkpoint: str, repeat: int, threads: int | None, dtype: str) -> dict[str, Any]:
    cores = threads or len(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{cores - 1}")
    import vllm

    llm = vllm.LLM(
        model=checkpoint,
        skip_tokenizer_init=True,
        dtype=dtype,
        max_model_len=2048,
        enable_prefix_caching=False,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        enforce_eager=True,
    )

    def generate(prompts: list[list[int]], out: int) -> float:
        options = vllm.SamplingParams(max_tokens=out, temperature=0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], options, use_tqdm=False)
        return time.perf_counter() - start

    return {**measure(generate, repeat), "version": f"vllm {vllm.__version__}"}


def child_limit(_checkpoint: str, repeat: int, threads: int | None, _dtype: str) -> dict[str, Any]:
    """Bytes per second of reading memory, and bf16 operations per second of a large product."""
    import torch

    if threads:
        torch.set_num_threads(threads)

    def best(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(3 * repeat):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times)

    data = torch.ones(1 << 28)
    bandwidth = data.nbytes / best(data.sum)
    del data
    n, flops = 4096, {}
    for dtype in (torch.bfloat16, torch.float32):  # a CPU without bf16 instructions multiplies faster in float32
        a, b = torch.randn(512, n).to(dtype), torch.randn(n, n).to(dtype)
        with torch.inference_mode():
            flops[str(dtype)] = 2 * 512 * n * n / best(lambda a=a, b=b: torch.nn.functional.linear(a, b))
    fastest = max(flops, key=flops.__getitem__)
    return {
        "bandwidth": bandwidth,
        "flops": flops[fastest],
        "flops_in": fastest.removeprefix("torch."),
        "version": f"torch {torch.__version__}",
    }


CHILDREN = {
    "ours": child_ours,
    "inexact": child_inexact,
    "transformers": child_transformers,
    "vllm": child_vllm,
    "limit": child_limit,
}


# What the parent does.


def run_child(name: str, args: argparse.Namespace, python: str = sys.executable) -> dict[str, Any]:
    """Runs one program alone and returns what it measured. Raises RuntimeError with its output when it fails."""
    command = [python, str(Path(__file__).resolve()), "--child", name, "--repeat", str(args.repeat)]
    command += ["--checkpoint", str(args.checkpoint), "--dtype", args.dtype]
    if args.threads:
        command += ["--threads", str(args.threads)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} if name in ("ours", "inexact") else None
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(
            f"{name} failed with status {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def run_llama_cpp(args: argparse.Namespace) -> dict[str, Any]:
    """The four measures by llama.cpp's own programs; `mix` by its batched benchmark, prompts not shared."""
    threads = ["-t", str(args.threads or len(os.sched_getaffinity(0)))]

    def call(program: str, *options: str) -> str:
        command = [str(args.llama_cpp / program), "-m", str(args.llama_gguf), *threads, *options]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def bench(prompt: int, out: int) -> float:
        rows = json.loads(call("llama-bench", "-p", str(prompt), "-n", str(out), "-r", str(args.repeat), "-o", "json"))
        return float(rows[0]["avg_ts"])

    def batched(prompt: int, out: int) -> dict[str, Any]:
        sizes = ["-npp", str(prompt), "-ntg", str(out), "-npl", "16", "-c", str(16 * (prompt + out))]
        text = call("llama-batched-bench", *sizes, "--output-format", "jsonl")
        row: dict[str, Any] = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
        return row

    return {
        "prefill": bench(1024, 0),
        "b1": bench(0, 64),
        "b16": float(batched(16, 64)["speed_tg"]),
        "mix": 16 * 64 / float(batched(256, 64)["t"]),
        "version": "llama.cpp",
    }


def make_checkpoint(path: Path) -> None:
    """Writes the random checkpoint unless it is there."""
    if (path / "model.safetensors").is_file():
        return
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    print(f"writing a random checkpoint of 494 M parameters (988 MB) to {path}", file=sys.stderr)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
    }
    config = Qwen2Config(**sizes, rope_theta=1e6, tie_word_embeddings=True, rms_norm_eps=1e-6, dtype="bfloat16")
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    part = path.with_name(path.name + ".part")
    model.save_pretrained(part)
    part.rename(path)


def shape_of(path: Path) -> Shape:
    """Reads only the header of the checkpoint's one safetensors file."""
    with (path / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    sizes = {k: v["data_offsets"][1] - v["data_offsets"][0] for k, v in header.items() if k != "__metadata__"}
    total = sum(sizes.values())
    return Shape(total // 2, sizes["model.embed_tokens.weight"] // 2, total)


def limits(shape: Shape, bandwidth: float, flops: float) -> dict[str, float]:
    """Tokens per second if nothing took time but reading each weight once a step or multiplying, whichever is longer.

    A prompt token costs 2 operations per parameter without the head, an output token 2 per parameter. Attention and
    the cache's own traffic are left out: at these lengths they are below 3 %.
    """
    body = shape.parameters - shape.embedding
    read = shape.bytes / bandwidth

    def step(rows: int) -> float:
        return max(read, 2 * shape.parameters * rows / flops)

    prompts = 2 * (16 * 256 * body + 16 * shape.embedding) / flops
    return {
        "prefill": 1024 / (2 * (1024 * body + shape.embedding) / flops),
        "b1": 1 / step(1),
        "b16": 16 / step(16),
        "mix": 16 * 64 / (prompts + 63 * step(16)),
    }


def table(results: dict[str, dict[str, Any]], limit: dict[str, float]) -> str:
    """Markdown: tokens per second, our ratio to every peer, our share of the limit."""
    ours = results["ours"]
    lines = ["| | " + " | ".join(MEASURES) + " |", "|---|" + "---:|" * len(MEASURES)]
    for name, result in results.items():
        lines.append(f"| {name}, tokens/s | " + " | ".join(f"{result[m]:.1f}" for m in MEASURES) + " |")
    lines.append("| limit, tokens/s | " + " | ".join(f"{limit[m]:.1f}" for m in MEASURES) + " |")
    for name, result in results.items():
        if name != "ours":
            lines.append(f"| ours / {name} | " + " | ".join(f"{ours[m] / result[m]:.2f}" for m in MEASURES) + " |")
    lines.append("| ours / limit | " + " | ".join(f"{ours[m] / limit[m]:.0%}" for m in MEASURES) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were taken on; `load` tells whether we were alone."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((s.split(":")[1].strip() for s in info.read_text().splitlines() if s.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[0]}


def command(args: argparse.Namespace) -> str:
    """The command of this run, with words in place of this machine's paths."""
    flags = [f"--repeat {args.repeat}"] if args.repeat != 3 else []
    flags += [f"--dtype {args.dtype}"] if args.dtype != "bfloat16" else []
    flags += [f"--threads {args.threads}"] if args.threads else []
    flags += ["--inexact"] if args.inexact else []
    flags += ["--vllm-python VENV/bin/python"] if args.vllm_python else []
    flags += ["--llama-cpp DIR --llama-gguf FILE"] if args.llama_cpp else []
    return " ".join(["python bench/engine.py", *flags])


def parse() -> argparse.Namespace:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "understudy" / "bench"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=cache / "qwen2.5-0.5b-random")
    parser.add_argument("--peers", default="transformers", help="in-process peers, separated by commas; '' for none")
    parser.add_argument("--inexact", action="store_true", help="our engine over torch's own, inexact calls as well")
    parser.add_argument("--vllm-python", help="python of a virtual environment that has vLLM")
    parser.add_argument("--llama-cpp", type=Path, help="directory of llama-bench and llama-batched-bench")
    parser.add_argument("--llama-gguf", type=Path, help="the same checkpoint as GGUF in bf16")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of computation; llama.cpp: its file's"
    )
    parser.add_argument("--threads", type=int, help="of computation; default: each program's own choice")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each measure, of which the best counts")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="where the figures are written")
    parser.add_argument("--child", choices=sorted(CHILDREN), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if bool(args.llama_cpp) != bool(args.llama_gguf):
        parser.error("--llama-cpp and --llama-gguf go together")
    if unknown := set(filter(None, args.peers.split(","))) - {"transformers"}:
        parser.error(f"--peers: {', '.join(sorted(unknown))} unknown; vLLM and llama.cpp have flags of their own")
    return args


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps(CHILDREN[args.child](str(args.checkpoint), args.repeat, args.threads, args.dtype)))
        return
    make_checkpoint(args.checkpoint)
    where = machine()
    if where["load"] > 0.5:
        print(
            f"warning: load {where['load']:.1f}: something else runs here; only the ratios mean much", file=sys.stderr
        )
    programs: dict[str, Callable[[], dict[str, Any]]] = {"ours": lambda: run_child("ours", args)}
    for peer in filter(None, args.peers.split(",")):
        programs[peer] = lambda peer=peer: run_child(peer, args)  # type: ignore[misc]
    if args.inexact:
        programs["inexact"] = lambda: run_child("inexact", args)
    if args.vllm_python:
        programs["vllm"] = lambda: run_child("vllm", args, args.vllm_python)
    if args.llama_cpp:
        programs["llama.cpp"] = lambda: run_llama_cpp(args)
    machine_limit = run_child("limit", args)
    results = {}
    for name, program in programs.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            results[name] = program()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            if name == "ours":
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
    shape = shape_of(args.checkpoint)
    if args.dtype == "float32":
        shape.bytes *= 2
    limit = limits(shape, machine_limit["bandwidth"], machine_limit["flops"])
    about = (
        f"{where['cpu']}, {where['cores']} cores, load {where['load']:.1f} at the start; reads "
        f"{machine_limit['bandwidth'] / 1e9:.1f} GB/s, multiplies {machine_limit['flops'] / 1e9:.0f} GFLOP/s in "
        f"{machine_limit['flops_in']}. "
        f"Ours outside the forward: {results['ours']['overhead_ms_b1']:.2f} ms a step at b1, "
        f"{results['ours']['overhead_ms_b16']:.2f} at b16."
    )
    text = f"{table(results, limit)}\n\n{about}\n"
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    record = {"machine": where, "shape": asdict(shape), "limit": {**machine_limit, **limit}, "results": results}
    (args.out / "engine.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "engine.md").write_text(f"# bench/engine.py\n\nMade by `{command(args)}`.\n\n{text}")


if __name__ == "__main__":
    main()
