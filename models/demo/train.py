"""Trains the bundled model on a folder of text and on generated sentences.

    python train.py --text TEXT_DIR --work WORK_DIR --minutes 75

``WORK_DIR`` keeps the tokenizer, the training state (the same command goes on after a stop) and the log; it lies
outside the repository. ``--out`` writes a Hugging Face checkpoint whenever the state is saved. With ``--workers``
above one, processes of one thread each share every step's rows; stopping the first process pauses all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import corpus
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bpe import train_tokenizer
from chats import make_documents
from export import export, load_weights
from model import FAST, Decoder, Shape
from optim import lr_scale, optimizers
from tokenizers import Tokenizer
from torch import Tensor, nn

MIX = {"storybooks": 0.2, "books": 0.55, "sentences": 0.25}  # share of the rows in a step
AT_START = {"storybooks": 0.4, "books": 0.02, "sentences": 1.0}  # share of the rows that begin a document
SENTENCES = 60_000  # generated documents
BALANCE = 0.02  # weight of the load-balancing loss


def batches(train: dict[str, corpus.Stream], rows: int, length: int, seed: list[int]) -> Iterator[Tensor]:
    """Token rows [rows, length + 1], mixed from the sources, without end."""
    rng = np.random.default_rng(seed)
    while True:
        picks = rng.choice(len(MIX), rows, p=list(MIX.values()))
        parts = [
            train[name].rows(rng, int((picks == i).sum()), length, AT_START[name])
            for i, name in enumerate(MIX)
            if (picks == i).any()
        ]
        yield torch.from_numpy(np.concatenate(parts))


@torch.no_grad()
def evaluate(model: Decoder, held: dict[str, corpus.Stream], length: int, most: int) -> dict[str, dict[str, object]]:
    """Nats per token and bits per byte of every held-out stream (its first ``most`` rows), and the share of
    choices that each expert of each layer gets."""
    model.eval()
    result: dict[str, dict[str, object]] = {}
    for name, stream in held.items():
        count = min((len(stream.tokens) - 1) // length, most)
        total, loads = 0.0, torch.zeros(model.s.layers, model.s.experts)
        for first in range(0, count, 8):
            picked = range(first, min(first + 8, count))
            rows = np.stack([stream.tokens[i * length : (i + 1) * length + 1] for i in picked])
            tokens = torch.from_numpy(rows.astype(np.int64))
            nll, _, share = model.loss(tokens[:, :-1], tokens[:, 1:])
            total += nll.sum().item()
            loads += share * len(rows)
        nats = total / (count * length)
        per_byte = len(stream.tokens) / stream.text_bytes
        result[name] = {
            "nats_per_token": round(nats, 4),
            "bits_per_byte": round(nats * per_byte / math.log(2), 4),
            "load": [[round(x, 4) for x in row] for row in (loads / count).tolist()],
        }
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
    """Write the training state atomically."""
    state = {
        "model": model.state_dict(),
        "opts": [o.state_dict() for o in opts],
        "step": step,
        "spent": spent,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def share_gradients(params: list[nn.Parameter], progress: float, workers: int) -> float:
    """Average the gradients over all workers; returns the first worker's ``progress`` on every worker."""
    grads = [p.grad for p in params if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([progress])])
    dist.all_reduce(flat)
    for g, piece in zip(grads, flat[:-1].split([g.numel() for g in grads]), strict=True):
        g.copy_(piece.view_as(g) / workers)
    return flat[-1].item()


def run(rank: int, args: argparse.Namespace) -> None:
    """One worker's training loop."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    first = rank == 0
    if args.workers > 1:
        meeting = f"file://{args.work.resolve()}/meeting"
        dist.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=args.workers, timeout=timedelta(hours=12)
        )

    def log(**fields: object) -> None:
        if first:
            with (args.work / "train.log").open("a", encoding="utf-8") as file:
                file.write(json.dumps(fields) + "\n")

    shape = Shape()
    tokenizer = load_tokenizer(args.work, args.text, shape.vocab)
    train, held = corpus.load_streams(args.text, tokenizer, SENTENCES)
    log(
        event="data",
        tokens={k: len(v.tokens) for k, v in train.items()},
        held={k: len(v.tokens) for k, v in held.items()},
    )
    model = Decoder(shape).train()
    params = list(model.parameters())
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
        if args.start_from.suffix == ".safetensors":
            load_weights(model, args.start_from)
        else:
            model.load_state_dict(torch.load(args.start_from)["model"])
    log(event="start", step=step, parameters=sum(p.numel() for p in params))

    @torch.compile(dynamic=False)
    def forward(tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [rows, length + 1] -> mean loss, balance loss."""
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST is torch.bfloat16):
            nll, balance, _ = model.loss(tokens[:, :-1], tokens[:, 1:])
        return nll.mean(), balance

    def checkpoint(most: int = 32) -> None:
        if not first:
            return
        save(state_path, model, opts, step, spent)
        result = evaluate(model, held, args.length, most)
        short = {k: {a: b for a, b in v.items() if a != "load"} for k, v in result.items()}
        log(event="eval", step=step, minutes=round(spent / 60, 2), **short)
        report = {"step": step, "minutes": round(spent / 60, 2), **result}
        (args.work / "eval.json").write_text(json.dumps(report))
        if args.out:
            export(model, tokenizer, args.out, corpus.read_attribution(args.text))

    def measure() -> float:
        return max(step / args.steps, spent / (args.minutes * 60))

    source = batches(train, args.rows, args.length, [args.seed, step, rank])
    progress = measure()
    mean, last = 0.0, time.monotonic()
    while progress < 1:
        nll, balance = forward(next(source))
        (nll + BALANCE * balance).backward()
        if args.workers > 1:
            progress = share_gradients(params, measure() if first else 0.0, args.workers)
        nn.utils.clip_grad_norm_(params, 1.0)
        for o in opts:
            for group in o.param_groups:
                group["lr"] = args.lr * lr_scale(min(progress, 1.0))
            o.step()
        model.zero_grad(set_to_none=True)
        step += 1
        mean = nll.item() if not mean else 0.95 * mean + 0.05 * nll.item()
        now = time.monotonic()
        spent, took, last = spent + now - last, now - last, now
        if step % 20 == 0:
            log(
                step=step,
                minutes=round(spent / 60, 2),
                loss=round(mean, 4),
                balance=round(balance.item(), 3),
                lr=round(opts[0].param_groups[0]["lr"], 6),
                tokens_per_s=round(args.workers * args.rows * args.length / took),
            )
        if step % args.every == 0:
            checkpoint()
        if args.workers == 1:
            progress = measure()
    checkpoint(most=100_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with the training text")
    parser.add_argument("--work", type=Path, required=True, help="folder for state, tokenizer and log")
    parser.add_argument("--out", type=Path, help="folder for the Hugging Face checkpoint")
    parser.add_argument("--minutes", type=float, default=75.0, help="training time; the schedule follows it")
    parser.add_argument("--steps", type=int, default=1_000_000, help="most steps")
    parser.add_argument("--rows", type=int, default=16, help="rows of each worker in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a row")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument(
        "--start-from", type=Path, help="a state or a checkpoint's model.safetensors whose weights to begin with"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations and saves")
    args = parser.parse_args()

    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "meeting").unlink(missing_ok=True)
    load_tokenizer(args.work, args.text, Shape().vocab)
    context = mp.get_context("spawn")
    others = [context.Process(target=run, args=(rank, args)) for rank in range(1, args.workers)]
    for other in others:
        other.start()
    run(0, args)
    for other in others:
        other.join()


if __name__ == "__main__":
    main()
