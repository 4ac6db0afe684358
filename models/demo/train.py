"""Trains the bundled model on a folder of text and on generated sentences.

    python train.py --text TEXT_DIR --work WORK_DIR --minutes 75

``WORK_DIR`` keeps the tokenizer, the training state (so that the same command goes on after a stop) and the log.
``--out`` writes a Hugging Face checkpoint whenever the state is saved.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import corpus
from bpe import train_tokenizer
from export import export
from model import Decoder, Shape
from sentences import make_documents

MIX = {"storybooks": 0.2, "books": 0.55, "sentences": 0.25}  # share of the rows in a step
AT_START = {"storybooks": 0.4, "books": 0.02, "sentences": 1.0}  # share of the rows that begin a document


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for weights [..., rows, columns]."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @staticmethod
    def orthogonal(g: Tensor, rounds: int = 5) -> Tensor:
        """Newton-Schulz: g [..., R, C] -> a matrix with the same singular vectors and singular values near one."""
        x = g.bfloat16()
        flip = x.shape[-2] > x.shape[-1]
        x = x.mT if flip else x
        x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
        for _ in range(rounds):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.mT if flip else x).to(g.dtype)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                m = state["m"].lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonal(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(p.shape[-2:])))


def optimizers(model: Decoder, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, routers and norms."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        inside = name.startswith("layers.") and p.dim() > 1 and "gate" not in name
        (matrices if inside else rest).append(p)
    return [
        Muon(matrices, lr=lr, decay=0.1),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def lr_scale(progress: float, warm: float = 0.01) -> float:
    """Linear warm-up, then a cosine down to 2 %."""
    if progress < warm:
        return max(progress / warm, 0.02)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))


def batches(train: dict[str, corpus.Stream], rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Token rows [rows, length + 1], mixed from the sources, without end."""
    rng = np.random.default_rng(seed)
    while True:
        picks = rng.choice(len(MIX), rows, p=list(MIX.values()))
        parts = [
            train[name].rows(rng, int((picks == i).sum()), length, AT_START[name])
            for i, name in enumerate(MIX) if (picks == i).any()
        ]
        yield torch.from_numpy(np.concatenate(parts))


@torch.no_grad()
def evaluate(model: Decoder, held: dict[str, corpus.Stream], length: int, most: int = 128) -> dict[str, dict[str, float]]:
    """Nats per token and bits per byte of every held-out stream, and the share of choices of each expert."""
    model.eval()
    result = {}
    for name, stream in held.items():
        count = min((len(stream.tokens) - 1) // length, most)
        total, loads = 0.0, 0.0
        for first in range(0, count, 16):
            rows = np.stack([
                stream.tokens[i * length:(i + 1) * length + 1] for i in range(first, min(first + 16, count))
            ]).astype(np.int64)
            tokens = torch.from_numpy(rows)
            nll, _, share = model.loss(tokens[:, :-1], tokens[:, 1:])
            total += nll.sum().item()
            loads = loads + share * len(rows)
        nats = total / (count * length)
        per_byte = len(stream.tokens) / stream.text_bytes
        shares = (loads / count).tolist()
        result[name] = {"nats_per_token": nats, "bits_per_byte": nats * per_byte / math.log(2), "load": shares}
    model.train()
    return result


def load_tokenizer(work: Path, text: Path, vocab: int) -> Tokenizer:
    """The tokenizer of this run, trained on the first call."""
    path = work / "tokenizer.json"
    if not path.exists():
        documents = corpus.read_documents(text)
        texts = [*documents["storybooks"] * 2, *documents["books"], *make_documents(3, 10_000)]
        train_tokenizer(texts, vocab).save(str(path))
    return Tokenizer.from_file(str(path))


def save(path: Path, model: Decoder, opts: list[torch.optim.Optimizer], step: int, spent: float) -> None:
    state = {"model": model.state_dict(), "opts": [o.state_dict() for o in opts], "step": step, "spent": spent}
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with the training text")
    parser.add_argument("--work", type=Path, required=True, help="folder for state, tokenizer and log")
    parser.add_argument("--out", type=Path, help="folder for the Hugging Face checkpoint")
    parser.add_argument("--minutes", type=float, default=75.0, help="training time; the schedule follows it")
    parser.add_argument("--steps", type=int, default=1_000_000, help="most steps")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--start-from", type=Path, help="take weights, but no optimizer state, from this state")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations and saves")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    log_file = (args.work / "train.log").open("a", encoding="utf-8", buffering=1)

    def log(**fields: object) -> None:
        line = json.dumps(fields)
        print(line, flush=True)
        log_file.write(line + "\n")

    shape = Shape()
    tokenizer = load_tokenizer(args.work, args.text, shape.vocab)
    train, held = corpus.load_streams(args.text, tokenizer, sentences=60_000)
    log(event="data", tokens={k: len(v.tokens) for k, v in train.items()}, held={k: len(v.tokens) for k, v in held.items()})
    model = Decoder(shape).train()
    opts = optimizers(model, args.lr)
    state_path = args.work / "state.pt"
    step, spent = 0, 0.0
    if state_path.exists():
        state = torch.load(state_path)
        model.load_state_dict(state["model"])
        for o, s in zip(opts, state["opts"], strict=True):
            o.load_state_dict(s)
        step, spent = state["step"], state["spent"]
    elif args.start_from:
        model.load_state_dict(torch.load(args.start_from)["model"])
    log(event="start", step=step, parameters=sum(p.numel() for p in model.parameters()))

    @torch.compile(dynamic=False)
    def forward(tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [rows, length + 1] -> mean loss, balance loss."""
        with torch.autocast("cpu", torch.bfloat16):
            nll, balance, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        return nll.mean(), balance

    def checkpoint() -> None:
        save(state_path, model, opts, step, spent)
        result = evaluate(model, held, args.length)
        short = {k: {a: round(b, 4) for a, b in v.items() if a != "load"} for k, v in result.items()}
        log(event="eval", step=step, minutes=round(spent / 60, 2), **short)
        if args.out:
            export(model, tokenizer, args.out, corpus.read_attribution(args.text))
        (args.work / "eval.json").write_text(json.dumps({"step": step, "minutes": spent / 60, **result}, indent=1))

    mean, source = 0.0, batches(train, args.rows, args.length, args.seed + step)
    last = time.monotonic()
    while step < args.steps and spent < args.minutes * 60:
        progress = min(max(step / args.steps, spent / (args.minutes * 60)), 1.0)
        nll, balance = forward(next(source))
        (nll + 0.01 * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            for group in o.param_groups:
                group["lr"] = args.lr * lr_scale(progress)
            o.step()
        model.zero_grad(set_to_none=True)
        step += 1
        mean = nll.item() if not mean else 0.95 * mean + 0.05 * nll.item()
        now = time.monotonic()
        spent, took, last = spent + now - last, now - last, now
        if step % 20 == 0:
            log(step=step, minutes=round(spent / 60, 2), loss=round(mean, 4), balance=round(balance.item(), 3),
                lr=round(opts[0].param_groups[0]["lr"], 6), tokens_per_s=round(args.rows * args.length / took))
        if step % args.every == 0:
            checkpoint()
            last = time.monotonic()
    checkpoint()


if __name__ == "__main__":
    main()
