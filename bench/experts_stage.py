"""The checkpoint, the expert hosts and the loads of `bench/experts.py`."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "understudy" / "bench"
SHAPE = {
    "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "vocab_size": 8192, "hidden_size": 1024,
    "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_experts": 64, "num_experts_per_tok": 8, "max_position_embeddings": 1024, "norm_topk_prob": False,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "eos_token_id": None,
}  # fmt: skip
SIZES: dict[str, dict[str, int]] = {
    "small": {},
    "olmoe": {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 2},  # its config.json has 16
}


def write_checkpoint(path: Path) -> None:
    """Random weights, tensor by tensor, unless they are there."""
    if (path / "model.safetensors").is_file():
        return
    import torch

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPE))
    h, f, v = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h)}
    shapes["model.norm.weight"] = (h,)
    for i in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{i}"
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        shapes |= {f"{at}.{name}.weight": (h,) for name in norms}
        shapes |= {f"{at}.self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
        shapes[f"{at}.mlp.gate.weight"] = (SHAPE["num_experts"], h)
        for e in range(SHAPE["num_experts"]):
            expert = f"{at}.mlp.experts.{e}"
            shapes |= {f"{expert}.gate_proj.weight": (f, h), f"{expert}.up_proj.weight": (f, h)}
            shapes[f"{expert}.down_proj.weight"] = (h, f)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        size = 2 * int(torch.Size(shape).numel())
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    draw = torch.Generator().manual_seed(0)
    print(f"writing a random checkpoint of {end / 2e6:.0f} M parameters to {path}", file=sys.stderr)
    with (path / "writing").open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=draw) * shape[1] ** -0.5
            out.write(values.bfloat16().view(torch.uint8).numpy().tobytes())
    os.replace(path / "writing", path / "model.safetensors")


class Hosts:
    """Expert hosts as processes of their own."""

    def __init__(self, checkpoint: Path, count: int, threads: int, secret: str) -> None:
        import msgspec

        from workers.experts.placement import HostReport
        from workers.experts.process import HostPlan

        self._report = HostReport
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "workers.experts.process", "127.0.0.1"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
            )
            for _ in range(count)
        ]  # fmt: skip
        for i, process in enumerate(self.processes):
            plan = HostPlan(str(checkpoint), f"h{i}", 1, secret, threads=threads)
            process.stdin.write(msgspec.json.encode(plan) + b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        self.addresses = []
        for process in self.processes:
            report, _, said = msgspec.json.decode(
                process.stdout.readline(),
                type=tuple[HostReport | None, str, str],  # type: ignore[union-attr]
            )
            if report is None:
                raise RuntimeError(said)
            self.addresses.append(report.address)

    def tell(self, host: int, *order: Any) -> Any:
        """An order, and what the host then reports."""
        import msgspec

        process = self.processes[host]
        process.stdin.write(msgspec.json.encode(order) + b"\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return msgspec.json.decode(process.stdout.readline(), type=self._report)  # type: ignore[union-attr]

    def hold(self, host: int, places: Sequence[tuple[int, int]]) -> None:
        """Has a host load experts and waits for it."""
        report = self.tell(host, "hold", places)
        while report.held < report.asked:
            time.sleep(0.05)
            report = self.tell(host, "report")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def run_b16(
    engine: Any, tag: str, out: int = 64, at_step_20: Callable[[], None] = lambda: None
) -> tuple[float, list[float], list[list[int]]]:
    """(tokens per second after the first, seconds of each step, the tokens) of 16 sequences."""
    from workers.engine.contract import Request, Sampling

    dice = random.Random(0)
    for i in range(16):
        prompt = [dice.randrange(8192) for _ in range(16)]
        engine.add(Request(f"{tag}-{i}", prompt, out, Sampling(temperature=0.0), bypass_prefix_cache=True))
    made: dict[str, list[int]] = {}
    steps = []
    while engine.has_work():
        if len(steps) == 20:
            at_step_20()
        begin = time.perf_counter()
        for output in engine.step():
            made.setdefault(output.id, []).extend(output.token_ids)
        steps.append(time.perf_counter() - begin)
    return 16 * (len(steps) - 1) / sum(steps[1:]), steps, [made[f"{tag}-{i}"] for i in range(16)]


def run_prompts(engine: Any, tag: str) -> tuple[float, list[list[int]]]:
    """(prompt tokens per second, the tokens) of four prompts of 1,000 tokens."""
    from workers.engine.contract import Request, Sampling

    dice = random.Random(0)
    for i in range(4):
        prompt = [dice.randrange(8192) for _ in range(1000)]
        engine.add(Request(f"{tag}-{i}", prompt, 1, Sampling(temperature=0.0), bypass_prefix_cache=True))
    made: dict[str, list[int]] = {}
    begin = time.perf_counter()
    while engine.has_work():
        for output in engine.step():
            made.setdefault(output.id, []).extend(output.token_ids)
    return 4000 / (time.perf_counter() - begin), [made[f"{tag}-{i}"] for i in range(4)]
