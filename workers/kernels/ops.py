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
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.model.spec import Route

BLOCK = 16  # positions in a block of the KV-cache


class Linear(Protocol):
    """A packed weight. Calling it is y = x W^T + b, y rounded once to the dtype of x."""

    n: int
    k: int

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        ...


class Sieve(Protocol):
    """Finds the greatest output of a linear over the vocabulary without computing all of them."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """x [1, K] -> `Ops.argmax` of the linear's row, int64 [1], and its logit, float32 [1]: exactly those. None
        where it would have to compute too many, or found what is not finite."""


class Experts(Protocol):
    """The packed gated experts of one layer."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Sum over slots j, in order, of weights[:, j] * expert[ids[:, j]](x).

        x: [T, H]; ids: int32 [T, k]; weights: float32 [T, k]; result: [T, H] in x's dtype. Each expert's gate and
        up are rounded to x's dtype, so is `gated` of them; the weighted outputs are summed in float32, then rounded.
        """


class PackedExperts(Experts, Protocol):
    """Experts that lie here."""

    def slots(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """expert[ids](x[rows]), slot by slot: what `__call__` gives for k = 1 and the weight 1.

        x: [T, H]; rows, ids: int32 [S]; result: [S, H] in x's dtype. Raises IndexError for a row or an expert that is
        not there.
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
    rope_rows: Tensor | None = None  # int64 [T]: rows of the rotary tables where they are not `positions`


class KvCache(Protocol):
    """All layers' blocks on one device, in the implementation's own order of bytes."""

    blocks: int
    bytes: int

    def read_block(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """K and V of one block in the canonical order [Hkv, P, D]. For tests.

        Of a latent cache: K [1, P, D], and V its first `latent` components [1, P, latent].
        """

    # A value, as the prefix store keeps it: what one block holds of one KV head in all layers of this cache, in the
    # order [layers, (K, V), P, D], of latents [layers, P, D], in the cache's dtype and the machine's order of bytes.

    @property
    def kv_heads(self) -> int: ...

    @property
    def value_bytes(self) -> int: ...

    def export_blocks(self, blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """Copies values out: that of head g of blocks[i] goes to memory[offsets[i, g]:]; offsets [len(blocks), Hkv],
        each a multiple of 16 (the memory begins at one too). Called between steps."""

    def import_blocks(self, blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """The inverse: afterwards attention over these blocks has the bits that it had where they were exported. May
        run on another thread, beside a step that does not touch these blocks."""


class Ops(Protocol):
    """One device's kernels for one dtype (float32, bfloat16 or float16)."""

    name: str
    dtype: torch.dtype
    numerics_id: str  # kernel family and version, instruction set, compiler, dtype

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Packs a weight [N, K] (copied; the argument may be a memory-mapped view and is not kept)."""

    def sieve(self, head: Any, weight: Tensor) -> Sieve | None:
        """A sieve for a linear that this object packed from `weight` [V, H]; None where it would save no time."""

    def gated(
        self,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        act: str = "silu",
    ) -> Linear:
        """Packs the gated half of a feed-forward as one call [T, H] -> [T, F]; gate and up are [F, H].

        Both products are rounded to the dtype; then, in float32 and rounded once:
        silu, gelu, gelu_tanh, relu: act(gate) * up;
        clamped (gpt-oss): g = min(gate, 7), u = clamp(up, -7, 7): g * sigmoid(1.702 g) * (u + 1).
        """

    def experts(
        self,
        gate: Sequence[Tensor],
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        biases: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]] | None = None,
        act: str = "silu",
    ) -> PackedExperts:
        """Packs E experts: gate and up are [F, H] each, down is [H, F]; `biases` of gate, up, down; act of `gated`."""

    def join_experts(self, parts: Sequence[Any]) -> PackedExperts:
        """Experts that were packed apart, by this object, as one: those of the first part, then the next one's. The
        weights are shared, not copied."""

    def combine(self, slots: Tensor, weights: Tensor) -> Tensor:
        """Adds experts' outputs that were computed apart, with the bits of `Experts.__call__`.

        slots: [T, k, H] in the dtype, weights: float32 [T, k] -> [T, H]: the sum over j, in order, of
        weights[:, j] * slots[:, j] in float32, rounded once. One slot alone is what `Experts` gives for k = 1 with
        the weight 1. Wherever experts are computed, the answer has the same bits.
        """

    def per_head(self, weights: Sequence[Tensor]) -> Linear:
        """Packs G weights [N, K]: head g of x takes the g-th. x: [T, G K] -> [T, G N], as `linear` for each."""

    @property
    def wide(self) -> Ops:
        """The same kernels in float32: self where the dtype is float32. For gates that compute in float32."""

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of `table` [V, H] by int64 ids [T] -> [T, H]."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """weight * (x / sqrt(mean(x^2) + eps)).to(dtype): statistics in float32. [T, H] -> [T, H]

        A weight of float32 where the dtype is not: the product is taken in float32 and rounded once.
        """

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        """residual += x (rounded to the dtype, in place); then rms_norm(residual). [T, H] each."""

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias in float32, rounded once. [T, H] -> [T, H]"""

    def gated_act(self, gate_up: Tensor, act: str = "silu") -> Tensor:
        """The elementwise part of `gated`, of rows [gate | up]. [T, 2F] -> [T, F]"""

    def act(self, x: Tensor, act: str) -> Tensor:
        """silu, gelu, gelu_tanh or relu in float32, rounded once. [T, F] -> [T, F]"""

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """cap * tanh(x / cap) in float32, rounded once. [S, V] -> [S, V]"""

    def route(self, logits: Tensor, route: Route, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chooses experts as `workers.model.spec.Route` says, in float32; `bias` float32 [E] where route.bias.

        logits [T, E] -> ids int32 [T, k], weights float32 [T, k]. Slots are in the order of the choice: best score
        first, ties by the lower id.
        """

    def cache(self, layers: int, blocks: int, kv_heads: int, head_dim: int, latent: int | None = None) -> KvCache:
        """Room for keys and values. `latent`: for keys alone, whose first `latent` components are the values."""

    def cache_block_bytes(self, layers: int, kv_heads: int, head_dim: int, latent: int | None = None) -> int:
        """Bytes of one block over all layers; of a latent cache 16 * head_dim elements per layer, no more."""

    def rope_write(
        self,
        qkv: Tensor,
        heads: tuple[int, int],
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos: Tensor | None,
        sin: Tensor | None,
        cache: KvCache,
        layer: int,
        batch: Batch,
        group: int,
    ) -> Tensor:
        """Norms q and k per head (where weights [D] are given), rotates them, writes k and v into the cache.

        qkv: [T, (Hq + 2 Hkv) D] as q | k | v; heads = (Hq, Hkv); cos, sin: float32 [positions, R / 2] tables indexed by
        position (`batch.rope_rows` where it is given), R <= D even; None: nothing is rotated. Rotation of halves of
        the first R components: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in float32, rounded once; the others
        stay. Returns q: [T, Hq, D].
        """

    def latent_write(
        self,
        q_rope: Tensor,
        k_rope: Tensor,
        latent: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: KvCache,
        layer: int,
        batch: Batch,
        group: int,
    ) -> Tensor:
        """Writes the keys [latent | rotated k_rope] of a latent cache.

        q_rope: [T, Hq, R]; k_rope: [T, R]; latent: [T, L], already normed; L + R is the cache's head size. Returns
        q_rope rotated: [T, Hq, R].
        """

    def attend(
        self,
        q: Tensor,
        cache: KvCache,
        layer: int,
        batch: Batch,
        group: int,
        scale: float,
        window: int | None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """Causal attention of q [T, Hq, D] over the cache -> [T, Hq * Dv]; Dv is D, or the latent part of it.

        A row at position p sees positions max(0, p - window + 1) .. p. Sums begin at absolute block boundaries.
        `softcap`: scores (already scaled) become cap * tanh(score / cap). `sinks`: float32 [Hq], a score per head
        that joins the softmax and has no value.
        """

    def argmax(self, logits: Tensor) -> Tensor:
        """The id of each row's greatest logit, the lowest of equals; a NaN is the greatest. [S, V] -> int64 [S]"""

    def logprobs(self, logits: Tensor) -> Tensor:
        """log_softmax in float32 over the last axis, row by row. [S, V] -> float32 [S, V]"""
