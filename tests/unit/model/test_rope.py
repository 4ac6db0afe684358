"""Tables of rotary positions against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from workers.model.rope import inverse_frequencies, rope_tables
from workers.model.spec import Rope

ORIGINAL = {"original_max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (Rope(10000.0), {"rope_type": "default"}),
        (Rope(1e6), {"rope_type": "default"}),
        (Rope(10000.0, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192), {"rope_type": "llama3"} | LLAMA3),
        (Rope(1e4, "yarn", 32.0, original_context=4096), {"rope_type": "yarn", "factor": 32.0} | ORIGINAL),
        (
            Rope(1e5, "yarn", 40.0, original_context=4096, mscale=0.7, mscale_all_dim=1.0, truncate=False),
            {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False} | ORIGINAL,
        ),
        (
            Rope(1e4, "yarn", 32.0, original_context=4096, beta_fast=16.0, beta_slow=2.0, attention_factor=0.9),
            {"rope_type": "yarn", "factor": 32.0, "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 0.9}
            | ORIGINAL,
        ),
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


def test_dynamic_scaling_is_that_of_a_text_that_ends_with_the_row() -> None:
    rope = Rope(10000.0, "dynamic", 4.0, original_context=100)
    cos, _ = rope_tables(rope, 64, 400)
    torch.testing.assert_close(cos[:100], rope_tables(Rope(10000.0), 64, 100)[0], rtol=0, atol=2e-5)
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=100,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 4.0},
    )  # fmt: skip
    theirs = LlamaRotaryEmbedding(config)
    for position in (100, 250, 399):
        theirs_cos, _ = theirs(torch.zeros(1), torch.tensor([[position]]))
        torch.testing.assert_close(cos[position], theirs_cos[0, 0, :32], rtol=0, atol=2e-5)


def test_long_rope_has_other_wavelengths_for_long_prompts() -> None:
    short, long = tuple(1.0 + i / 8 for i in range(8)), tuple(2.0 + i for i in range(8))
    rope = Rope(1e4, "longrope", 32.0, original_context=4096, short_factor=short, long_factor=long)
    scale = (1 + 5 / 12) ** 0.5  # sqrt(1 + ln 32 / ln 4096)
    plain = inverse_frequencies(Rope(1e4), 16)
    for factors, is_long in ((short, False), (long, True)):
        torch.testing.assert_close(inverse_frequencies(rope, 16, is_long), plain / torch.tensor(factors))
        cos, _ = rope_tables(rope, 16, 3, is_long)
        torch.testing.assert_close(cos[0], torch.full((8,), scale))
