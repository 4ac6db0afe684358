"""Values of the prefix store: in and out of every cache, in one order of bytes, without changing a bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from implementations import KINDS, get
from test_attention import Heads, batch_of, one_torch_thread
from test_attention_kinds import Kinds
from torch import Tensor

from workers.kernels.ops import BLOCK, KvCache, Ops

__all__ = ["one_torch_thread"]  # a fixture

HEADER = 64


def memory_for(cache: KvCache, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Room for values behind headers, as the host tier keeps them, full of what must be written over."""
    stride = HEADER + cache.value_bytes
    memory = np.frombuffer(bytearray(b"\xa5" * (blocks * cache.kv_heads * stride + 64)), np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][: blocks * cache.kv_heads * stride]
    return memory, np.arange(blocks * cache.kv_heads).reshape(blocks, -1) * stride + HEADER


def export(cache: KvCache, blocks: list[int]) -> tuple[np.ndarray, np.ndarray]:
    memory, offsets = memory_for(cache, len(blocks))
    cache.export_blocks(np.array(blocks), memory, offsets)
    return memory, offsets


def bits(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def canonical(cache: KvCache, layers: int, block: int, head: int, latent: bool) -> bytes:
    pages = [cache.read_block(layer, block) for layer in range(layers)]
    return b"".join(bits(k[head]) if latent else bits(k[head]) + bits(v[head]) for k, v in pages)


SHAPES = [  # head_dim, KV heads, query heads for each, latent
    (64, 2, 7, None),
    (128, 1, 4, None),
    (24, 3, 1, None),
    (2, 1, 1, None),
    (10, 2, 2, None),
    (80, 2, 1, None),
    (96, 1, 4, 64),
    (22, 1, 2, 16),
]


def stage(ops: Ops, dim: int, kv_heads: int, ratio: int, latent: int | None) -> Heads:
    return Kinds(ops, dim, kv_heads, ratio, None, False, None, latent)


@pytest.mark.parametrize(("dim", "kv_heads", "ratio", "latent"), SHAPES)
def test_out_and_in_again(ops: Ops, dim: int, kv_heads: int, ratio: int, latent: int | None) -> None:
    layer = stage(ops, dim, kv_heads, ratio, latent)
    rows = layer.rows(5 * BLOCK + 3, seed=dim)
    _, cache, want = layer.whole(rows[: 5 * BLOCK])
    parts = 1 if latent else 2
    assert cache.value_bytes == 2 * parts * BLOCK * dim * ops.dtype.itemsize
    memory, offsets = export(cache, [3, 0, 4])
    for i, block in enumerate([3, 0, 4]):
        for head in range(kv_heads):
            value = memory[offsets[i, head] :][: cache.value_bytes].tobytes()
            assert value == canonical(cache, 2, block, head, latent is not None)
    assert (memory.reshape(-1, HEADER + cache.value_bytes)[:, :HEADER] == 0xA5).all()  # headers are not its business

    # Into another cache, at other places: the rows that follow get the bits that they had.
    other = layer.cache(9)
    places = [7, 2, 5, 0, 8]
    memory, offsets = export(cache, [0, 1, 2, 3, 4])
    untouched = other.read_block(1, 1)[0].clone()
    other.import_blocks(np.array(places), memory, offsets)
    assert bits(other.read_block(1, 1)[0]) == bits(untouched)
    again, _ = export(other, places)
    assert again.tobytes() == memory.tobytes()
    _, _, whole = layer.whole(rows)
    _, tail = layer.step(rows[5 * BLOCK :], other, batch_of([(5 * BLOCK, len(rows))], [[*places, 3]]))
    assert bits(tail) == bits(whole[5 * BLOCK :])
    assert bits(want) == bits(whole[: 5 * BLOCK])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("latent", [None, 16])
def test_a_value_has_no_implementation(dtype: str, latent: int | None) -> None:
    shape = (2, 6, 1, 24, latent) if latent else (2, 6, 3, 24, latent)
    plain = get(f"plain {dtype}").cache(*shape)
    plain.data.view(torch.uint8).random_(generator=torch.Generator().manual_seed(1))
    memory, offsets = export(plain, [4, 1])
    for kind in KINDS:
        if kind.split()[:2] != ["native", dtype]:
            continue
        try:
            native = get(kind).cache(*shape)
        except pytest.skip.Exception:
            continue
        native.import_blocks(np.array([0, 5]), memory, offsets)
        assert export(native, [0, 5])[0].tobytes() == memory.tobytes()
        assert all(bits(a) == bits(b) for a, b in zip(native.read_block(1, 5), plain.read_block(1, 1), strict=True))


def test_places_that_are_not_there_are_refused(ops: Ops) -> None:
    cache = ops.cache(2, 6, 2, 8)
    memory, offsets = memory_for(cache, 2)
    for move in (cache.export_blocks, cache.import_blocks):
        for blocks in ([0, 6], [-1, 0]):
            with pytest.raises(ValueError, match="of a cache of 6"):
                move(np.array(blocks), memory, offsets)
        for wrong in (offsets + 16 * 1000, offsets - 80, offsets + 8):
            with pytest.raises(ValueError, match="begin at multiples of 16 in 0"):
                move(np.array([0, 1]), memory, wrong)
        with pytest.raises(ValueError, match="offsets is"):
            move(np.array([0, 1]), memory, offsets[:1])
        move(np.array([], np.int64), memory, offsets[:0])  # nothing
