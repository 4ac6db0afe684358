"""Attention of other architectures: latents, sinks, capped scores, partial rotation; its meaning and the row law."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from implementations import EPS
from test_attention import Heads, batch_of, one_torch_thread, poison, tables
from torch import Tensor

from workers.kernels.native import NativeOps
from workers.kernels.ops import BLOCK, Batch, KvCache, Ops

__all__ = ["one_torch_thread"]  # a fixture


class Kinds(Heads):
    """A layer with sinks, a cap, or a latent cache (`latent` of the head's components)."""

    def __init__(
        self, ops: Ops, dim: int, kv_heads: int, ratio: int, window: int | None, sinks: bool, cap: float | None,
        latent: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(ops, dim, kv_heads, ratio, window)
        self.cap, self.latent = cap, latent
        generator = torch.Generator().manual_seed(3)
        self.sinks = torch.randn(self.heads, generator=generator) * 2 if sinks else None

    def cache(self, blocks: int) -> KvCache:
        cache = self.ops.cache(2, blocks, self.kv_heads, self.dim, self.latent)
        poison(cache)
        return cache

    def rows(self, count: int, seed: int) -> Tensor:
        if self.latent is None:
            return super().rows(count, seed)
        shape = (count, (self.heads + 1) * self.dim)  # queries | one key
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.ops.dtype)

    def step(self, qkv: Tensor, cache: KvCache, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.latent is None:
            cos, sin = tables(self.dim)
            heads = (self.heads, self.kv_heads)
            q = self.ops.rope_write(qkv, heads, None, None, 1e-6, cos, sin, cache, 1, batch, 0)
        else:
            cos, sin = tables(self.dim - self.latent)
            x = qkv.view(len(qkv), self.heads + 1, self.dim)
            latent, rope = x.split([self.latent, self.dim - self.latent], dim=-1)
            turned = self.ops.latent_write(rope[:, :-1], rope[:, -1], latent[:, -1], cos, sin, cache, 1, batch, 0)
            q = torch.cat([latent[:, :-1], turned], dim=-1)
        scale = self.dim**-0.5
        return q, self.ops.attend(q, cache, 1, batch, 0, scale, self.window, self.sinks, self.cap)

    def expected(self, q: Tensor, cache: KvCache, table: Sequence[int]) -> Tensor:
        pages = [cache.read_block(1, b) for b in table]
        ratio = self.heads // self.kv_heads
        k, v = (torch.cat([p[i] for p in pages], 1)[:, : len(q)].double() for i in (0, 1))
        k, v = k.repeat_interleave(ratio, 0), v.repeat_interleave(ratio, 0)  # [Hq, T, D]
        scores = q.double().transpose(0, 1) @ k.mT * self.dim**-0.5
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        rows = torch.arange(len(q))
        distance = rows[:, None] - rows
        scores = scores.masked_fill(~((distance >= 0) & (distance < (self.window or len(q)))), -torch.inf)
        if self.sinks is not None:
            column = self.sinks.double()[:, None, None].expand(-1, len(q), 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)


KINDS = [  # head_dim, KV heads, query heads for each, rows, window, sinks, cap, latent
    (64, 2, 4, 70, None, True, None, None),
    (64, 2, 4, 150, 20, True, None, None),
    (256, 1, 2, 40, None, False, 3.0, None),
    (24, 2, 3, 70, 30, True, 2.0, None),
    (48, 1, 5, 70, None, False, None, 32),
    (40, 1, 3, 150, 21, True, 2.0, 24),
    (576, 1, 4, 40, None, False, None, 512),
    (34, 1, 16, 33, None, False, None, 20),
]


@pytest.mark.parametrize(("dim", "kv_heads", "ratio", "rows", "window", "sinks", "cap", "latent"), KINDS)
def test_meaning_and_row_law(
    ops: Ops, dim: int, kv_heads: int, ratio: int, rows: int, window: int | None, sinks: bool, cap: float | None,
    latent: int | None,
) -> None:  # fmt: skip
    """Close to float64; then in chunks, in other blocks beside another sequence, and decoded alone: equal bits."""
    layer = Kinds(ops, dim, kv_heads, ratio, window, sinks, cap, latent)
    qkv, other = layer.rows(rows, seed=rows), layer.rows(rows, seed=1)
    q, cache, wanted = layer.whole(qkv)
    blocks = -(-rows // BLOCK)
    exact = layer.expected(q, cache, range(blocks))
    assert wanted.shape == exact.shape == (rows, layer.heads * (latent or dim))
    assert (wanted.double() - exact).abs().max() < 4 * EPS[ops.dtype] + 3e-6
    ids = torch.randperm(2 * blocks, generator=torch.Generator().manual_seed(0)).tolist()
    mine, others = ids[:blocks], ids[blocks:]
    cache = layer.cache(2 * blocks)
    for a, b in pairwise(sorted({0, 1, rows // 3, rows // 2 + 1, rows})):
        both = torch.cat([other[a:b], qkv[a:b]])
        _, result = layer.step(both, cache, batch_of([(a, b), (a, b)], [others, mine]))
        assert torch.equal(result[b - a :], wanted[a:b]), (a, b)
    _, alone = layer.step(qkv[-1:], cache, batch_of([(rows - 1, rows)], [mine]))
    assert torch.equal(alone, wanted[-1:])


@pytest.mark.parametrize("latent", [None, 32])
def test_sinks_and_caps_over_many_segments(native: NativeOps, latent: int | None) -> None:
    """Beyond 1,024 positions, on one thread and two."""
    layer = Kinds(native, 48, 1, 3, None, True, 4.0, latent)
    rows = 1300
    qkv = layer.rows(rows, seed=1)
    q, cache, wanted = layer.whole(qkv)
    table = range(-(-rows // BLOCK))
    assert (wanted.double() - layer.expected(q, cache, table)).abs().max() < 4 * EPS[native.dtype] + 3e-6
    threads = native.threads
    try:
        for count in (1, 2):
            native.lib.understudy_set_threads(count)
            for t in (0, 1023, 1024, rows - 1):
                alone = layer.step(qkv[t : t + 1], cache, batch_of([(t, t + 1)], [table]))[1]
                assert torch.equal(alone, wanted[t : t + 1])
    finally:
        native.lib.understudy_set_threads(threads)


def test_a_sink_far_above_takes_all_the_weight(ops: Ops) -> None:
    layer = Kinds(ops, 16, 1, 2, None, True, None)
    assert layer.sinks is not None
    layer.sinks = torch.tensor([1e4, -1e4])
    plain = Kinds(ops, 16, 1, 2, None, False, None)
    qkv = layer.rows(5, 0)
    got, want = layer.whole(qkv)[2], plain.whole(qkv)[2]
    assert got[:, :16].abs().max() < 1e-6
    torch.testing.assert_close(got[:, 16:], want[:, 16:])


def test_a_latent_cache_holds_keys_alone(ops: Ops) -> None:
    assert ops.cache_block_bytes(3, 1, 576, 512) == 3 * 16 * 576 * ops.dtype.itemsize
    cache = ops.cache(3, 2, 1, 576, 512)
    assert cache.bytes == 2 * ops.cache_block_bytes(3, 1, 576, 512)
    assert [tuple(x.shape) for x in cache.read_block(2, 1)] == [(1, 16, 576), (1, 16, 512)]
    with pytest.raises(ValueError, match="1 KV head"):
        ops.cache(1, 1, 2, 64, 32)
    with pytest.raises(ValueError, match="of 64"):
        ops.cache(1, 1, 1, 64, 65)


def test_a_moved_latent_block_is_the_same(native: NativeOps) -> None:
    layer = Kinds(native, 48, 1, 3, None, False, None, 32)
    _, cache, _ = layer.whole(layer.rows(16, 2))
    moved = layer.cache(2)
    moved.write_block(1, 1, *cache.read_block(1, 0))
    assert all(map(torch.equal, moved.read_block(1, 1), cache.read_block(1, 0)))


@pytest.mark.parametrize("turned", [0, 8, 16, 32])
@pytest.mark.parametrize("normed", [False, True])
def test_partial_rotation(ops: Ops, turned: int, normed: bool) -> None:
    """The first `turned` of 40 components rotate, by rows of the tables that are not the positions."""
    dim, rows = 40, 21
    layer = Heads(ops, dim, 2, 3)
    qkv, cache = layer.rows(rows, seed=5), layer.cache(2)
    cos, sin = tables(turned) if turned else (None, None)
    weight = 1 + 0.1 * torch.randn(dim, generator=torch.Generator().manual_seed(0)) if normed else None  # float32
    batch = batch_of([(0, rows)], [[1, 0]])
    batch.rope_rows = torch.arange(rows) * 3 + 7
    q = ops.rope_write(qkv, (6, 2), weight, weight, 1e-6, cos, sin, cache, 1, batch, 0)
    k = torch.cat([cache.read_block(1, b)[0] for b in (1, 0)], 1)[:, :rows].transpose(0, 1)
    x = qkv.view(rows, 10, dim)[:, :8].double()
    if weight is not None:
        x = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()).to(ops.dtype).double()
    if turned:
        c, s = (table[batch.rope_rows, None].double() for table in tables(turned))
        a, b, rest = x.split([turned // 2, turned // 2, dim - turned], dim=-1)
        x = torch.cat([a * c - b * s, b * c + a * s, rest], -1)
    error = (torch.cat([q, k], 1).double() - x).abs().max()
    assert error < (24 if normed else 8) * EPS[ops.dtype] + 1e-6
    if not normed:
        assert torch.equal(q[..., turned:], qkv.view(rows, 10, dim)[:, :6, turned:])


def test_wrong_kinds_are_named(native: NativeOps) -> None:
    layer = Kinds(native, 48, 1, 3, None, False, None, 32)
    cache, batch = layer.cache(1), batch_of([(0, 3)], [[0]])
    cos, sin = tables(16)
    q, k, latent = (torch.zeros(s, dtype=native.dtype) for s in ((3, 3, 16), (3, 16), (3, 32)))
    native.latent_write(q, k, latent, cos, sin, cache, 1, batch, 0)
    with pytest.raises(ValueError, match=r"latent is .*\(3, 31\).*\(3, 32\)"):
        native.latent_write(q, k, latent[:, :31], cos, sin, cache, 1, batch, 0)
    with pytest.raises(ValueError, match="cos has 4 columns"):
        native.latent_write(q, k, latent, *tables(8), cache, 1, batch, 0)
    whole = torch.zeros(3, 3, 48, dtype=native.dtype)
    with pytest.raises(ValueError, match=r"sinks are .*float32 \(3,\)"):
        native.attend(whole, cache, 1, batch, 0, 0.1, None, torch.zeros(2))
    with pytest.raises(ValueError, match="softcap is 0"):
        native.attend(whole, cache, 1, batch, 0, 0.1, None, None, 0.0)
    with pytest.raises(ValueError, match="latent 32"):
        native.rope_write(
            torch.zeros(3, 240, dtype=native.dtype), (3, 1), None, None, 0.1, cos, sin, cache, 1, batch, 0
        )
    batch = batch_of([(0, 3)], [[0]])
    batch.rope_rows = torch.tensor([0, 1, 1600])
    with pytest.raises(ValueError, match="cos has 1600 rows; the batch reaches 1600"):
        native.latent_write(q, k, latent, cos, sin, cache, 1, batch, 0)
