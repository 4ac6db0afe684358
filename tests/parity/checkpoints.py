"""Tiny random checkpoints of every architecture, written by transformers, and a greedy loop over a Runner."""

from __future__ import annotations

import functools
import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from dense import CASES as DENSE
from torch import Tensor

from workers.engine.contract import EngineConfig
from workers.engine.plan import Chunk, StepPlan
from workers.engine.runner import Runner
from workers.kernels.build import BuildError
from workers.kernels.build import load as load_library
from workers.kernels.choose import DTYPES
from workers.kernels.cuda import CudaOps
from workers.kernels.ops import BLOCK
from workers.model.config import read_spec
from workers.model.decoder import load_decoder
from workers.model.load import Loader
from workers.model.weights import Checkpoint

PROMPT, NEW = 41, 64
CONFIGS = {"Gemma3": "Gemma3TextConfig"}
MODELS = {"GPT2": "GPT2LMHeadModel"}
SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {}),
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-mqa-biases-wide-heads": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    ),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}, "intermediate_size": 100},
    ),
    "mistral-window": ("Mistral", {"sliding_window": 20}),
    "mistral-full": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-two-groups": ("Qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-biases-window": (
        "Qwen3",
        {"head_dim": 8, "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
}


def make_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose norms and biases are no neutral elements."""
    family, changes = DENSE[name] if name in DENSE else (CASES[name][0], SHAPE | CASES[name][1])
    torch.manual_seed(seed)
    config = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**changes)
    model = getattr(transformers, MODELS.get(family, f"{family}ForCausalLM"))(config).eval()
    shift = 1.0 if family.startswith("Gemma") else 0.0  # their norms keep w - 1
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.1 if name in DENSE else 0.3)
            elif "norm" in parameter_name or ".ln_" in parameter_name:
                parameter.uniform_(0.5 - shift, 1.5 - shift)
            elif name in DENSE and parameter is model.get_input_embeddings().weight:
                parameter *= 0.2  # else a tied head repeats the last token for ever
    return model


@functools.cache
def reference(model: transformers.PreTrainedModel, length: int) -> tuple[list[int], Tensor]:
    """NEW greedy tokens of `generate` after the random prompt of that length, and the logits they were taken from."""
    prompt = random_prompt(length, 160, seed=length)
    with torch.inference_mode():
        made = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, use_cache=True,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    return made.sequences[0, length:].tolist(), torch.cat(made.logits)


def check(model: transformers.PreTrainedModel, runner: Runner, length: int = PROMPT, exact: bool = True) -> float:
    """In chunks of 13, beside another that is chunked otherwise; then again after a prefix hit, which has the same bits
    where kernels are `exact`.

    Returns the largest difference of a logit.
    """
    prompts = [random_prompt(n, 160, seed=n) for n in (length, 30)]
    tokens, logits = reference(model, length)
    stream, _ = greedy(runner, prompts, NEW, sizes=[13, 4])
    difference = (torch.stack(stream.logits) - logits).abs().max().item()
    assert difference < 1e-4, f"logits differ by {difference}; they span {logits.min():.1f} to {logits.max():.1f}"
    assert stream.made == tokens
    assert len(set(tokens)) > 3, "the answer says something"
    (alone,) = greedy(runner, prompts[:1], 4, sizes=[100])
    again = warm(runner, alone, 4)
    assert not exact or torch.equal(torch.stack(again), torch.stack(stream.logits[:4])), (
        "the bits differ after a prefix hit"
    )
    return difference


def warm(runner: Runner, first: Stream, tokens: int) -> list[Tensor]:
    """The logits of the same prompt when its first two blocks are those that `first` wrote."""
    unused = [b for b in range(runner.blocks) if b not in first.blocks]
    stream = Stream(runner, first.prompt, first.blocks[:2] + unused[: len(first.blocks) - 2])
    stream.at = 32
    while len(stream.made) < tokens:
        chunk = stream.chunk(5)
        logits = runner.run(StepPlan(0, [chunk]))
        stream.advance(chunk, logits[0] if chunk.wanted else None)
    return stream.logits


def open_runner(model_dir: Path, kernels: str, **config: Any) -> Runner:
    """Skips the test where native kernels are asked for and no compiler is there.

    `kernels` cuda and cuda-fast are those of a GPU, run on the CPU where there is none.
    """
    if kernels.startswith("cuda"):
        return _cuda_runner(model_dir, kernels == "cuda", config.get("dtype", "float32"))
    if kernels == "native":
        try:
            load_library()
        except BuildError as reason:
            pytest.skip(str(reason))
    return Runner.from_checkpoint(
        EngineConfig(model_dir=str(model_dir), kernels=kernels, threads=1, max_running=4, **config)
    )


def _cuda_runner(model_dir: Path, exact: bool, dtype: str) -> Runner:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ops = CudaOps(DTYPES[dtype], device, exact)
    if device == "cpu":  # calls of a GPU's sizes would take long here
        ops.reference_rows, ops.row_sizes, ops.attend_rows = 8, (8, 16), 4
    spec = read_spec(model_dir)
    load = Loader(Checkpoint(model_dir), ops, torch.device(device))
    decoder = load_decoder(spec, load, ops, spec.max_context, torch.device(device))
    return Runner(decoder, 4 * spec.max_context // BLOCK, "", spec.max_context)


@dataclass
class Stream:
    """One greedy sequence over a runner, its blocks in random places."""

    runner: Runner
    prompt: list[int]
    blocks: list[int]

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)
        self.at = 0
        self.logits: list[Tensor] = []

    def chunk(self, size: int) -> Chunk:
        """The next rows. Entries behind a window are -1, as after the cache took those blocks back."""
        tokens = self.tokens[self.at : self.at + size]
        tables = []
        for window in self.runner.info.windows:
            table = array("i", self.blocks)
            gone = 0 if window is None else max(0, self.at - window + 1) // BLOCK
            table[:gone] = array("i", [-1] * gone)
            tables.append(table)
        wanted = int(self.at + len(tokens) == len(self.tokens))
        limit = self.runner.info.long_prompt
        long = limit is not None and len(self.prompt) > limit
        return Chunk("s", self.at, tokens, tuple(tables), wanted, long=long)

    def advance(self, chunk: Chunk, logits: Tensor | None) -> None:
        self.at += len(chunk.tokens)
        if logits is not None:
            self.logits.append(logits.cpu())
            self.tokens.append(int(logits.argmax()))

    @property
    def made(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


def open_streams(runner: Runner, prompts: list[list[int]], new_tokens: int, seed: int = 0) -> list[Stream]:
    ids = list(range(runner.blocks))
    random.Random(seed).shuffle(ids)
    streams = []
    for prompt in prompts:
        count = -(-(len(prompt) + new_tokens) // BLOCK)
        streams.append(Stream(runner, prompt, ids[:count]))
        ids = ids[count:]
    return streams


def greedy(runner: Runner, prompts: list[list[int]], new_tokens: int, sizes: list[int]) -> list[Stream]:
    """Runs all prompts side by side. Stream i's prompt goes in chunks of sizes[i % len(sizes)]."""
    streams = open_streams(runner, prompts, new_tokens)
    step = 0
    while waiting := [(i, s) for i, s in enumerate(streams) if len(s.made) < new_tokens]:
        chunks = [s.chunk(sizes[i % len(sizes)]) for i, s in waiting]
        rows = iter(runner.run(StepPlan(step, chunks)))
        for (_, stream), chunk in zip(waiting, chunks, strict=True):
            stream.advance(chunk, next(rows) if chunk.wanted else None)
        step += 1
    return streams


def random_prompt(length: int, vocab: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(vocab) for _ in range(length)]
