"""The paged KV-cache and attention of the native CPU kernels (`src/attention*.cpp`)."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.kernels.ops import BLOCK, Batch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ISAS = {"generic": 0, "avx512bf16": 1, "amx": 2}

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[list[object], object]] = {
    "attention_page_bytes": ([_long, _int], _long),
    "attention": ([_pointer] * 6 + [_long] * 6 + [_float, _int, _int], None),
    "attention_write": ([_pointer] * 5 + [_float] + [_pointer] * 5 + [_long] * 5 + [_int], None),
    "attention_copy_block": ([_pointer] * 3 + [_long] * 2 + [_int] * 2, None),
}


def declare(lib: ctypes.CDLL) -> None:
    """Gives the library's attention functions their C types, without which ctypes would cut pointers to 32 bits."""
    for name, (arguments, result) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes = arguments
        function.restype = result


class KvCache:
    """All layers' blocks in the order that the kernels read: [layer][block][KV head][page].

    A page is 16 positions of one KV head, K then V (`src/attention.h`); so a block of one layer is contiguous, and so
    is the part of it that belongs to one KV head. The memory is mapped and zero: a block costs none until it is
    written.
    """

    def __init__(self, lib: ctypes.CDLL, dtype: torch.dtype, layers: int, blocks: int, kv_heads: int, head_dim: int):
        if min(layers, blocks, kv_heads) < 1:
            raise ValueError(
                f"a cache of {layers} layers, {blocks} blocks and {kv_heads} KV heads: each must be 1 or more"
            )
        self.layers, self.blocks, self.kv_heads, self.head_dim = layers, blocks, kv_heads, head_dim
        self.dtype = dtype
        self._lib = lib
        self.page_bytes = _page_bytes(lib, dtype, head_dim)
        self.block_bytes = kv_heads * self.page_bytes
        self.layer_bytes = blocks * self.block_bytes
        self.bytes = layers * self.layer_bytes
        memory = mmap.mmap(-1, self.bytes)  # page-aligned, and kept by the tensor
        self.storage = torch.frombuffer(memory, dtype=torch.uint8)
        self._base = self.storage.data_ptr()

    def layer_pointer(self, layer: int) -> int:
        """The address of block 0 of a layer."""
        if not 0 <= layer < self.layers:
            raise IndexError(f"layer {layer} of a cache with {self.layers} layers")
        return self._base + layer * self.layer_bytes

    def read_block(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """K and V of one block in the canonical order [Hkv, P, D]."""
        k = torch.empty(self.kv_heads, BLOCK, self.head_dim, dtype=self.dtype)
        v = torch.empty_like(k)
        self._copy(layer, block, k, v, store=0)
        return k, v

    def write_block(self, layer: int, block: int, k: Tensor, v: Tensor) -> None:
        """The inverse of `read_block`."""
        shape = (self.kv_heads, BLOCK, self.head_dim)
        for name, x in (("k", k), ("v", v)):
            if x.shape != shape or x.dtype != self.dtype:
                raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}; a block takes {self.dtype} {shape}")
        self._copy(layer, block, k.contiguous(), v.contiguous(), store=1)

    def _copy(self, layer: int, block: int, k: Tensor, v: Tensor, store: int) -> None:
        if not (0 <= layer < self.layers and 0 <= block < self.blocks):
            raise IndexError(
                f"layer {layer}, block {block} of a cache with {self.layers} layers of {self.blocks} blocks"
            )
        at = self.layer_pointer(layer) + block * self.block_bytes
        self._lib.attention_copy_block(
            at, k.data_ptr(), v.data_ptr(), self.kv_heads, self.head_dim, DTYPES[self.dtype], store
        )


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
    rope: tuple[Tensor, Tensor, int] | None = None  # the tables that were checked, and for which head size


class NativeAttention:
    """`cache`, `rope_write` and `attend` of `workers.kernels.ops.Ops`, for a class that has loaded the library."""

    lib: ctypes.CDLL
    dtype: torch.dtype
    isa: str

    _steps: dict[int, _Step]

    def cache(self, layers: int, blocks: int, kv_heads: int, head_dim: int) -> KvCache:
        """Room for `blocks` blocks of 16 positions in each of `layers` layers."""
        return KvCache(self._attention(), self.dtype, layers, blocks, kv_heads, head_dim)

    def cache_block_bytes(self, layers: int, kv_heads: int, head_dim: int) -> int:
        """Bytes of one block over all layers."""
        return layers * kv_heads * _page_bytes(self._attention(), self.dtype, head_dim)

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
        """See `Ops.rope_write`."""
        step = self._step(batch, group)
        dim = cache.head_dim
        if heads[1] != cache.kv_heads:
            raise ValueError(f"heads are {heads}; the cache has {cache.kv_heads} KV heads")
        if qkv.shape != (step.rows, (heads[0] + 2 * heads[1]) * dim) or qkv.dtype != self.dtype:
            raise ValueError(
                f"qkv is {qkv.dtype} {tuple(qkv.shape)}; {step.rows} rows of {heads[0]} + 2 * {heads[1]} heads "
                f"of {dim} in {self.dtype} are wanted"
            )
        if step.rope is None or step.rope[0] is not cos or step.rope[1] is not sin or step.rope[2] != dim:
            _check_rope(cos, sin, dim, step.last)
            step.rope = (cos, sin, dim)
        for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
            if norm is not None and (norm.shape != (dim,) or norm.dtype != self.dtype or not norm.is_contiguous()):
                raise ValueError(f"{name} is {norm.dtype} {tuple(norm.shape)}; {self.dtype} ({dim},) is wanted")
        qkv = qkv.contiguous()
        q = torch.empty(step.rows, heads[0], dim, dtype=self.dtype)
        self.lib.attention_write(
            qkv.data_ptr(),
            q.data_ptr(),
            cache.layer_pointer(layer),
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            eps,
            cos.data_ptr(),
            sin.data_ptr(),
            step.positions,
            step.row_seq,
            step.table,
            step.rows,
            step.width,
            heads[0],
            heads[1],
            dim,
            DTYPES[self.dtype],
        )
        return q

    def attend(
        self, q: Tensor, cache: KvCache, layer: int, batch: Batch, group: int, scale: float, window: int | None
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
        q = q.contiguous()
        out = torch.empty(rows, heads * dim, dtype=self.dtype)
        self.lib.attention(
            q.data_ptr(),
            out.data_ptr(),
            cache.layer_pointer(layer),
            step.positions,
            step.row_start,
            step.table,
            step.sequences,
            step.width,
            heads,
            cache.kv_heads,
            dim,
            window or 0,
            scale,
            DTYPES[self.dtype],
            ISAS[self.isa],
        )
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


def _page_bytes(lib: ctypes.CDLL, dtype: torch.dtype, head_dim: int) -> int:
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even and 2 or more")
    return int(lib.attention_page_bytes(head_dim, DTYPES[dtype]))


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
    return _Step(
        batch, group, (*kept, table), positions.data_ptr(), row_start.data_ptr(), row_seq.data_ptr(), table.data_ptr(),
        rows, sequences, table.shape[1], last,
    )  # fmt: skip


def _check_rope(cos: Tensor, sin: Tensor, dim: int, last: int) -> None:
    for name, x in (("cos", cos), ("sin", sin)):
        if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] * 2 != dim or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; a contiguous float32 [context, {dim // 2}] is wanted"
            )
        if x.shape[0] <= last:
            raise ValueError(f"{name} has {x.shape[0]} positions; the batch reaches {last}")
