"""Positions: tables of cosines and sines, scaled as the checkpoint says, and of vectors added to the embeddings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.model.spec import Rope

_TILE = 4096  # positions computed at a time


def inverse_frequencies(rope: Rope, head_dim: int, long: bool = False) -> Tensor:
    """Radians per position of each pair, float32 [R / 2], in the order of operations of transformers.

    `long`: for prompts beyond the original context (longrope). Of dynamic scaling these are the unscaled ones.
    """
    dim = rope.dim or head_dim
    wavelengths = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.long_factor if long else rope.short_factor) * wavelengths)
    inv = 1.0 / wavelengths
    if rope.kind == "linear":
        return inv / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, inv)
    if rope.kind == "yarn":
        return _yarn(rope, wavelengths, dim)
    return inv


def _llama3(rope: Rope, inv: Tensor) -> Tensor:
    wavelength = 2 * math.pi / inv
    longest, shortest = rope.original_context / rope.low_freq_factor, rope.original_context / rope.high_freq_factor
    smooth = (rope.original_context / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * inv / rope.factor + smooth * inv
    scaled = torch.where(wavelength > longest, inv / rope.factor, inv)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, scaled)


def _yarn(rope: Rope, wavelengths: Tensor, dim: int) -> Tensor:
    """Sections 3.2 and 3.3 of the paper: pairs that turn more than `beta_fast` times within the original context stay,
    those that turn less than `beta_slow` times are stretched by `factor`, a ramp lies between."""

    def pair(turns: float) -> float:
        return dim * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = (torch.arange(dim // 2).float() - first) / ((last - first) or 0.001)
    stay = 1 - ramp.clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - stay) + 1.0 / wavelengths * stay


def attention_factor(rope: Rope) -> float:
    """What cosines and sines are multiplied by."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "yarn":
        if rope.mscale and rope.mscale_all_dim:
            return yarn_scale(rope.factor, rope.mscale) / yarn_scale(rope.factor, rope.mscale_all_dim)
        return yarn_scale(rope.factor)
    if rope.kind == "longrope" and rope.factor > 1:
        return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_context))
    return 1.0


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_tables(rope: Rope, head_dim: int, positions: int, long: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 [positions, R / 2].

    The angle is rounded to float32 as transformers does; its cosine is computed in float64 and rounded once. Tiles
    of one size, so that a position's bits do not depend on how many there are.
    """
    inv, scale = inverse_frequencies(rope, head_dim, long), attention_factor(rope)
    cos, sin = [], []
    for start in range(0, positions, _TILE):
        at = torch.arange(start, start + _TILE)
        turns = _dynamic(rope, head_dim, at) if rope.kind == "dynamic" else inv
        angles = (at.float()[:, None] * turns).double()
        cos.append((angles.cos() * scale).float())
        sin.append((angles.sin() * scale).float())
    return torch.cat(cos)[:positions].contiguous(), torch.cat(sin)[:positions].contiguous()


def _dynamic(rope: Rope, head_dim: int, positions: Tensor) -> Tensor:
    """Radians per position for rows at `positions`, float32 [T, R / 2]: beyond the original context a row has the
    base of a text that ends with it."""
    dim = rope.dim or head_dim
    length = (positions + 1).clamp(min=rope.original_context).double()
    stretch = rope.factor * length / rope.original_context - (rope.factor - 1)
    base = rope.theta * stretch ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    return (1.0 / base[:, None] ** exponents.double()).float()


def sinusoids(positions: int, width: int) -> Tensor:
    """Sines, then cosines, of geometric wavelengths up to 10000 * 2 pi: float32 [positions, width].

    https://arxiv.org/abs/1706.03762, section 3.5, in the arrangement of tensor2tensor.
    """
    half = width // 2
    rates = torch.exp(torch.arange(half).float() * -(math.log(10000.0) / (half - 1)))
    angles = torch.outer(torch.arange(positions).float(), rates).double()
    table = torch.cat([angles.sin(), angles.cos()], dim=1).float()
    return torch.nn.functional.pad(table, (0, width % 2))
