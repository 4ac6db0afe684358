"""Rotary positions: tables of cosines and sines, scaled as the checkpoint says."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.model.spec import Rope

_TILE = 4096  # positions computed at a time


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each pair, float32 [D / 2], in the order of operations of transformers.

    RoPE: https://arxiv.org/abs/2104.09864. Linear scaling divides all frequencies by `factor`. Llama 3.1 divides
    those whose wavelength exceeds `original / low`, keeps those below `original / high`, interpolates between.
    """
    inv = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    if rope.kind == "linear":
        return inv / rope.factor
    if rope.kind != "llama3":
        return inv
    wavelength = 2 * math.pi / inv
    longest, shortest = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inv / rope.factor + smooth * inv
    scaled = torch.where(wavelength > longest, inv / rope.factor, inv)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, scaled)


def rope_tables(rope: Rope, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [positions, D / 2].

    The angle is rounded to float32 as transformers does; its cosine is computed in float64 and rounded once. Tiles
    of one size, so that a position's bits do not depend on how many there are.
    """
    inv = inverse_frequencies(rope, head_dim)
    cos, sin = [], []
    for start in range(0, positions, _TILE):
        angles = torch.outer(torch.arange(start, start + _TILE).float(), inv).double()
        cos.append(angles.cos().float())
        sin.append(angles.sin().float())
    return torch.cat(cos)[:positions].contiguous(), torch.cat(sin)[:positions].contiguous()
