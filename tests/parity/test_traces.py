"""What a token attended to, as its trace tells, is what transformers says: layer by layer, mean over heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import random_prompt

from workers.engine import EngineConfig, Probe, Request, Sampling
from workers.engine.build import build_engine

Written = Callable[[str], tuple[transformers.PreTrainedModel, Path]]
PROMPT, MADE = 37, 4


@pytest.mark.parametrize("kernels", ["plain", "native"])
@pytest.mark.parametrize(
    "name",
    [
        "deepseek-v2-direct-queries",  # latents, one rotated key for all heads
        "deepseek-v2-groups",
        "deepseek-v3",  # YaRN's scale, queries from a latent of their own
        "gpt-oss",  # sinks, which take a share, and windows
        "gemma2",  # soft caps
    ],
)
def test_attention_is_that_of_the_reference(written: Written, name: str, kernels: str) -> None:
    """Of tokens that end a prompt's chunk, begin one, and are decoded."""
    model, path = written(name)
    layers = list(range(model.config.num_hidden_layers))
    engine = build_engine(
        EngineConfig(str(path), dtype="float32", kernels=kernels, cache_bytes=1 << 22, chunk_tokens=9, threads=1)
    )
    prompt = random_prompt(PROMPT, model.config.vocab_size, seed=5)
    engine.add(Request("a", prompt, MADE, Sampling(temperature=0), probe=Probe(0, False, layers)))
    tokens, traces = [], []
    while engine.has_work():
        for output in engine.step():
            assert not output.error
            tokens += output.token_ids
            traces += output.traces or []
    engine.close()
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        attentions = model(torch.tensor([prompt + tokens[:-1]]), output_attentions=True).attentions
    model.set_attn_implementation(before)
    assert len(traces) == MADE
    for i, trace in enumerate(traces):
        row = PROMPT - 1 + i
        assert [seen.layer for seen in trace.attention] == layers
        for seen in trace.attention:
            want = attentions[seen.layer][0, :, row, : row + 1].mean(0)
            got = torch.zeros(row + 1)
            got[seen.start :] = torch.tensor(seen.weights)
            torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-3)
