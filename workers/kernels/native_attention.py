"""The paged KV-cache and attention of the native CPU kernels (`src/attention*.cpp`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.kernels.checks import check_latent, check_values
from workers.kernels.memory import zeroed
from workers.kernels.ops import BLOCK, Batch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISAS = {"generic": 0, "avx512bf16": 1, "amx": 2}

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[list[object], object]] = {
    "attention_page_bytes": ([_long, _int, _int], _long),
    "attention": ([_pointer] * 6 + [_long] * 6 + [_float, _pointer, _float, _long, _int, _int], None),
    "attention_write": (
        [_pointer] * 5 + [_int] * 2 + [_float] + [_pointer] * 2 + [_long] + [_pointer] * 4 + [_long] * 5 + [_int],
        None,
    ),
    "attention_write_latent": ([_pointer] * 11 + [_long] * 5 + [_int], None),
    "attention_copy_block": ([_pointer] * 3 + [_long] * 2 + [_int] * 2, None),
    "attention_move_blocks": (
        [_pointer, _long, _pointer, _pointer, _pointer] + [_long] * 4 + [_int] * 4,
        None,
    ),
}


def declare(lib: ctypes.CDLL) -> None:
    """Gives the library's attention functions their C types, without which ctypes would cut pointers to 32 bits."""
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes = arguments
        function.restype = result


class KvCache:
    """All layers' blocks in the order that the kernels read: [layer][block][KV head][page].

    A page is 16 positions of one KV head, K then V, of latents K alone (`src/attention.h`); so a block of one layer
    is contiguous, and so is the part of it that belongs to one KV head. The memory is mapped and zero: a block costs
    none until it is written.
    """

    def __init__(
        self,
        lib: ctypes.CDLL,
        dtype: torch.dtype,
        layers: int,
        blocks: int,
        kv_heads: int,
        head_dim: int,
        latent: int | None = None,
    ) -> None:
        if min(layers, blocks, kv_heads) < 1:
            raise ValueError(
                f"a cache of {layers} layers, {blocks} blocks and {kv_heads} KV heads: each must be 1 or more"
            )
        self.layers, self.blocks, self.kv_heads, self.head_dim = layers, blocks, kv_heads, head_dim
        self.latent, self.dtype = latent, dtype
        self._lib = lib
        self.page_bytes = _page_bytes(lib, dtype, kv_heads, head_dim, latent)
        self.block_bytes = kv_heads * self.page_bytes
        self.layer_bytes = blocks * self.block_bytes
        self.bytes = layers * self.layer_bytes
        self.storage = torch.frombuffer(zeroed(self.bytes), dtype=torch.uint8)  # which keeps it
        self._base = self.storage.data_ptr()

    def layer_pointer(self, layer: int) -> int:
        """The address of block 0 of a layer."""
        if not 0 <= layer < self.layers:
            raise IndexError(f"layer {layer} of a cache with {self.layers} layers")
        return self._base + layer * self.layer_bytes

    def read_block(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """K and V of one block in the canonical order [Hkv, P, D]."""
        k = torch.empty(self.kv_heads, BLOCK, self.head_dim, dtype=self.dtype)
        v = torch.empty_like(k) if self.latent is None else k[..., : self.latent]
        self._copy(layer, block, k, v, store=0)
        return k, v

    def write_block(self, layer: int, block: int, k: Tensor, v: Tensor) -> None:
        """The inverse of `read_block`. Of latents `v`, a part of `k`, is not looked at."""
        shape = (self.kv_heads, BLOCK, self.head_dim)
        for name, x in (("k", k), ("v", v)) if self.latent is None else (("k", k),):
            if x.shape != shape or x.dtype != self.dtype:
                raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; a block takes {self.dtype} {shape}")
        self._copy(layer, block, k.contiguous(), v.contiguous(), store=1)

    @property
    def value_bytes(self) -> int:
        """See `workers.kernels.ops.KvCache`."""
        return self.layers * (2 if self.latent is None else 1) * BLOCK * self.head_dim * self.dtype.itemsize

    def export_blocks(self, blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """See `workers.kernels.ops.KvCache`. The pool's threads take part."""
        self._move(blocks, memory, offsets, store=0, shared=1)

    def import_blocks(self, blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        """See `workers.kernels.ops.KvCache`. On the calling thread alone: steps go on beside it."""
        self._move(blocks, memory, offsets, store=1, shared=0)

    def _move(
        self, blocks: NDArray[np.int64], memory: NDArray[np.uint8], offsets: NDArray[np.int64], store: int, shared: int
    ) -> None:
        check_values(blocks, memory, offsets, self)
        if len(blocks):
            self._lib.attention_move_blocks(
                self._base, self.layer_bytes, blocks.ctypes.data, memory.ctypes.data, offsets.ctypes.data, len(blocks),
                self.layers, self.kv_heads, self.head_dim, self.latent is not None, DTYPES[self.dtype], store, shared,
            )  # fmt: skip

    def _copy(self, layer: int, block: int, k: Tensor, v: Tensor, store: int) -> None:
        if not (0 <= layer < self.layers and 0 <= block < self.blocks):
            raise IndexError(
                f"layer {layer}, block {block} of a cache with {self.layers} layers of {self.blocks} blocks"
            )
        at = self.layer_pointer(layer) + block * self.block_bytes
        self._lib.attention_copy_block(
            at, k.data_ptr(), v.data_ptr() if self.latent is None else None, self.kv_heads, self.head_dim,
            DTYPES[self.dtype], store,
        )  # fmt: skip


@dataclass(slots=True)
class _Step:
    """One batch's integers, checked once and kept while every layer uses them; for one cache group."""

    batch: Batch
    group: int
    kept: tuple[Tensor, ...]
    positions: int
    row_start: int
    row_seq: int
    table: int
    rows: int
    sequences: int
    width: int
    last: int  # the largest position
    rope_rows: int  # of the rotary tables
    rope_last: int  # the largest of them
    rope: tuple[Tensor, Tensor, int] | None = None  # the tables that were checked, and for which head size

    def tables(self, cos: Tensor | None, sin: Tensor | None, dim: int) -> tuple[int | None, int | None, int, int]:
        """cos, sin, the components that they rotate, and each row's row of them: as the kernels take it."""
        if cos is None or sin is None:
            if cos is not sin:
                raise ValueError("cos and sin must both be given, or neither")
            return None, None, 0, self.rope_rows
        if self.rope is None or self.rope[0] is not cos or self.rope[1] is not sin or self.rope[2] != dim:
            _check_rope(cos, sin, dim, self.rope_last)
            self.rope = (cos, sin, dim)
        return cos.data_ptr(), sin.data_ptr(), 2 * cos.shape[1], self.rope_rows


class NativeAttention:
    """`cache`, `rope_write` and `attend` of `workers.kernels.ops.Ops`, for a class that has loaded the library."""

    lib: ctypes.CDLL
    dtype: torch.dtype
    isa: str

    _steps: dict[int, _Step]

    def cache(self, layers: int, blocks: int, kv_heads: int, head_dim: int, latent: int | None = None) -> KvCache:
        """Room for `blocks` blocks of 16 positions in each of `layers` layers."""
        return KvCache(self._attention(), self.dtype, layers, blocks, kv_heads, head_dim, latent)

    def cache_block_bytes(self, layers: int, kv_heads: int, head_dim: int, latent: int | None = None) -> int:
        """Bytes of one block over all layers."""
        return layers * kv_heads * _page_bytes(self._attention(), self.dtype, kv_heads, head_dim, latent)

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
        """See `Ops.rope_write`."""
        step = self._step(batch, group)
        dim = cache.head_dim
        if heads[1] != cache.kv_heads or cache.latent is not None:
            raise ValueError(f"heads are {heads}; the cache has {cache.kv_heads} KV heads, latent {cache.latent}")
        if qkv.shape != (step.rows, (heads[0] + 2 * heads[1]) * dim) or qkv.dtype != self.dtype:
            raise ValueError(
                f"qkv is {qkv.dtype} {tuple(qkv.shape)}; {step.rows} rows of {heads[0]} + 2 * {heads[1]} heads "
                f"of {dim} in {self.dtype} are wanted"
            )
        tables = step.tables(cos, sin, dim)
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            known = (self.dtype, torch.float32)
            if norm is not None and (norm.shape != (dim,) or norm.dtype not in known or not norm.is_contiguous()):
                raise ValueError(
                    f"{name} is {norm.dtype} {tuple(norm.shape)}; {self.dtype} or float32 ({dim},) is wanted"
                )
        qkv = qkv.contiguous()
        q = torch.empty(step.rows, heads[0], dim, dtype=self.dtype)
        self.lib.attention_write(
            qkv.data_ptr(), q.data_ptr(), cache.layer_pointer(layer), *_norm(q_norm, k_norm), eps, *tables,
            step.positions, step.row_seq, step.table, step.rows, step.width, *heads, dim, DTYPES[self.dtype],
        )  # fmt: skip
        return q

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
        """See `Ops.latent_write`."""
        step = self._step(batch, group)
        rows, heads, dim = q_rope.shape
        wanted = {
            "q_rope": (q_rope, (step.rows, heads, dim)),
            "k_rope": (k_rope, (step.rows, dim)),
            "latent": (latent, (step.rows, cache.head_dim - dim)),
        }
        for name, (x, shape) in wanted.items():
            if tuple(x.shape) != shape or x.dtype != self.dtype or cache.latent is None:
                raise ValueError(
                    f"{name} is {x.dtype} {tuple(x.shape)}; {self.dtype} {shape} is wanted for {step.rows} rows of "
                    f"a latent cache of {cache.head_dim} components (latent {cache.latent})"
                )
        tables = step.tables(cos, sin, dim)
        if tables[2] != dim:
            raise ValueError(f"cos has {tables[2] // 2} columns; the {dim} components of q_rope take {dim // 2}")
        q_rope, k_rope, latent = q_rope.contiguous(), k_rope.contiguous(), latent.contiguous()
        q = torch.empty_like(q_rope)
        self.lib.attention_write_latent(
            q_rope.data_ptr(), k_rope.data_ptr(), latent.data_ptr(), q.data_ptr(), cache.layer_pointer(layer),
            tables[0], tables[1], tables[3], step.positions, step.row_seq, step.table, rows, step.width, heads, dim,
            latent.shape[1], DTYPES[self.dtype],
        )  # fmt: skip
        return q

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
        """See `Ops.attend`."""
        step = self._step(batch, group)
        rows, heads, dim = q.shape
        if rows != step.rows or dim != cache.head_dim or heads % cache.kv_heads or q.dtype != self.dtype:
            raise ValueError(
                f"q is {q.dtype} {tuple(q.shape)}; {step.rows} rows of a multiple of {cache.kv_heads} heads of "
                f"{cache.head_dim} in {self.dtype} are wanted"
            )
        if window is not None and window < 1:
            raise ValueError(f"window is {window}; it must be 1 or more, or None")
        if not scale > 0:
            raise ValueError(f"scale is {scale}; it must be positive")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap is {softcap}; it must be positive, or None")
        if sinks is not None and (sinks.shape != (heads,) or sinks.dtype != torch.float32):
            raise ValueError(f"sinks are {sinks.dtype} {tuple(sinks.shape)}; float32 ({heads},) is wanted")
        q = q.contiguous()
        sinks = None if sinks is None else sinks.contiguous()
        out = torch.empty(rows, heads * (cache.latent or dim), dtype=self.dtype)
        self.lib.attention(
            q.data_ptr(), out.data_ptr(), cache.layer_pointer(layer), step.positions, step.row_start, step.table,
            step.sequences, step.width, heads, cache.kv_heads, dim, window or 0, scale, _pointer_of(sinks),
            softcap or 0.0, cache.latent or 0, DTYPES[self.dtype], ISAS[self.isa],
        )  # fmt: skip
        return out

    def _attention(self) -> ctypes.CDLL:
        if self.lib.attention_page_bytes.argtypes is None:
            declare(self.lib)
        return self.lib

    def _step(self, batch: Batch, group: int) -> _Step:
        steps = self.__dict__.setdefault("_steps", {})
        step: _Step | None = steps.get(group)
        if step is None or step.batch is not batch:
            self._attention()
            step = steps[group] = _check(batch, group)
        return step


def _page_bytes(lib: ctypes.CDLL, dtype: torch.dtype, kv_heads: int, head_dim: int, latent: int | None) -> int:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even and 2 or more")
    check_latent(kv_heads, head_dim, latent)
    return int(lib.attention_page_bytes(head_dim, latent is not None, DTYPES[dtype]))


def _pointer_of(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _norm(q: Tensor | None, k: Tensor | None) -> tuple[int | None, int | None, bool, bool]:
    """Two norms' weights, and whether they are float32."""
    wide = [x is not None and x.dtype == torch.float32 for x in (q, k)]
    return _pointer_of(q), _pointer_of(k), wide[0], wide[1]


def _check(batch: Batch, group: int) -> _Step:
    table = batch.tables[group]
    wanted = {"positions": torch.int64, "row_start": torch.int32, "row_seq": torch.int32}
    kept = []
    for name, dtype in wanted.items():
        x: Tensor = getattr(batch, name)
        if x.dtype != dtype or x.dim() != 1 or x.device.type != "cpu":
            raise ValueError(
                f"batch.{name} is {x.dtype} {tuple(x.shape)} on {x.device}; a CPU vector of {dtype} is wanted"
            )
        kept.append(x.contiguous())
    positions, row_start, row_seq = kept
    sequences = row_start.numel() - 1
    if table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != sequences or table.device.type != "cpu":
        raise ValueError(
            f"batch.tables[{group}] is {table.dtype} {tuple(table.shape)} on {table.device}; "
            f"int32 [{sequences}, W] on the CPU is wanted"
        )
    rows = positions.numel()
    if row_seq.numel() != rows or int(row_start[-1]) != rows:
        raise ValueError(
            f"batch has {rows} positions, {row_seq.numel()} row_seq and row_start up to {int(row_start[-1])}"
        )
    first, last = (int(x) for x in positions.aminmax()) if rows else (0, -1)
    if first < 0:
        raise ValueError(f"batch.positions begin at {first}; they must be 0 or more")
    if last >= table.shape[1] * BLOCK:
        raise ValueError(f"batch.positions reach {last}; batch.tables[{group}] ends at {table.shape[1] * BLOCK}")
    table = table.contiguous()
    rope, rope_last = positions, last
    if batch.rope_rows is not None:
        rope = batch.rope_rows.contiguous()
        if rope.dtype != torch.int64 or rope.shape != positions.shape or rope.device.type != "cpu":
            raise ValueError(f"batch.rope_rows is {rope.dtype} {tuple(rope.shape)}; int64 ({rows},) is wanted")
        least, rope_last = (int(x) for x in rope.aminmax()) if rows else (0, -1)
        if least < 0:
            raise ValueError(f"batch.rope_rows begin at {least}; they must be 0 or more")
    return _Step(
        batch, group, (*kept, table, rope), positions.data_ptr(), row_start.data_ptr(), row_seq.data_ptr(),
        table.data_ptr(), rows, sequences, table.shape[1], last, rope.data_ptr(), rope_last,
    )  # fmt: skip


def _check_rope(cos: Tensor, sin: Tensor, dim: int, last: int) -> None:
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype != torch.float32 or x.dim() != 2 or not 0 < x.shape[1] * 2 <= dim or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; a contiguous float32 [context, {dim // 2} or fewer] is wanted"
            )
        if x.shape[0] <= last:
            raise ValueError(f"{name} has {x.shape[0]} rows; the batch reaches {last}")
    if cos.shape != sin.shape:
        raise ValueError(f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; they must be of one shape")
