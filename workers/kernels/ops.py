"""The operations that a decoder is made of, as one value that is passed in.

Every implementation keeps one law: **row i of a result depends on row i of the input alone**, bit for bit, whatever
rows stand beside it, however many there are. Each sum has one order, for prefill as for decode.

Shapes: T rows (tokens of a step), H hidden, K and N of a linear, Hq query heads, Hkv key-value heads, D head size,
E experts, k experts per token, F feed-forward size, B blocks, P = 16 positions of a block.
`tests/contract/test_ops.py` runs one suite over every implementation against `workers.kernels.plain`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 16  # positions in a block of the KV-cache


class Linear(Protocol):
    """A packed weight. Calling it is y = x W^T + b, y rounded once to the dtype of x."""

    n: int
    k: int

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        ...


class Experts(Protocol):
    """The packed SwiGLU experts of one layer."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum over slots j, in order, of weights[:, j] * expert[ids[:, j]](x).

        x: [T, H]; ids: int32 [T, k]; weights: float32 [T, k]; result: [T, H] in x's dtype. Each expert's gate and
        up are rounded to x's dtype, so is silu(gate) * up; the weighted outputs are summed in float32, then rounded.
        """


@dataclass(slots=True)
class Batch:
    """Where the rows of one step stand. Made once per step and used by every layer.

    A sequence s has rows [row_start[s], row_start[s + 1]); its block tables are `tables[g][s]`, int32, padded with
    -1 to one width per group. Row t is at absolute position `positions[t]` and attends to positions
    0 .. positions[t], all of them already in the cache when attention runs (this step's own rows are written first).
    """

    positions: Tensor  # int64 [T]
    row_start: Tensor  # int32 [S + 1]
    tables: Sequence[Tensor]  # per cache group: int32 [S, W]
    row_seq: Tensor  # int32 [T]: the sequence of each row


class KvCache(Protocol):
    """All layers' blocks on one device, in the implementation's own order of bytes."""

    blocks: int
    bytes: int

    def read_block(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """K and V of one block in the canonical order [Hkv, P, D]. For tests, and for the store later."""


class Ops(Protocol):
    """One device's kernels for one dtype (float32, bfloat16 or float16)."""

    name: str
    dtype: torch.dtype
    numerics_id: str  # kernel family and version, instruction set, compiler, dtype

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Packs a weight [N, K] (copied; the argument may be a memory-mapped view and is not kept)."""

    def swiglu(
        self, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
    ) -> Linear:
        """Packs silu(x gate^T) * (x up^T) as one call [T, H] -> [T, F]; gate and up are [F, H].

        Both are rounded to the dtype, then multiplied as by `silu_mul`.
        """

    def experts(self, gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]) -> Experts:
        """Packs E experts: gate and up are [F, H] each, down is [H, F]."""

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of `table` [V, H] by int64 ids [T] -> [T, H]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * (x / sqrt(mean(x^2) + eps)).to(dtype): statistics in float32. [T, H] -> [T, H]"""

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x (rounded to the dtype, in place); then rms_norm(residual). [T, H] each."""

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of rows [gate | up]; silu in float32, rounded once. [T, 2F] -> [T, F]"""

    def gate(self, logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        """Softmax over experts in float32, the k likeliest (ties: the lower id first), likeliest first.

        logits [T, E] -> ids int32 [T, k], weights float32 [T, k], which sum to 1 when `renormalize`.
        """

    def cache(self, layers: int, blocks: int, kv_heads: int, head_dim: int) -> KvCache: ...

    def cache_block_bytes(self, layers: int, kv_heads: int, head_dim: int) -> int:
        """Bytes of one block over all layers."""

    def rope_write(
        self,
        qkv: Tensor,
        heads: tuple[int, int],
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cache: KvCache,
        layer: int,
        batch: Batch,
        group: int,
    ) -> Tensor:
        """Norms q and k per head (where weights [D] are given), rotates them, writes k and v into the cache.

        qkv: [T, (Hq + 2 Hkv) D] as q | k | v; heads = (Hq, Hkv); cos, sin: float32 [max_context, D / 2] tables
        indexed by position, rotation of halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in float32, rounded
        once. Returns q: [T, Hq, D].
        """

    def attend(
        self, q: Tensor, cache: KvCache, layer: int, batch: Batch, group: int, scale: float, window: int | None
    ) -> Tensor:
        """Causal attention of q [T, Hq, D] over the cache -> [T, Hq * D].

        A row at position p sees positions max(0, p - window + 1) .. p. Sums begin at absolute block boundaries.
        """

    def argmax(self, logits: Tensor) -> Tensor:
        """The id of each row's greatest logit, the lowest of equals; a NaN is the greatest. [S, V] -> int64 [S]"""

    def logprobs(self, logits: Tensor) -> Tensor:
        """log_softmax in float32 over the last axis, row by row. [S, V] -> float32 [S, V]"""
