"""Attention and the KV-cache of every implementation of Ops: what they compute, and the row law in all its forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache as cached
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import EPS, KINDS, get
from torch import Tensor

from workers.kernels.native import NativeOps
from workers.kernels.native_attention import KvCache as NativeCache
from workers.kernels.ops import BLOCK, Batch, Ops
from workers.kernels.ops import KvCache as Cache
from workers.kernels.plain_attention import PlainCache

CONTEXT = 1600


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """The tensors here are too small to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cached
def tables(head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation, float32 [CONTEXT, D / 2]."""
    half = head_dim // 2
    angles = torch.arange(CONTEXT)[:, None] * 10000.0 ** -(torch.arange(half) / half)
    return angles.cos().float().contiguous(), angles.sin().float().contiguous()


def poison(cache: Cache) -> None:
    """Not-a-numbers everywhere: what nobody wrote must reach nobody."""
    if isinstance(cache, PlainCache):
        cache.data.fill_(float("nan"))
    else:
        assert isinstance(cache, NativeCache)
        cache.storage.fill_(255)


def batch_of(chunks: Sequence[tuple[int, int]], block_tables: Sequence[Sequence[int]]) -> Batch:
    """Sequence s has rows at positions [start, end) of chunks[s]; its table is block_tables[s]."""
    width = max(len(t) for t in block_tables)
    starts = [0]
    for start, end in chunks:
        starts.append(starts[-1] + end - start)
    return Batch(
        positions=torch.cat([torch.arange(a, b) for a, b in chunks]),
        row_start=torch.tensor(starts, dtype=torch.int32),
        tables=[torch.tensor([[*t, *[-1] * (width - len(t))] for t in block_tables], dtype=torch.int32)],
        row_seq=torch.cat([torch.full((b - a,), s, dtype=torch.int32) for s, (a, b) in enumerate(chunks)]),
    )


class Heads:
    """One attention layer's shape, and steps over a cache of it."""

    def __init__(self, ops: Ops, head_dim: int, kv_heads: int, ratio: int, window: int | None = None) -> None:
        self.ops, self.dim, self.kv_heads, self.heads = ops, head_dim, kv_heads, kv_heads * ratio
        self.window = window

    def cache(self, blocks: int) -> Cache:
        cache = self.ops.cache(2, blocks, self.kv_heads, self.dim)
        poison(cache)
        return cache

    def rows(self, count: int, seed: int) -> Tensor:
        """Random q | k | v."""
        shape = (count, (self.heads + 2 * self.kv_heads) * self.dim)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.ops.dtype)

    def step(self, qkv: Tensor, cache: Cache, batch: Batch) -> tuple[Tensor, Tensor]:
        """Writes the rows into layer 1 and attends: rotated q, result [T, Hq D]."""
        cos, sin = tables(self.dim)
        heads = (self.heads, self.kv_heads)
        q = self.ops.rope_write(qkv, heads, None, None, 1e-6, cos, sin, cache, 1, batch, 0)
        return q, self.ops.attend(q, cache, 1, batch, 0, self.dim**-0.5, self.window)

    def whole(self, qkv: Tensor) -> tuple[Tensor, Cache, Tensor]:
        """All rows as one prompt in blocks 0, 1, ...: q, cache, result."""
        blocks = -(-len(qkv) // BLOCK)
        cache = self.cache(blocks)
        q, result = self.step(qkv, cache, batch_of([(0, len(qkv))], [range(blocks)]))
        return q, cache, result

    def expected(self, q: Tensor, cache: Cache, table: Sequence[int]) -> Tensor:
        """The definition, in float64, from what the cache holds."""
        pages = [cache.read_block(1, b) for b in table]
        ratio = self.heads // self.kv_heads
        k, v = (torch.cat([p[i] for p in pages], 1)[:, : len(q)].double() for i in (0, 1))
        k, v = k.repeat_interleave(ratio, 0), v.repeat_interleave(ratio, 0)  # [Hq, T, D]
        scores = q.double().transpose(0, 1) @ k.mT * self.dim**-0.5
        rows = torch.arange(len(q))
        distance = rows[:, None] - rows
        seen = (distance >= 0) & (distance < (self.window or len(q)))
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


SHAPES = [  # head_dim, KV heads, query heads for each, rows, window
    (8, 4, 2, 70, None),
    (2, 1, 1, 33, 5),
    (24, 1, 3, 50, 16),
    (64, 2, 7, 150, None),
    (64, 2, 7, 150, 40),
    (80, 1, 1, 64, 1),
    (96, 2, 2, 40, None),
    (128, 1, 4, 140, 129),
    (256, 1, 2, 20, None),
]


@pytest.mark.parametrize(("head_dim", "kv_heads", "ratio", "rows", "window"), SHAPES)
def test_close_to_float64(ops: Ops, head_dim: int, kv_heads: int, ratio: int, rows: int, window: int | None) -> None:
    layer = Heads(ops, head_dim, kv_heads, ratio, window)
    q, cache, result = layer.whole(layer.rows(rows, seed=rows))
    wanted = layer.expected(q, cache, range(-(-rows // BLOCK)))
    assert result.shape == (rows, layer.heads * head_dim)
    assert result.dtype == ops.dtype
    # Values are of the order of 1: half a unit for the result, one for the weights, and float32's own error.
    assert (result.double() - wanted).abs().max() < 4 * EPS[ops.dtype] + 2e-6


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int, int | None, list[int], int]:
    head_dim = draw(st.sampled_from([2, 8, 16, 24, 32, 64, 80]))
    rows = draw(st.integers(1, 160))
    window = draw(st.none() | st.integers(1, rows))
    cuts = draw(st.lists(st.integers(1, rows), max_size=8))
    return (
        head_dim,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 7)),
        window,
        sorted({0, *cuts, rows}),
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(layout=layouts())
def test_row_law(kind: str, layout: tuple[int, int, int, int | None, list[int], int]) -> None:
    """The same sequence in chunks, between two others, in other blocks, and then decoded alone: equal bits."""
    head_dim, kv_heads, ratio, window, cuts, seed = layout
    layer = Heads(get(kind), head_dim, kv_heads, ratio, window)
    rows = cuts[-1]
    qkv, before, after = layer.rows(rows, seed), layer.rows(rows + 7, seed + 1), layer.rows(rows, seed + 2)
    _, _, wanted = layer.whole(qkv)
    blocks = -(-(rows + 7) // BLOCK)
    ids = torch.randperm(3 * blocks + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    block_tables = [ids[i * blocks : (i + 1) * blocks] for i in range(3)]
    cache = layer.cache(3 * blocks + 2)
    for a, b in pairwise(cuts):
        behind = 0 if window is None else max(0, a - window + 1) // BLOCK
        mine = [-1 if i < behind else block for i, block in enumerate(block_tables[1])]
        other = (0, rows + 7) if a == 0 else (rows + 6, rows + 7)
        chunks = [other, (a, b), (a, b)]
        parts = [before[slice(*other)], qkv[a:b], after[a:b]]
        _, result = layer.step(torch.cat(parts), cache, batch_of(chunks, [block_tables[0], mine, block_tables[2]]))
        assert torch.equal(result[len(parts[0]) :][: b - a], wanted[a:b])
    last = batch_of([(rows - 1, rows)], [block_tables[1]])
    assert torch.equal(layer.step(qkv[-1:], cache, last)[1], wanted[-1:])


@pytest.mark.parametrize(("ratio", "window"), [(3, None), (1, 1100), (2, 30)])
def test_long_context_on_any_number_of_threads(native: NativeOps, ratio: int, window: int | None) -> None:
    """Beyond 1,024 positions one row's segments may run on several threads; nothing of it shows."""
    layer = Heads(native, 32, 1, ratio, window)
    rows = 1450
    qkv = layer.rows(rows, seed=1)
    q, cache, wanted = layer.whole(qkv)
    table = range(-(-rows // BLOCK))
    some = [0, 1023, 1024, 1100, rows - 1]
    exact = layer.expected(q, cache, table)
    assert (wanted.double() - exact).abs().max() < 4 * EPS[native.dtype] + 2e-6
    threads = native.threads
    try:
        for count in (1, 2, 3):
            native.lib.understudy_set_threads(count)
            for t in some:
                assert torch.equal(
                    layer.step(qkv[t : t + 1], cache, batch_of([(t, t + 1)], [table]))[1], wanted[t : t + 1]
                )
            assert torch.equal(layer.step(qkv[900:], cache, batch_of([(900, rows)], [table]))[1], wanted[900:])
    finally:
        native.lib.understudy_set_threads(threads)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_a_row_does_not_see_cannot_reach_it(native: NativeOps, value: float) -> None:
    """Not even where its own sequence holds values that are no numbers."""
    layer = Heads(native, 64, 2, 4, window=20)
    clean = layer.rows(100, seed=3)
    _, _, wanted = layer.whole(clean)
    dirty = clean.clone()
    dirty[50, layer.heads * 64 :] = value
    _, _, result = layer.whole(dirty)
    assert torch.equal(result[:50], wanted[:50])
    assert torch.equal(result[70:], wanted[70:])
    assert not result[50:70].isfinite().all(-1).any()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_rope_write_rotates_and_keeps(ops: Ops, head_dim: int, normed: bool) -> None:
    layer = Heads(ops, head_dim, 2, 3)
    rows, half = 21, head_dim // 2
    qkv = layer.rows(rows, seed=5)
    cos, sin = tables(head_dim)
    weights = [
        (1 + 0.1 * torch.randn(head_dim, generator=torch.Generator().manual_seed(i))).to(ops.dtype) for i in (0, 1)
    ]
    norms = weights if normed else [None, None]
    cache = layer.cache(4)
    batch = batch_of([(0, rows)], [[3, 1]])
    q = ops.rope_write(qkv, (6, 2), norms[0], norms[1], 1e-6, cos, sin, cache, 1, batch, 0)
    k = torch.cat([cache.read_block(1, b)[0] for b in (3, 1)], 1)[:, :rows]
    v = torch.cat([cache.read_block(1, b)[1] for b in (3, 1)], 1)[:, :rows]
    x = qkv.view(rows, 10, head_dim)
    assert torch.equal(v, x[:, 8:].transpose(0, 1))
    for got, heads, weight in ((q, x[:, :6], norms[0]), (k.transpose(0, 1), x[:, 6:8], norms[1])):
        y = heads.double()
        if weight is not None:
            y = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt()).to(ops.dtype)
            y = (weight * y).double()
        c, s = cos[:rows, None].double(), sin[:rows, None].double()
        wanted = torch.cat([y[..., :half] * c - y[..., half:] * s, y[..., half:] * c + y[..., :half] * s], -1)
        # Values up to 8; where a norm's rounding falls the other way, a whole unit.
        assert (got.double() - wanted).abs().max() < (24 if normed else 8) * EPS[ops.dtype] + 1e-6


def test_blocks_are_read_as_they_were_written(native: NativeOps) -> None:
    cache = native.cache(3, 5, 2, 24)
    assert cache.bytes == 5 * native.cache_block_bytes(3, 2, 24)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, BLOCK, 24, generator=generator).to(native.dtype) for _ in range(2))
    cache.write_block(2, 4, k, v)
    cache.write_block(1, 4, v, k)
    assert all(map(torch.equal, cache.read_block(2, 4), (k, v)))
    assert all(map(torch.equal, cache.read_block(1, 4), (v, k)))
    assert not any(x.any() for x in cache.read_block(2, 3))


def test_a_moved_block_is_the_same_block(native: NativeOps) -> None:
    """What one cache wrote, another reads: the way through a store."""
    layer = Heads(native, 64, 2, 2)
    qkv = layer.rows(40, seed=9)
    _, cache, wanted = layer.whole(qkv)
    moved = layer.cache(9)
    for old, new in ((0, 7), (1, 2)):
        moved.write_block(1, new, *cache.read_block(1, old))
    _, result = layer.step(qkv[32:], moved, batch_of([(32, 40)], [[7, 2, 5]]))
    assert torch.equal(result, wanted[32:])


def test_no_rows(ops: Ops) -> None:
    layer = Heads(ops, 16, 1, 2)
    batch = Batch(
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int32),
        [torch.zeros(0, 1, dtype=torch.int32)],
        torch.zeros(0, dtype=torch.int32),
    )
    assert layer.ops.attend(layer.rows(0, 0).view(0, 4, 16)[:, :2], layer.cache(1), 1, batch, 0, 0.25, None).shape == (
        0,
        32,
    )


def test_wrong_tables_and_norms_are_named(native: NativeOps) -> None:
    layer = Heads(native, 16, 2, 2)
    cache, batch, qkv = layer.cache(1), batch_of([(0, 3)], [[0]]), layer.rows(3, 0)
    cos, sin = tables(16)
    norm = torch.ones(16, dtype=native.dtype)

    def write(cos: Tensor = cos, sin: Tensor = sin, q_norm: Tensor = norm, k_norm: Tensor = norm, at: int = 1) -> None:
        native.rope_write(qkv, (4, 2), q_norm, k_norm, 1e-6, cos, sin, cache, at, batch, 0)

    write()
    with pytest.raises(ValueError, match=r"cos is torch.float64 .*float32 \[context, 8 or fewer\]"):
        write(cos=cos.double())
    with pytest.raises(ValueError, match="sin has 2 rows; the batch reaches 2"):
        write(sin=sin[:2])
    with pytest.raises(ValueError, match=r"sin is .* 4\); a contiguous"):
        write(sin=sin[:, :4])
    with pytest.raises(ValueError, match=r"sin \(1600, 4\); they must be of one shape"):
        write(sin=sin[:, :4].contiguous())
    with pytest.raises(ValueError, match=r"q_norm is .*\(15,\)"):
        write(q_norm=norm[:15])
    with pytest.raises(ValueError, match=r"k_norm is .*float64.* or float32"):
        write(k_norm=norm.double())
    with pytest.raises(IndexError, match="layer -1"):
        write(at=-1)


def test_wrong_shapes_are_named(native: NativeOps) -> None:
    layer = Heads(native, 16, 2, 2)
    cache = layer.cache(1)
    batch = batch_of([(0, 3)], [[0]])
    q = torch.zeros(3, 4, 16, dtype=native.dtype)
    with pytest.raises(ValueError, match=r"q is .*3 rows of a multiple of 2 heads of 16"):
        native.attend(q[:2], cache, 1, batch, 0, 0.25, None)
    with pytest.raises(ValueError, match="window is 0"):
        native.attend(q, cache, 1, batch, 0, 0.25, 0)
    with pytest.raises(ValueError, match="scale is 0"):
        native.attend(q, cache, 1, batch, 0, 0, None)
    with pytest.raises(ValueError, match=r"positions reach 16; batch.tables\[0\] ends at 16"):
        native.attend(q, cache, 1, batch_of([(14, 17)], [[0]]), 0, 0.25, None)
    with pytest.raises(ValueError, match="positions begin at -1"):
        native.attend(q, cache, 1, batch_of([(-1, 2)], [[0]]), 0, 0.25, None)
    with pytest.raises(IndexError, match="layer 2 of a cache with 2 layers"):
        native.attend(q, cache, 2, batch, 0, 0.25, None)
    with pytest.raises(ValueError, match="head_dim is 7"):
        native.cache(1, 1, 1, 7)
    with pytest.raises(IndexError, match="layer 2, block 0"):
        cache.read_block(2, 0)
