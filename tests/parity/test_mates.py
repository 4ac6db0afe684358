"""500 requests that combine features at random, on a real model: what they ask for never harms who runs beside them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch
from asked import Guesser, ListFormats, random_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from workers.cache.manager import CacheManager
from workers.engine import EngineConfig, Probe, Request, Sampling
from workers.engine.build import build_engine
from workers.engine.core import EngineCore
from workers.kernels.ops import BLOCK

V, H, F = 64, 32, 48


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers."""
    path = tmp_path_factory.mktemp("mates")
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": H, "intermediate_size": F}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu"}
    config |= {"max_position_embeddings": 192, "torch_dtype": "float32", "tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (V, H), "lm_head.weight": (V, H), "model.norm.weight": (H,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}.weight": (H,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (H, H) for n in "qo"}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (H // 2, H) for n in "kv"}
        shapes |= {f"{layer}.mlp.{n}_proj.weight": (F, H) for n in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (H, F)
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    save_file(weights, path / "model.safetensors")
    return path


class Stage:
    """An engine for many, with drafts, and one for each request alone."""

    def __init__(self, path: Path) -> None:
        self.guesser = Guesser({}, {}, V)
        self.together = self._engine(path, self.guesser)
        self.single = self._engine(path, None)
        self.mates = {m.id: self.play(self.single, m)[m.id] for m in MATES}

    def _engine(self, path: Path, proposer: Guesser | None) -> EngineCore:
        """So few blocks that several sequences do not always fit."""
        built = build_engine(EngineConfig(str(path), cache_bytes=1 << 19, chunk_tokens=48, max_running=5))
        cache = CacheManager([12], [None], BLOCK)
        return EngineCore(built._runner, built.info, cache, built._runner.ops, ListFormats(), proposer, 3)

    def play(self, engine: EngineCore, *requests: Request) -> dict[str, tuple]:
        """Tokens, logprobs and end of every request, to the bit."""
        said: dict[str, tuple] = {r.id: ([], []) for r in requests}
        for request in requests:
            engine.add(request)
        while engine.has_work():
            for o in engine.step():
                said[o.id][0].extend(o.token_ids)
                said[o.id][1].extend(msgspec.msgpack.encode(p) for p in o.logprobs or [])
                if o.prompt_logprobs is not None:
                    said[o.id] = (*said[o.id][:2], msgspec.msgpack.encode(o.prompt_logprobs), *said[o.id][2:])
                if o.finish is not None:
                    said[o.id] = (*said[o.id], o.finish, o.error)
        engine.check_idle()
        return said


@pytest.fixture(scope="module")
def stage(llama: Path) -> Iterator[Stage]:
    stage = Stage(llama)
    yield stage
    stage.together.close()
    stage.single.close()


MATES = [
    Request("greedy", list(range(30)), 10, Sampling(temperature=0), logprobs=2),
    Request("drawn", [7, 8, 9], 10, Sampling(temperature=1.0, top_p=0.95, seed=5), logprobs=2, priority=1),
]


@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 40))
def test_features_never_harm_a_mate(stage: Stage, seed: int):
    dice = random.Random(seed)
    asked = [random_request(dice, f"r{i}", V, most=8) for i in range(dice.randint(1, 2))]
    if dice.random() < 0.3:
        first = msgspec.structs.replace(asked[0], family="f")
        asked[0] = first
        asked.append(msgspec.structs.replace(first, id="sibling", index=9, prompt_logprobs=None))
    if dice.random() < 0.1:
        asked[-1] = msgspec.structs.replace(asked[-1], probe=Probe(2, False, [0, 1]))
    alone = stage.mates | stage.play(stage.single, dice.choice(asked))
    requests = [*asked, *MATES]
    dice.shuffle(requests)
    stage.guesser._answers = {r.id: list(alone.get(r.id, ([],))[0]) for r in requests}
    stage.guesser._prompts = {r.id: len(r.prompt) for r in requests}
    together = stage.play(stage.together, *requests)
    assert {id: together[id] for id in alone} == alone
