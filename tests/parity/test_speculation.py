"""Speculation changes when tokens come and nothing else: the same tokens and the same bits of their logprobs."""

from __future__ import annotations

import json
import queue
import random
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest

from understudy.errors import CheckpointError, ConfigError
from workers.engine import (
    EngineConfig,
    EngineStats,
    FinishReason,
    Grammar,
    Request,
    Sampling,
    SequenceOutput,
    StepOutput,
)
from workers.engine.build import build_engine
from workers.engine.loop import EngineLoop

VOCAB = 307
Said = tuple[list[int], list[bytes], FinishReason | None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target some of whose layers have a window, a stranger of the same vocabulary, and one of another."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(11)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
    }
    window = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}
    models = {
        "target": Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCAB, num_hidden_layers=3, **sizes, **window)),
        "stranger": LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=1, **sizes)),
        "foreign": LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB + 1, num_hidden_layers=1, **sizes)),
    }
    paths = {}
    for name, model in models.items():
        paths[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(paths[name])
    return paths


def config(path: Path, **changes: Any) -> EngineConfig:
    base = EngineConfig(str(path), dtype="float32", max_running=8, chunk_tokens=48, cache_bytes=1 << 22, threads=1)
    return msgspec.structs.replace(base, **changes)


def requests_of_all_kinds(vocab: int, count: int, dice: random.Random) -> list[Request]:
    """Greedy and drawn; penalties, biases, stops, minimum lengths; answers of one family; prompts that repeat."""
    stems = [[dice.randrange(vocab) for _ in range(48)] for _ in range(2)]
    made: list[Request] = []
    while len(made) < count:
        stem = dice.choice(stems)[: dice.choice([0, 16, 33, 48])]
        prompt = stem + [dice.randrange(vocab) for _ in range(dice.choice([1, 5, 16]))] * dice.choice([1, 3])
        length = dice.choice([1, 3, 20, 60, 60])
        shaped = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
        shaped |= {"logit_bias": [(dice.randrange(vocab), 8.0)], "bad_words": [[dice.randrange(vocab)]]}
        sampling = Sampling(
            temperature=dice.choice([0.0, 0.0, 0.7, 1.3]),
            top_k=dice.choice([0, 20]),
            top_p=dice.choice([1.0, 0.9]),
            seed=dice.randrange(1 << 64),
            **dice.choice([{}, {}, shaped, {"logit_bias": [(i, 30.0) for i in (5, 6, 7)]}]),  # the last says 5 to 7
        )
        siblings = dice.choice([1, 1, 1, 3])
        for index in range(siblings):
            made.append(
                Request(
                    id=f"r{len(made)}",
                    prompt=prompt,
                    max_tokens=length,
                    sampling=sampling,
                    index=index,
                    min_tokens=dice.choice([0, min(4, length)]),
                    eos_ids=[dice.randrange(vocab)],
                    stop_ids=[dice.randrange(vocab)],
                    logprobs=dice.choice([0, 3]),
                    priority=dice.choice([0, 0, 1]),
                    family=f"f{len(made) - index}" if siblings > 1 else "",
                )
            )
    return made


def said(outputs: list[SequenceOutput]) -> Said:
    bits = []
    for p in (p for o in outputs for p in o.logprobs or []):
        values = [p.logprob, *(v for _, v in p.top)]
        bits.append(struct.pack(f"<{len(values)}d", *values) + repr((p.rank, [i for i, _ in p.top])).encode())
    assert not any(o.error for o in outputs)
    return [t for o in outputs for t in o.token_ids], bits, outputs[-1].finish


def run(
    engine_config: EngineConfig, requests: list[Request], seed: int | None = None
) -> tuple[dict[str, Said], EngineStats]:
    """All at once, or coming by chance."""
    engine = build_engine(engine_config)
    dice, waiting = random.Random(seed), list(requests)
    outputs: dict[str, list[SequenceOutput]] = {}
    while waiting or engine.has_work():
        for _ in range(len(waiting) if seed is None else min(len(waiting), dice.choice([0, 4, 8]))):
            engine.add(waiting.pop(0))
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
        engine.check()
    engine.check_idle()
    if engine_config.speculate == "draft":
        engine._proposer.check_idle()
    stats = msgspec.structs.replace(engine.stats())
    engine.close()
    return {id: said(o) for id, o in outputs.items()}, stats


@pytest.fixture(scope="module")
def asked() -> list[Request]:
    return requests_of_all_kinds(VOCAB, 48, random.Random(3))


@pytest.fixture(scope="module")
def expected(tiny: dict[str, Path], asked: list[Request]) -> dict[str, Said]:
    """One after the other, nothing cached, nothing drafted."""
    alone = config(tiny["target"], max_running=1, prefix_cache=False)
    answers, stats = run(alone, asked)
    assert stats.drafted_tokens == stats.accepted_tokens == 0
    return answers


@pytest.mark.parametrize(
    ("source", "tokens"), [("ngram", 1), ("ngram", 7), ("target", 1), ("target", 4), ("target", 11), ("stranger", 3)]
)
def test_the_same_answers(
    tiny: dict[str, Path], asked: list[Request], expected: dict[str, Said], source: str, tokens: int
) -> None:
    """In a crowd, in a cache so small that sequences are preempted, over warm prefixes."""
    speculate = "ngram" if source == "ngram" else "draft"
    draft = None if source == "ngram" else str(tiny[source])
    engine = build_engine(config(tiny["target"]))
    block = engine.info.cache_bytes // engine.info.blocks
    engine.close()
    small = config(
        tiny["target"],
        cache_bytes=12 * block,
        max_context=160,
        speculate=speculate,
        draft_model_dir=draft,
        draft_tokens=tokens,
    )
    answers, stats = run(small, asked, seed=tokens)
    assert {id: a[0] for id, a in answers.items()} == {id: a[0] for id, a in expected.items()}
    assert answers == expected, "equal tokens, but other bits of logprobs or another end"
    assert stats.preemptions > 0, "sequences were preempted"
    assert stats.hit_tokens > 0, "prefixes were warm"
    assert stats.drafted_tokens > stats.accepted_tokens
    assert stats.accepted_tokens > 0 or source == "stranger"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_drafts_for_itself_is_never_refused(tiny: dict[str, Path], temperature: float) -> None:
    """The draft's number is that of the target's own draw: equal models agree at every temperature."""
    requests = [
        Request(f"r{i}", [i, 5, 9], 41, Sampling(temperature=temperature, top_p=0.95, seed=i)) for i in range(4)
    ]
    plain = config(tiny["target"])
    drafting = msgspec.structs.replace(plain, speculate="draft", draft_model_dir=str(tiny["target"]))
    answers, before = run(plain, requests)
    again, after = run(drafting, requests)
    assert again == answers
    assert after.accepted_tokens == after.drafted_tokens > 100
    assert after.steps < before.steps / 3


def test_through_the_loop(tiny: dict[str, Path], asked: list[Request], expected: dict[str, Said]) -> None:
    loop = EngineLoop(build_engine(config(tiny["target"], speculate="ngram")))
    inbox: queue.Queue[StepOutput] = queue.Queue()
    outputs: dict[str, list[SequenceOutput]] = {r.id: [] for r in asked}
    try:
        with loop.attach(inbox.put) as session:
            for request in asked:
                session.submit(request)
            left = len(asked)
            while left:
                for output in inbox.get(timeout=60).outputs:
                    outputs[output.id].append(output)
                    left -= output.finish is not None
    finally:
        loop.stop(10.0)
    assert {id: said(o) for id, o in outputs.items()} == expected
    assert loop.stats().accepted_tokens > 0


# Real models.


@pytest.mark.parametrize("speculate", ["ngram", "draft"])
def test_bundled_model(demo_model: Path, speculate: str) -> None:
    if not (demo_model / "config.json").is_file():
        pytest.skip(f"no checkpoint at {demo_model}")
    dice = random.Random(5)
    vocab = json.loads((demo_model / "config.json").read_text())["vocab_size"]
    requests = requests_of_all_kinds(vocab, 5, dice)
    requests += [Request(f"greedy{i}", [dice.randrange(vocab)], 60, Sampling(temperature=0.0)) for i in range(2)]
    schema = '{"type": "object", "properties": {"name": {"enum": ["Ann", "Bo"]}, "n": {"type": "integer"}}}'
    formats = [Grammar("json_schema", schema), Grammar("regex", "(ab|cd){3,20}e")]
    requests += [
        Request(f"format{i}", [7, 8, 9], 40, Sampling(temperature=t, seed=i), grammar=formats[i % 2], logprobs=1)
        for i, t in enumerate((0.0, 0.0, 0.8, 0.8))
    ]
    plain = EngineConfig(str(demo_model), max_running=8, cache_bytes=1 << 24, threads=1)
    draft = str(demo_model) if speculate == "draft" else None
    drafting = msgspec.structs.replace(plain, speculate=speculate, draft_model_dir=draft)
    answers, _ = run(plain, requests)
    again, stats = run(drafting, requests, seed=1)
    assert again == answers
    assert stats.accepted_tokens > 0


@pytest.mark.oracles
@pytest.mark.parametrize("speculate", ["ngram", "draft"])
def test_stories(oracles: Path, speculate: str) -> None:
    """A trained model's golden answer, token for token."""
    path = oracles / "weights" / "stories260K-hf"
    golden = json.loads((path / "golden_greedy.json").read_text())
    prompt, greedy = golden["prompt_ids"], golden["greedy_ids"]
    draft = str(path) if speculate == "draft" else None
    drafting = config(path, speculate=speculate, draft_model_dir=draft)
    answers, stats = run(drafting, [Request("a", prompt, len(greedy), Sampling(temperature=0.0))])
    assert answers["a"][0] == greedy
    assert stats.accepted_tokens > 0
    if speculate == "draft":
        assert stats.accepted_tokens == stats.drafted_tokens


# What cannot be.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculate": "maybe"}, "speculate: 'maybe' is not one of none, ngram, draft"),
        ({"speculate": "ngram", "draft_tokens": 0}, "draft_tokens: 0 is not within 1 and 64"),
        ({"speculate": "ngram", "draft_tokens": 65}, "draft_tokens: 65 is not within 1 and 64"),
        ({"speculate": "draft"}, "speculate: draft needs draft_model_dir"),
    ],
)
def test_configurations_that_cannot_be(tiny: dict[str, Path], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_engine(config(tiny["target"], **changes))


def test_a_draft_model_of_another_vocabulary(tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"draft_model_dir: .* a vocabulary of 308 tokens, the model one of 307"):
        build_engine(config(tiny["target"], speculate="draft", draft_model_dir=str(tiny["foreign"])))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        build_engine(config(tiny["target"], speculate="draft", draft_model_dir=str(tmp_path)))
