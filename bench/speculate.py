"""What speculation is worth: `python bench/speculate.py [--model DIR] [--draft-model DIR]`.

Tokens per second of single streams with and without, over a text that repeats itself and one that does not, greedy and
drawn. Without `--draft-model` the draft model is a copy of the model whose weights have noise in them: as large, so
that its speed says nothing, but its drafts are accepted about as often as those of a good small model. "greedy drafts"
are those of a draft model that takes its likeliest token where the model draws.

Prints a table in Markdown. With `--threads 1` the seconds are the process's own, so that a busy machine does not
matter.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from cluster.config import bundled_model
from workers.engine import EngineConfig, EngineStats, Request, Sampling
from workers.engine.build import build_engine
from workers.engine.core import EngineCore
from workers.engine.drafts import GREEDY, Ask, Proposer

LIST = "".join(
    f"{day}: the shop is open from nine to five.\n" for day in ("Monday", "Tuesday", "Wednesday", "Thursday")
)
TEXTS = {
    "repeating": LIST * 2 + "Monday:",
    "plain": "Once upon a time there was a small fox who lived at the edge of the forest.",
}
WAYS = ("none", "ngram", "draft", "greedy drafts")


class GreedyDrafts:
    """A proposer that drafts the likeliest tokens, however the model draws."""

    def __init__(self, model: Proposer) -> None:
        self.model = model
        self.forget, self.close = model.forget, model.close

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        return self.model.propose([replace(ask, sampling=GREEDY) for ask in asks])


def noisy_copy(model: Path, folder: Path, noise: float) -> Path:
    """The checkpoint with normal noise of `noise` standard deviations of each matrix in it."""
    generator = torch.Generator().manual_seed(0)
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(model / file, folder / file)
    for file in model.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.dim() > 1:
                values = tensor.float()
                values += noise * values.std() * torch.randn(values.shape, generator=generator)
                tensors[name] = values.to(tensor.dtype)
        save_file(tensors, folder / file.name)
    return folder


def measure(engine: EngineCore, requests: list[Request], own: bool) -> tuple[float, EngineStats]:
    """Tokens per second (`own`: of this process), one request after the other, and what the engine counted."""
    clock = time.process_time if own else time.perf_counter
    before = msgspec.structs.replace(engine.stats())
    start = clock()
    for request in requests:
        engine.add(request)
        while engine.has_work():
            engine.step()
    seconds = clock() - start
    after = engine.stats()
    counts = {f: getattr(after, f) - getattr(before, f) for f in EngineStats.__struct_fields__}
    return counts["generated_tokens"] / seconds, EngineStats(**counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--draft-model", type=Path, default=None)
    parser.add_argument("--noise", type=float, default=0.05)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    model, own = options.model or bundled_model(), options.threads == 1
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    print("| text | temperature | drafts | tokens/s | tokens per step | drafted | accepted |")
    print("|---|---|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        draft = options.draft_model or noisy_copy(model, Path(folder), options.noise)
        for way in WAYS:
            config = EngineConfig(
                str(model),
                cache_bytes=1 << 26,
                threads=options.threads,
                prefix_cache=False,
                speculate="draft" if way == "greedy drafts" else way,
                draft_model_dir=str(draft) if way in ("draft", "greedy drafts") else None,
                draft_tokens=options.draft_tokens,
            )
            engine = build_engine(config)
            if way == "greedy drafts" and engine._proposer is not None:
                engine._proposer = GreedyDrafts(engine._proposer)
            measure(engine, [Request("warm-up", [1, 2, 3], 8)], own)
            for name, text in TEXTS.items():
                prompt = tokenizer.encode(text).ids
                for temperature in (0.0, 0.7):
                    requests = [
                        Request(f"r{i}", prompt, options.tokens, Sampling(temperature=temperature, seed=i))
                        for i in range(options.streams if temperature else 1)
                    ]
                    speed, stats = measure(engine, requests, own)
                    share = f"{stats.accepted_tokens / stats.drafted_tokens:.0%}" if stats.drafted_tokens else "-"
                    per_step = stats.generated_tokens / stats.steps
                    print(
                        f"| {name} | {temperature} | {way} | {speed:,.0f} | {per_step:.2f} | "
                        f"{stats.drafted_tokens} | {share} |"
                    )
            engine.close()


if __name__ == "__main__":
    main()
