"""What a token attended to and which experts it went through: seen, and nothing changed by it."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from workers.engine import EngineConfig, Probe, Request, Sampling, SequenceOutput
from workers.engine.build import build_engine
from workers.engine.plan import Chunk, StepPlan
from workers.engine.runner import Runner
from workers.engine.watch import attention_weights

HEADS, KV_HEADS, D, EXPERTS, WINDOW = 4, 2, 8, 4, 20


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of two layers with a sliding window."""
    path = tmp_path_factory.mktemp("mixture")
    config = {"architectures": ["MixtralForCausalLM"], "vocab_size": 32, "hidden_size": 32, "intermediate_size": 24}
    config |= {"num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    config |= {"max_position_embeddings": 128, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    config |= {"sliding_window": WINDOW, "torch_dtype": "float32", "hidden_act": "silu", "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32, 32), "model.norm.weight": (32,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}.weight": (32,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (32, 32) for n in "qo"}
        shapes |= {f"{layer}.self_attn.{n}_proj.weight": (16, 32) for n in "kv"}
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (EXPERTS, 32)
        for e in range(EXPERTS):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            shapes |= {
                f"{expert}.w1.weight": (24, 32),
                f"{expert}.w3.weight": (24, 32),
                f"{expert}.w2.weight": (32, 24),
            }
    generator = torch.Generator().manual_seed(0)
    save_file({n: torch.randn(s, generator=generator) for n, s in shapes.items()}, path / "model.safetensors")
    return path


def run(path: Path, *requests: Request, **config: Any) -> dict[str, list[SequenceOutput]]:
    engine = build_engine(EngineConfig(str(path), kernels="plain", cache_bytes=1 << 19, **config))
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[SequenceOutput]] = {}
    while engine.has_work():
        for output in engine.step():
            outputs.setdefault(output.id, []).append(output)
    engine.check_idle()
    engine.close()
    return outputs


def test_layers_are_told_for_every_token_and_nothing_changes(mixture: Path) -> None:
    plain = Request("a", [1, 2, 3] * 7, 12, Sampling(seed=3), logprobs=2)
    probed = msgspec.structs.replace(plain, probe=Probe(2, True, [1]))
    mate = Request("mate", [9] * 30, 15, Sampling(seed=4), logprobs=0)
    (before,) = run(mixture, plain).values()
    alone = run(mixture, probed)["a"]
    together = run(mixture, mate, probed, chunk_tokens=16)
    without = run(mixture, mate)["mate"]
    traces = [t for o in alone for t in o.traces or []]
    assert len(traces) == 12
    assert [t for o in together["a"] for t in o.traces or []] == traces
    for mine, theirs in ((alone, before), (together["a"], before), (together["mate"], without)):
        assert [(o.token_ids, o.logprobs) for o in mine] == [(o.token_ids, o.logprobs) for o in theirs]
    assert all(o.traces is None for o in together["mate"])
    for i, trace in enumerate(traces):
        assert [(e.layer, len(set(e.experts))) for e in trace.experts] == [(0, 2), (1, 2)]
        for chosen in trace.experts:
            assert all(0 <= e < EXPERTS for e in chosen.experts)
            assert sum(chosen.weights) == pytest.approx(1)
            assert chosen.weights == sorted(chosen.weights, reverse=True)
        (seen,) = trace.attention
        assert (seen.layer, seen.start) == (1, max(0, 20 + i - WINDOW + 1))
        assert len(seen.weights) == min(WINDOW, 21 + i)
        assert sum(seen.weights) == pytest.approx(1, abs=1e-5)
        assert len(trace.candidates) >= 2


def test_every_probed_row_of_a_chunk_is_seen(mixture: Path) -> None:
    """Rows of drafts are seen as rows alone are."""
    runner = Runner.from_checkpoint(EngineConfig(str(mixture), kernels="plain", cache_bytes=1 << 19))
    probe = Probe(0, True, [0, 1])
    tokens = [5, 6, 7, 8, 9]
    alone = []
    for i in range(len(tokens)):
        chunk = Chunk("a", i, tokens[i : i + 1], (array("i", [3]),), 1, 0, probe)
        runner.run(StepPlan(0, [chunk]))
        alone += chunk.seen or []
    other = Chunk("b", 0, [1, 2], (array("i", [1]),), 0)
    chunk = Chunk("a", 0, tokens, (array("i", [2]),), 3, 2, probe)
    runner.run(StepPlan(0, [other, chunk]))
    assert chunk.seen == alone[2:]
    assert other.seen is None


def test_attention_weights_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    q, keys = torch.randn(HEADS, D, generator=generator), torch.randn(KV_HEADS, 9, D, generator=generator)
    sinks = torch.randn(HEADS, generator=generator)
    want = torch.zeros(9, dtype=torch.float64)
    for head in range(HEADS):
        scores = (keys[head // 2].double() @ q[head].double()) * 0.3
        scores = 5 * torch.tanh(scores / 5)
        want += torch.softmax(torch.cat([scores, sinks[head : head + 1].double()]), 0)[:9] / HEADS
    got = attention_weights(q, keys, 0.3, sinks, 5.0)
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
