"""The paged cache and attention in torch alone: their plain meaning, one row at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.kernels.checks import check_latent, check_values
from workers.kernels.ops import BLOCK, Batch


class PlainCache:
    """Blocks in the canonical order: [layers, 2 (K, V), blocks, Hkv, P, D]; of latents [layers, 1, blocks, 1, P, D]."""

    def __init__(self, data: Tensor, latent: int | None = None) -> None:
        self.data, self.latent = data, latent
        self.blocks = data.shape[2]
        self.bytes = data.numel() * data.element_size()

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer: [blocks, Hkv, P, D] each, of latents V is a part of K."""
        both = self.data[layer]
        return both[0], both[1] if self.latent is None else both[0][..., : self.latent]

    def read_block(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """K and V, each [Hkv, P, D]."""
        k, v = self.layer(layer)
        return k[block], v[block]

    @property
    def kv_heads(self) -> int:
        return self.data.shape[3]

    @property
    def value_bytes(self) -> int:
        """See `workers.kernels.ops.KvCache`."""
        return self.bytes // (self.blocks * self.kv_heads)

    def export_blocks(self, blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """See `workers.kernels.ops.KvCache`. One copy from the device for all blocks."""
        check_values(blocks, memory, offsets, self)
        values = self.data[:, :, torch.from_numpy(blocks).to(self.data.device)].permute(2, 3, 0, 1, 4, 5)
        flat = values.contiguous().cpu().view(torch.uint8).view(offsets.size, self.value_bytes).numpy()
        for value, offset in zip(flat, offsets.flat, strict=True):
            memory[offset : offset + len(value)] = value

    def import_blocks(self, blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """See `workers.kernels.ops.KvCache`. One copy to the device for all blocks."""
        check_values(blocks, memory, offsets, self)
        size = self.value_bytes
        flat = np.stack([memory[o : o + size] for o in offsets.flat]) if len(blocks) else memory[:0]
        layers, parts, _, heads, positions, dim = self.data.shape
        values = torch.from_numpy(flat).view(self.data.dtype).view(len(blocks), heads, layers, parts, positions, dim)
        at = torch.from_numpy(blocks).to(self.data.device)
        self.data[:, :, at] = values.to(self.data.device).permute(2, 3, 0, 1, 4, 5)
        if self.data.is_cuda:
            torch.cuda.current_stream(self.data.device).synchronize()  # steps run on another thread's stream


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None, batch: Batch) -> Tensor:
    """Halves of the first 2 * cos.shape[1] components of each head, in float32, rounded once. x: [T, heads, D]"""
    if cos is None or sin is None:
        return x
    rows = batch.positions if batch.rope_rows is None else batch.rope_rows
    c, s = cos[rows, None], sin[rows, None]
    turned, rest = x.split([2 * cos.shape[1], x.shape[-1] - 2 * cos.shape[1]], dim=-1)
    x1, x2 = turned.float().chunk(2, dim=-1)
    return torch.cat([torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1).to(x.dtype), rest], dim=-1)


class PlainAttention:
    """`cache`, what writes it, and `attend` of `workers.kernels.ops.Ops`."""

    dtype: torch.dtype
    device: torch.device
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]  # of the class that this is a part of

    def cache(self, layers: int, blocks: int, kv_heads: int, head_dim: int, latent: int | None = None) -> PlainCache:
        check_latent(kv_heads, head_dim, latent)
        shape = (layers, 1 if latent else 2, blocks, kv_heads, BLOCK, head_dim)
        return PlainCache(torch.zeros(shape, dtype=self.dtype, device=self.device), latent)

    def cache_block_bytes(self, layers: int, kv_heads: int, head_dim: int, latent: int | None = None) -> int:
        check_latent(kv_heads, head_dim, latent)
        return layers * (1 if latent else 2) * kv_heads * BLOCK * head_dim * self.dtype.itemsize

    def rope_write(
        self,
        qkv: Tensor,
        heads: tuple[int, int],
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos: Tensor | None,
        sin: Tensor | None,
        cache: PlainCache,
        layer: int,
        batch: Batch,
        group: int,
    ) -> Tensor:
        hq, hkv = heads
        q, k, v = qkv.view(qkv.shape[0], hq + 2 * hkv, -1).split([hq, hkv, hkv], dim=1)
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        blocks, offsets = _slots(batch, group)
        keys, values = cache.layer(layer)
        keys[blocks, :, offsets] = rotate(k, cos, sin, batch)
        values[blocks, :, offsets] = v
        return rotate(q, cos, sin, batch)

    def latent_write(
        self,
        q_rope: Tensor,
        k_rope: Tensor,
        latent: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: PlainCache,
        layer: int,
        batch: Batch,
        group: int,
    ) -> Tensor:
        blocks, offsets = _slots(batch, group)
        turned = rotate(k_rope[:, None], cos, sin, batch)
        cache.layer(layer)[0][blocks, :, offsets] = torch.cat([latent[:, None], turned], dim=-1)
        return rotate(q_rope, cos, sin, batch)

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
        t, hq, d = q.shape
        pages = cache.layer(layer)
        hkv, dv = pages[1].shape[1], pages[1].shape[3]
        out = q.new_empty(t, hq * dv)
        sequences, positions = batch.row_seq.tolist(), batch.positions.tolist()
        sink = None if sinks is None else sinks.view(hkv, -1, 1)
        for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            first = 0 if window is None else max(0, position - window + 1)
            begin = first // BLOCK  # sums begin at a block boundary
            blocks = batch.tables[group][sequence, begin : position // BLOCK + 1].long()
            k, v = (
                part[blocks].float().transpose(0, 1).flatten(1, 2)[:, : position + 1 - begin * BLOCK] for part in pages
            )  # [Hkv, positions, D]
            query = q[row].float().view(hkv, -1, d).clone()  # [Hkv, Hq / Hkv, D], where a fresh buffer begins
            scores = query @ k.transpose(1, 2) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores[..., : first - begin * BLOCK] = float("-inf")
            if sink is None:
                weights = torch.softmax(scores, -1)
            else:
                weights = torch.softmax(torch.cat([sink, scores], -1), -1)[..., 1:]
            out[row] = (weights @ _seen(v, first - begin * BLOCK)).reshape(-1).to(q.dtype)
        return out


def _seen(v: Tensor, first: int) -> Tensor:
    """v [Hkv, positions, D] from `first` on; 0 before: 0 times what stands there might be no number."""
    if first:
        v[:, :first] = 0
    return v


def _slots(batch: Batch, group: int) -> tuple[Tensor, Tensor]:
    """Each row's block and its place there: int64 [T] each."""
    blocks = batch.tables[group][batch.row_seq.long(), batch.positions // BLOCK].long()
    return blocks, batch.positions % BLOCK
