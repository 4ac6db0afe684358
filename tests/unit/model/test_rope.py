"""Tables of rotary positions against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from workers.model.rope import inverse_frequencies, rope_tables
from workers.model.spec import Rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (Rope(10000.0), {"rope_type": "default"}),
        (Rope(1e6), {"rope_type": "default"}),
        (Rope(10000.0, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192), {"rope_type": "llama3"} | LLAMA3),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tables_are_those_of_transformers(rope: Rope, parameters: dict[str, Any], head_dim: int) -> None:
    config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=131072,
        rope_parameters={"rope_theta": rope.theta} | parameters,
    )
    theirs = LlamaRotaryEmbedding(config)
    assert torch.equal(inverse_frequencies(rope, head_dim), theirs.inv_freq)
    cos, sin = rope_tables(rope, head_dim, 10000)
    their_cos, their_sin = theirs(torch.zeros(1), torch.arange(10000)[None])
    torch.testing.assert_close(cos, their_cos[0, :, : head_dim // 2], rtol=0, atol=2e-7)
    torch.testing.assert_close(sin, their_sin[0, :, : head_dim // 2], rtol=0, atol=2e-7)


@pytest.mark.parametrize("positions", [1, 100, 4096, 4097])
def test_a_positions_bits_do_not_depend_on_the_tables_length(positions: int) -> None:
    whole, part = rope_tables(Rope(10000.0), 64, 9000), rope_tables(Rope(10000.0), 64, positions)
    for a, b in zip(whole, part, strict=True):
        assert b.shape == (positions, 32)
        assert torch.equal(a[:positions], b)
