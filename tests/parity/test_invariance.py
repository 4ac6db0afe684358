"""The law: one request, one answer. Tokens and the bits of their logprobs depend on model, prompt, parameters and seed.

Every request is computed alone in an engine that caches nothing, then all of them mixed: in random order, arriving at
random steps, with another chunk budget in every step, in a cache so small that sequences are preempted, over prefixes
that others left warm.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from understudy.errors import ConfigError
from workers.engine import EngineConfig, Request, Sampling
from workers.engine.build import build_engine
from workers.engine.core import EngineCore

Answer = tuple[list[int], list[bytes]]
CACHE_POSITIONS = 12 * 16  # of the small cache: a few of the sequences below, and not their whole answers


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random checkpoints: dense ones, some of whose layers have a window that the requests outgrow, and experts."""
    import torch
    from transformers import (
        Gemma2Config,
        Gemma2ForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.manual_seed(7)
    sizes = {
        "vocab_size": 503,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.3,
    }
    moe = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    window = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1}
    gemma = {"head_dim": 16, "sliding_window": 48, "attn_logit_softcapping": 5.0, "tie_word_embeddings": False}
    gpt2 = {"vocab_size": 503, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024, "initializer_range": 0.3}
    models = {
        "window": Qwen2ForCausalLM(Qwen2Config(**sizes, **window)),
        "softcap": Gemma2ForCausalLM(Gemma2Config(**sizes, **gemma)),
        "learned": GPT2LMHeadModel(GPT2Config(**gpt2)),
        "experts": Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, head_dim=16, **moe)),
    }
    paths = {}
    for name, model in models.items():
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
    return paths


def random_requests(count: int, vocab: int, dice: random.Random) -> list[Request]:
    """Requests of every kind; many prompts begin like another's."""
    stems = [[dice.randrange(vocab) for _ in range(64)] for _ in range(4)]
    requests = []
    for i in range(count):
        stem = dice.choice(stems)[: dice.choice([0, 0, 0, 16, 33, 64])]
        prompt = stem + [dice.randrange(vocab) for _ in range(dice.choice([1, 2, 7, 15, 16, 17, 40, 60]))]
        length = dice.choice([1, 2, 9, 20, 60])
        drawn = Sampling(
            temperature=dice.choice([0.5, 1.0, 1.5]),
            top_k=dice.choice([0, 0, 5, 50]),
            top_p=dice.choice([1.0, 1.0, 0.9, 0.5]),
            min_p=dice.choice([0.0, 0.0, 0.05]),
            seed=dice.randrange(1 << 64),
        )
        requests.append(
            Request(
                id=f"r{i}",
                prompt=prompt,
                max_tokens=length,
                sampling=dice.choice([drawn, Sampling(temperature=0)]),
                index=dice.choice([0, 0, 1, 5]),
                min_tokens=dice.choice([0, 0, min(3, length)]),
                eos_ids=[dice.randrange(vocab) for _ in range(vocab // 100)],
                logprobs=dice.choice([0, 1, 5]),
                priority=dice.choice([0, 0, 0, 1]),
            )
        )
    return requests


class Collector:
    """Runs an engine and writes down what it says, logprobs as bits."""

    def __init__(self, engine: EngineCore) -> None:
        self.engine = engine
        self.answers: dict[str, Answer] = {}

    def add(self, request: Request) -> None:
        self.answers[request.id] = ([], [])
        self.engine.add(request)

    def step(self) -> None:
        for output in self.engine.step():
            assert not output.error
            tokens, bits = self.answers[output.id]
            tokens += output.token_ids
            for p in output.logprobs or []:
                values = [p.logprob, *(v for _, v in p.top)]
                bits.append(struct.pack(f"<{len(values)}d", *values) + repr((p.rank, [i for i, _ in p.top])).encode())


def alone(config: EngineConfig, requests: list[Request]) -> dict[str, Answer]:
    collector = Collector(build_engine(config))
    for request in requests:
        collector.add(request)
        while collector.engine.has_work():
            collector.step()
    collector.engine.check_idle()
    collector.engine.close()
    return collector.answers


def mixed(config: EngineConfig, requests: list[Request], dice: random.Random) -> tuple[dict[str, Answer], EngineCore]:
    collector = Collector(build_engine(config))
    scheduler = collector.engine._scheduler
    queue = dice.sample(requests, len(requests))
    while queue or collector.engine.has_work():
        for _ in range(min(len(queue), dice.choice([0, 1, 4, 16]))):
            collector.add(queue.pop())
        scheduler.chunk_tokens = dice.choice([1, 3, 16, 17, 40, config.chunk_tokens])
        collector.step()
    collector.engine.check_idle()
    return collector.answers, collector.engine


def check(path: Path, dtype: str, kernels: str, count: int) -> None:
    dice = random.Random(f"{dtype} {kernels} {count}")
    sizes = {"model_dir": str(path), "dtype": dtype, "kernels": kernels}
    try:
        lonely = EngineConfig(
            **sizes, prefix_cache=False, max_running=1, chunk_tokens=512, cache_bytes=1 << 24, threads=1
        )
        info = (engine := build_engine(lonely)).info
    except ConfigError as reason:
        pytest.skip(f"{kernels}: {reason}")
    engine.close()
    requests = random_requests(count, info.vocab_size, dice)
    small = info.cache_bytes // info.blocks * (CACHE_POSITIONS // info.block_tokens)
    threads = 2 if kernels == "native" else 1  # plain kernels promise equal bits for one number of threads alone
    crowd = EngineConfig(**sizes, max_running=16, chunk_tokens=100, cache_bytes=small, threads=threads)
    expected = alone(lonely, requests)
    answers, engine = mixed(crowd, requests, dice)
    stats = engine.stats()
    engine.close()
    assert {id: tokens for id, (tokens, _) in answers.items()} == {id: tokens for id, (tokens, _) in expected.items()}
    assert answers == expected, "equal tokens, but other bits of logprobs"
    assert stats.hit_tokens > 0, "prefixes were warm"
    assert stats.preemptions > 0, "sequences were preempted"
    assert len({tuple(tokens) for tokens, _ in answers.values()}) > count // 3, "the answers say something"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", ["window", "experts"])
def test_native(tiny_models: dict[str, Path], model: str, dtype: str) -> None:
    check(tiny_models[model], dtype, "native", 200)


@pytest.mark.parametrize("model", ["softcap", "learned"])
def test_other_families(tiny_models: dict[str, Path], model: str) -> None:
    check(tiny_models[model], "bfloat16", "native", 100)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_plain(tiny_models: dict[str, Path], dtype: str) -> None:
    check(tiny_models["experts"], dtype, "plain", 48)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bundled_model(demo_model: Path, dtype: str) -> None:
    if not (demo_model / "config.json").is_file():
        pytest.skip(f"no checkpoint at {demo_model}")
    check(demo_model, dtype, "native", 64)
