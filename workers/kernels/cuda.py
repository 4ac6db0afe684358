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
from workers.kernels.plain import PlainOps
from workers.kernels.plain_attention import PlainCache
from workers.kernels.plain_linear import in_calls_of

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


@dataclass(frozen=True, slots=True)
class Scores:
    """What becomes of q . k: see `Ops.attend`."""

    scale: float
    window: int | None
    sinks: Tensor | None
    softcap: float | None

    @property
    def plain(self) -> bool:
        """Whether torch's own attention can do it."""
        return self.sinks is None and self.softcap is None

    def capped(self, x: Tensor) -> Tensor:
        """Scaled scores, capped where they are to be."""
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


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
        if self.exact or weight.dtype != x.dtype:
            return super().rms_norm(x, weight, eps)
        return F.rms_norm(x, x.shape[-1:], weight, eps)

    def _in_float32(self) -> CudaOps:
        return CudaOps(torch.float32, str(self.device), self.exact)

    def _rows(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.exact and self.device.type == "cpu":  # there the place in a buffer makes a difference
            return super()._rows(f, x)
        return in_calls_of(self.reference_rows, f, x) if self.exact and x.shape[0] else f(x)

    def attend(
        self,
        q: Tensor,
        cache: PlainCache,
        layer: int,
        batch: Batch,
        group: int,
        scale: float,
        window: int | None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        layout = self._layout
        if layout is None or layout.batch is not batch:
            row_start = batch.row_start.tolist()
            ones = [i for i in range(len(row_start) - 1) if row_start[i + 1] - row_start[i] == 1]
            ones_tensor = torch.tensor(ones, dtype=torch.int64, device=self.device)
            layout = self._layout = Layout(batch, row_start, batch.positions.tolist(), ones_tensor)
        attend = self._attend_exact if self.exact else self._attend_fast
        return attend(q, cache.layer(layer), layout, group, Scores(scale, window, sinks, softcap))

    def _attend_exact(
        self, q: Tensor, pages: tuple[Tensor, Tensor], layout: Layout, group: int, scores: Scores
    ) -> Tensor:
        """Every row against tiles of 256 positions from position 0 on, its softmax carried along.

        For a row a tile that it does not see multiplies by 1 and adds 0: its bits do not depend on how many tiles the
        rows beside it need.
        """
        t, hq, d = q.shape
        hkv, batch, n, window = pages[0].shape[1], layout.batch, self.attend_rows, scores.window
        out = q.new_empty(t, hq * pages[1].shape[-1])
        for begin in range(0, t, n):
            rows = torch.arange(begin, begin + n, device=q.device).clamp_(max=t - 1)  # the last one fills up
            positions = batch.positions[rows]
            table = batch.tables[group][batch.row_seq[rows].long()].long()
            tail = -table.shape[1] % TILE
            table = F.pad(table, (0, tail), value=-1)
            query = q[rows].float().view(n, hkv, hq // hkv, d) * scores.scale
            state = _Softmax(query, pages[1].shape[-1], scores.softcap)
            seen = layout.positions[begin : begin + n]
            first = 0 if window is None else max(0, min(seen) - window + 1) // BLOCK // TILE
            for tile in range(first, max(seen) // BLOCK // TILE + 1):
                blocks = table[:, tile * TILE : (tile + 1) * TILE]
                at = torch.arange(tile * TILE * BLOCK, (tile + 1) * TILE * BLOCK, device=q.device)
                visible = at <= positions[:, None]
                if window is not None:
                    visible &= at > positions[:, None] - window
                state.add(*_gather(pages, blocks, visible), visible)
            out[begin : begin + n] = state.result(scores.sinks).reshape(n, -1)[: t - begin].to(q.dtype)
        return out

    def _attend_fast(
        self, q: Tensor, pages: tuple[Tensor, Tensor], layout: Layout, group: int, scores: Scores
    ) -> Tensor:
        """Sequences with one row in one call, padded to the longest; each other one in a call of its own."""
        t, hq, d = q.shape
        hkv, table, starts = pages[0].shape[1], layout.batch.tables[group], layout.row_start
        out = q.new_empty(t, hq, pages[1].shape[-1])
        if len(layout.ones):
            rows = layout.batch.row_start[layout.ones].long()
            mask = _mask(layout.batch.positions[rows], table.shape[1] * BLOCK, scores.window)
            k, v = _gather(pages, table[layout.ones].long(), mask)
            query = q[rows].view(len(rows), hkv, hq // hkv, d)  # heads that share a KV head as rows
            sinks = None if scores.sinks is None else scores.sinks.view(hkv, -1, 1)
            result = _attention(query, k, v, mask[:, None, None], scores, sinks)
            out[rows] = result.reshape(len(rows), hq, -1)
        for sequence in range(len(starts) - 1):
            rows = slice(starts[sequence], starts[sequence + 1])
            count, last = rows.stop - rows.start, layout.positions[rows.stop - 1]
            if count == 1:
                continue
            blocks = table[sequence : sequence + 1, : last // BLOCK + 1].long()
            mask = _mask(layout.batch.positions[rows], blocks.shape[1] * BLOCK, scores.window)
            k, v = (part[:, :, : last + 1] for part in _gather(pages, blocks, mask.any(0, keepdim=True)))
            whole = count == last + 1 and scores.window is None and scores.plain
            mask_of = None if whole else mask[:, : last + 1]
            sinks = None if scores.sinks is None else scores.sinks[:, None, None]
            out[rows] = _attention(q[rows].transpose(0, 1)[None], k, v, mask_of, scores, sinks)[0].transpose(0, 1)
        return out.view(t, -1)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scores: Scores, sinks: Tensor | None) -> Tensor:
    """q [S, Hq, T, D] over k, v [S, Hkv, L, D]; without a mask it is causal. `sinks` spread like the scores."""
    shared = q.shape[1] != k.shape[1]
    if scores.plain:
        return F.scaled_dot_product_attention(
            q, k, v, scale=scores.scale, enable_gqa=shared, attn_mask=mask, is_causal=mask is None
        )
    if shared:
        k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for part in (k, v))
    x = scores.capped((q @ k.transpose(2, 3)).float() * scores.scale)
    if mask is not None:
        x = x.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        x = torch.cat([sinks.expand(*x.shape[:3], 1), x], -1)
    weights = torch.softmax(x, -1)
    return (weights if sinks is None else weights[..., 1:]).to(v.dtype) @ v


def _gather(pages: tuple[Tensor, Tensor], blocks: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """K and V [S, Hkv, W * P, D] of the blocks [S, W] of one layer's pages, [B, Hkv, P, D] each.

    What is not `seen` [S, W * P] may be another's: it reads as 0, because 0 times another's infinity would not be 0.
    """
    s, w = blocks.shape
    k, v = (part[blocks.clamp(min=0)].transpose(1, 2).reshape(s, part.shape[1], w * BLOCK, -1) for part in pages)
    unseen = ~seen[:, None, :, None]
    return k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)


def _mask(positions: Tensor, length: int, window: int | None) -> Tensor:
    """Whether the row at each of `positions` [T] sees each of `length` positions: bool [T, length]."""
    at = torch.arange(length, device=positions.device)
    mask = at <= positions[:, None]
    return mask if window is None else mask & (at > positions[:, None] - window)


class _Softmax:
    """A softmax-weighted sum that is carried from tile to tile (https://arxiv.org/abs/2112.05682)."""

    def __init__(self, query: Tensor, dv: int, softcap: float | None) -> None:
        """query: float32 [R, Hkv, Hq / Hkv, D], scaled; dv: components of a value."""
        self._query, self._softcap = query, softcap
        self._most = query.new_full((*query.shape[:3], 1), float("-inf"))
        self._total = query.new_zeros(*query.shape[:3], 1)
        self._sum = query.new_zeros(*query.shape[:3], dv)

    def add(self, k: Tensor, v: Tensor, visible: Tensor) -> None:
        """k, v: [R, Hkv, L, D]; visible: [R, L]."""
        scores = self._query @ k.float().transpose(2, 3)
        if self._softcap is not None:
            scores = self._softcap * torch.tanh(scores / self._softcap)
        scores.masked_fill_(~visible[:, None, None], float("-inf"))
        most, keep = self._raise(scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - most)
        self._total = self._total * keep + weights.sum(-1, keepdim=True)
        self._sum = self._sum * keep + weights @ v.float()

    def result(self, sinks: Tensor | None) -> Tensor:
        """[R, Hkv, Hq / Hkv, dv]; `sinks` [Hq] join last."""
        if sinks is not None:
            sink = sinks.view(1, *self._most.shape[1:]).expand_as(self._most)
            most, keep = self._raise(sink)
            self._total, self._sum = self._total * keep + torch.exp(sink - most), self._sum * keep
        return self._sum / self._total

    def _raise(self, most: Tensor) -> tuple[Tensor, Tensor]:
        """Takes `most` into the maximum: what to subtract now, and the factor for what was summed before."""
        most = torch.maximum(self._most, most)
        shift = most.masked_fill(most == float("-inf"), 0)  # nothing seen yet
        keep = torch.exp(self._most - shift)
        self._most = most
        return shift, keep
