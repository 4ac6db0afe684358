"""The operations on a CUDA device, through torch: an exact mode that keeps the row law, and a fast one that does not.

A kernel on a GPU is chosen by shape, and a row's place within a shape changes nothing; so the exact mode runs every
matrix product, reduction and attention in calls of fixed shapes, filled up with zeros, and the row counts of a linear
are those that were tried and found alike when its weight was packed. The fast mode calls whatever torch likes best.

Everything runs on a CPU as well, which is how its logic is tested where no GPU is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.ops import BLOCK, Batch, Linear
from workers.kernels.plain import PlainCache, PlainOps, in_calls_of

TILE = 16  # blocks of a tile: 256 positions


@dataclass(frozen=True, slots=True)
class FastLinear:
    """One call of torch's."""

    weight: Tensor
    bias: Tensor | None
    n: int
    k: int

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Layout:
    """What attention needs to know on the host, made once per batch: a copy from the device waits for it."""

    batch: Batch
    row_start: list[int]  # [S + 1]
    positions: list[int]  # [T]
    ones: Tensor  # int64: the sequences with one row


class CudaOps(PlainOps):
    """See `workers.kernels.ops.Ops`. `exact` keeps the row law."""

    name = "cuda"
    reference_rows = 128
    row_sizes = (128, 512, 2048)
    attend_rows = 64  # rows of one exact call of attention

    def __init__(self, dtype: torch.dtype, device: str = "cuda", exact: bool = True) -> None:
        self.exact = exact
        self._layout: Layout | None = None
        if torch.device(device).type == "cuda":
            # Sums in float32, and products of float32 in float32: both are off for some versions of torch.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_tf32 = False
        super().__init__(dtype, device)

    def _numerics_id(self) -> str:
        mode = f"{self.name}-{self.version}-{'exact' if self.exact else 'fast'}/torch-{torch.__version__}"
        dtype = str(self.dtype).removeprefix("torch.")
        if self.device.type != "cuda":
            return f"{mode}/{self.device.type}/threads-{torch.get_num_threads()}/{dtype}"
        properties = torch.cuda.get_device_properties(self.device)
        return f"{mode}/{properties.name}-sm{properties.major}{properties.minor}/{dtype}"

    def _product(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        w = weight.to(self.device, self.dtype, copy=True).contiguous()
        b = None if bias is None else bias.to(self.device, self.dtype, copy=True)
        return lambda x: F.linear(x, w, b)

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> Linear:  # type: ignore[override]
        if self.exact:
            return super().linear(weight, bias)
        w = weight.to(self.device, self.dtype, copy=True).contiguous()
        b = None if bias is None else bias.to(self.device, self.dtype, copy=True)
        return FastLinear(w, b, *weight.shape)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return super().rms_norm(x, weight, eps) if self.exact else F.rms_norm(x, x.shape[-1:], weight, eps)

    def _rows(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.exact and self.device.type == "cpu":  # there the place in a buffer makes a difference
            return super()._rows(f, x)
        return in_calls_of(self.reference_rows, f, x) if self.exact and x.shape[0] else f(x)

    def attend(
        self, q: Tensor, cache: PlainCache, layer: int, batch: Batch, group: int, scale: float, window: int | None
    ) -> Tensor:
        layout = self._layout
        if layout is None or layout.batch is not batch:
            row_start = batch.row_start.tolist()
            ones = [i for i in range(len(row_start) - 1) if row_start[i + 1] - row_start[i] == 1]
            ones_tensor = torch.tensor(ones, dtype=torch.int64, device=self.device)
            layout = self._layout = Layout(batch, row_start, batch.positions.tolist(), ones_tensor)
        attend = self._attend_exact if self.exact else self._attend_fast
        return attend(q, cache.data[layer], layout, group, scale, window)

    def _attend_exact(
        self, q: Tensor, data: Tensor, layout: Layout, group: int, scale: float, window: int | None
    ) -> Tensor:
        """Every row against tiles of 256 positions from position 0 on, its softmax carried along.

        For a row a tile that it does not see multiplies by 1 and adds 0: its bits do not depend on how many tiles the
        rows beside it need.
        """
        t, hq, d = q.shape
        hkv, batch, n = data.shape[2], layout.batch, self.attend_rows
        out = q.new_empty(t, hq * d)
        for begin in range(0, t, n):
            rows = torch.arange(begin, begin + n, device=q.device).clamp_(max=t - 1)  # the last one fills up
            positions = batch.positions[rows]
            table = batch.tables[group][batch.row_seq[rows].long()].long()
            tail = -table.shape[1] % TILE
            table = F.pad(table, (0, tail), value=-1)
            query = q[rows].float().view(n, hkv, hq // hkv, d) * scale
            state = _Softmax(query)
            seen = layout.positions[begin : begin + n]
            first = 0 if window is None else max(0, min(seen) - window + 1) // BLOCK // TILE
            for tile in range(first, max(seen) // BLOCK // TILE + 1):
                blocks = table[:, tile * TILE : (tile + 1) * TILE]
                at = torch.arange(tile * TILE * BLOCK, (tile + 1) * TILE * BLOCK, device=q.device)
                visible = at <= positions[:, None]
                if window is not None:
                    visible &= at > positions[:, None] - window
                state.add(*_gather(data, blocks, visible), visible)
            out[begin : begin + n] = state.result().reshape(n, -1)[: t - begin].to(q.dtype)
        return out

    def _attend_fast(
        self, q: Tensor, data: Tensor, layout: Layout, group: int, scale: float, window: int | None
    ) -> Tensor:
        """Sequences with one row in one call, padded to the longest; each other one in a call of its own."""
        t, hq, d = q.shape
        hkv, table, starts = data.shape[2], layout.batch.tables[group], layout.row_start
        out = q.new_empty(t, hq, d)
        if len(layout.ones):
            rows = layout.batch.row_start[layout.ones].long()
            mask = _mask(layout.batch.positions[rows], table.shape[1] * BLOCK, window)
            k, v = _gather(data, table[layout.ones].long(), mask)
            query = q[rows].view(len(rows), hkv, hq // hkv, d)
            mask = mask[:, None, None]
            out[rows] = F.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale).reshape(-1, hq, d)
        for sequence in range(len(starts) - 1):
            rows = slice(starts[sequence], starts[sequence + 1])
            count, last = rows.stop - rows.start, layout.positions[rows.stop - 1]
            if count == 1:
                continue
            blocks = table[sequence : sequence + 1, : last // BLOCK + 1].long()
            mask = _mask(layout.batch.positions[rows], blocks.shape[1] * BLOCK, window)
            k, v = (part[:, :, : last + 1] for part in _gather(data, blocks, mask.any(0, keepdim=True)))
            whole = count == last + 1 and window is None
            result = F.scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None], k, v, scale=scale, enable_gqa=True,
                is_causal=whole, attn_mask=None if whole else mask[:, : last + 1],
            )  # fmt: skip
            out[rows] = result[0].transpose(0, 1)
        return out.view(t, hq * d)


def _gather(data: Tensor, blocks: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [S, Hkv, W * P, D] of the blocks [S, W] of one layer [2, B, Hkv, P, D].

    What is not `seen` [S, W * P] may be another's: it reads as 0, because 0 times another's infinity would not be 0.
    """
    s, w = blocks.shape
    k, v = (part[blocks.clamp(min=0)].transpose(1, 2).reshape(s, part.shape[1], w * BLOCK, -1) for part in data)
    unseen = ~seen[:, None, :, None]
    return k.masked_fill_(unseen, 0), v.masked_fill_(unseen, 0)


def _mask(positions: Tensor, length: int, window: int | None) -> Tensor:
    """Whether the row at each of `positions` [T] sees each of `length` positions: bool [T, length]."""
    at = torch.arange(length, device=positions.device)
    mask = at <= positions[:, None]
    return mask if window is None else mask & (at > positions[:, None] - window)


class _Softmax:
    """A softmax-weighted sum that is carried from tile to tile (https://arxiv.org/abs/2112.05682)."""

    def __init__(self, query: Tensor) -> None:
        """query: float32 [R, Hkv, Hq / Hkv, D], scaled."""
        self._query = query
        self._most = query.new_full((*query.shape[:3], 1), float("-inf"))
        self._total = query.new_zeros(*query.shape[:3], 1)
        self._sum = torch.zeros_like(query)

    def add(self, k: Tensor, v: Tensor, visible: Tensor) -> None:
        """k, v: [R, Hkv, L, D]; visible: [R, L]."""
        scores = self._query @ k.float().transpose(2, 3)
        scores.masked_fill_(~visible[:, None, None], float("-inf"))
        most = torch.maximum(self._most, scores.amax(-1, keepdim=True))
        shift = most.masked_fill(most == float("-inf"), 0)  # nothing seen yet
        weights, keep = torch.exp(scores - shift), torch.exp(self._most - shift)
        self._total = self._total * keep + weights.sum(-1, keepdim=True)
        self._sum = self._sum * keep + weights @ v.float()
        self._most = most

    def result(self) -> Tensor:
        return self._sum / self._total
