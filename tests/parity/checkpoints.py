"""Tiny random checkpoints of every architecture, written by transformers, and a greedy loop over a Runner."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from workers.engine.contract import EngineConfig
from workers.engine.plan import Chunk, StepPlan
from workers.engine.runner import Runner
from workers.kernels.build import BuildError
from workers.kernels.build import load as load_library
from workers.kernels.choose import DTYPES
from workers.kernels.cuda import CudaOps
from workers.kernels.ops import BLOCK
from workers.model.decoder import load_decoder
from workers.model.load import Loader
from workers.model.spec import read_spec
from workers.model.weights import Checkpoint

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
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral-window-tied": (
        "Mixtral",
        {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 18, "tie_word_embeddings": True},
    ),
    "qwen3-moe-dense-layers": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"head_dim": 32, "decoder_sparse_step": 2},
    ),
    "qwen3-moe-first-dense": (
        "Qwen3Moe",
        {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True}
        | {"head_dim": 16, "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 30},
    ),
}


def make_model(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model whose norms and biases are no neutral elements."""
    family, changes = CASES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**(SHAPE | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    return model


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
        return Chunk("s", self.at, tokens, tuple(tables), wanted=int(self.at + len(tokens) == len(self.tokens)))

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
