"""Linears, feed-forwards and experts of the native kernels: weights that the library packs and keeps."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from workers.kernels.checks import GATED
from workers.kernels.native_attention import DTYPES

Packing = Literal["raw", "auto", "coded"]
PACKINGS = get_args(Packing)  # their place is `enum Packing` of src/linear.h
ACT_CODES = {name: code for code, name in enumerate(GATED)}  # `enum Act` of src/activation.h


def adjacent(x: Tensor) -> Tensor:
    """x itself where the elements of a row are adjacent, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class NativeLinear:
    """A packed weight; its memory is freed with it.

    `packing`: `raw` as it is; `coded` in twelve bits a value where kernels and values allow (`src/coded.h`); `auto`
    so where it saves time, which is where the weight is too large to stay in a cache. Results have the same bits.
    """

    __slots__ = ("__weakref__", "_call", "_dtype", "bytes", "handle", "k", "n")

    def __init__(
        self,
        lib: ctypes.CDLL,
        family: int,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        packing: Packing = "auto",
    ) -> None:
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"a linear's weight is [N, K], not {list(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"the bias of a weight {list(weight.shape)} is [{weight.shape[0]}], not {list(bias.shape)}"
            )
        self.n, self.k = weight.shape
        self._dtype = dtype
        self._call: Callable[..., None] = lib.understudy_linear
        w = adjacent(weight.to(dtype))
        b = None if bias is None else bias.to(dtype).contiguous()
        self.handle: int | None = lib.understudy_linear_new(
            family,
            DTYPES[dtype],
            w.data_ptr(),
            self.n,
            self.k,
            w.stride(0),
            None if b is None else b.data_ptr(),
            PACKINGS.index(packing),
        )
        if not self.handle:
            raise MemoryError(f"no memory to pack a weight {list(weight.shape)}")
        self.bytes: int = lib.understudy_linear_bytes(self.handle)  # that it occupies
        weakref.finalize(self, lib.understudy_linear_free, self.handle).atexit = False

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        y = torch.empty((x.shape[0], self.n), dtype=self._dtype)
        self.into(x, y)
        return y

    def into(self, x: Tensor, y: Tensor) -> None:
        """Writes the result to y [T, N], the elements of whose rows are adjacent."""
        t, k = x.shape
        if k != self.k or x.dtype is not self._dtype:
            raise ValueError(f"this linear takes [T, {self.k}] {self._dtype}, not {list(x.shape)} {x.dtype}")
        if x.stride(1) != 1:
            x = x.contiguous()
        self._call(self.handle, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), t)


class NativeSieve:
    """Finds the greatest of a linear's outputs for one row from its weight in eight bits (`src/sieve.cpp`)."""

    __slots__ = ("__weakref__", "_call", "_handle", "_linear")

    def __init__(self, lib: ctypes.CDLL, linear: NativeLinear, handle: int) -> None:
        self._linear, self._handle = linear, handle  # which refers to the linear
        self._call: Callable[..., int] = lib.understudy_sieve
        weakref.finalize(self, lib.understudy_sieve_free, handle).atexit = False

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `workers.kernels.ops.Sieve`."""
        n, k = self._linear.n, self._linear.k
        if x.shape != (1, k) or x.dtype is not torch.bfloat16:
            raise ValueError(f"this sieve takes [1, {k}] torch.bfloat16, not {list(x.shape)} {x.dtype}")
        x, y = adjacent(x), torch.empty(n, dtype=torch.bfloat16)
        ids, values = torch.empty(1, dtype=torch.int64), torch.empty(1, dtype=torch.float32)
        if self._call(self._handle, x.data_ptr(), y.data_ptr(), ids.data_ptr(), values.data_ptr()) < 0:
            return None
        return ids, values


class NativeGated:
    """act(x gate^T) * (x up^T), in one pass over x."""

    __slots__ = ("_act", "_call", "_dtype", "_gate", "_up", "k", "n")

    def __init__(self, lib: ctypes.CDLL, gate: NativeLinear, up: NativeLinear, act: str, dtype: torch.dtype) -> None:
        if (gate.n, gate.k) != (up.n, up.k):
            raise ValueError(f"gate and up have one shape, not [{gate.n}, {gate.k}] and [{up.n}, {up.k}]")
        self.n, self.k = gate.n, gate.k
        self._gate, self._up, self._dtype, self._act = gate, up, dtype, ACT_CODES[act]
        self._call: Callable[..., int] = lib.understudy_gated

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, F]
        t, k = x.shape
        if k != self.k or x.dtype is not self._dtype:
            raise ValueError(f"this feed-forward takes [T, {self.k}] {self._dtype}, not {list(x.shape)} {x.dtype}")
        x = adjacent(x)
        y = torch.empty((t, self.n), dtype=self._dtype)
        handles = self._gate.handle, self._up.handle
        if self._call(self._act, *handles, x.data_ptr(), x.stride(0), y.data_ptr(), self.n, t):
            raise MemoryError(f"no memory for {t} rows of a feed-forward")
        return y


class NativeExperts:
    """The packed experts of one layer."""

    __slots__ = ("__weakref__", "_call", "_dtype", "_each", "_handle", "act", "hidden", "linears")

    def __init__(self, lib: ctypes.CDLL, linears: list[NativeLinear], act: str, dtype: torch.dtype) -> None:
        self.linears = linears  # gate, up, down of each expert; the handle refers to them
        self.act = act
        self._dtype = dtype
        self._call: Callable[..., int] = lib.understudy_experts
        self._each: Callable[..., int] = lib.understudy_expert_slots
        self.hidden = linears[0].k
        handles = (ctypes.c_void_p * len(linears))(*(linear.handle for linear in linears))
        self._handle: int = lib.understudy_experts_new(handles, len(linears) // 3, ACT_CODES[act])
        weakref.finalize(self, lib.understudy_experts_free, self._handle).atexit = False

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        t, k = ids.shape
        if x.shape != (t, self.hidden) or x.dtype is not self._dtype or weights.shape != ids.shape:
            raise ValueError(
                f"experts take x [T, {self.hidden}] {self._dtype} with ids and weights [T, k], "
                f"not {list(x.shape)} {x.dtype} with {list(ids.shape)} and {list(weights.shape)}"
            )
        if ids.dtype is not torch.int32 or weights.dtype is not torch.float32:
            raise ValueError(f"experts take int32 ids and float32 weights, not {ids.dtype} and {weights.dtype}")
        x, ids, weights = adjacent(x), ids.contiguous(), weights.contiguous()
        y = torch.empty((t, self.hidden), dtype=self._dtype)
        status = self._call(
            self._handle, x.data_ptr(), x.stride(0), y.data_ptr(), self.hidden, ids.data_ptr(), weights.data_ptr(), t, k
        )
        if status == 1:
            raise IndexError(f"an expert's id is outside of 0 .. {len(self.linears) // 3 - 1}")
        if status == 2:
            raise MemoryError(f"no memory for {t * k} rows of experts")
        return y

    def slots(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `workers.kernels.ops.PackedExperts`."""
        t, h = x.shape
        if h != self.hidden or x.dtype is not self._dtype or rows.shape != ids.shape or rows.ndim != 1:
            raise ValueError(
                f"experts take x [T, {self.hidden}] {self._dtype} with rows and ids [S], "
                f"not {list(x.shape)} {x.dtype} with {list(rows.shape)} and {list(ids.shape)}"
            )
        if ids.dtype is not torch.int32 or rows.dtype is not torch.int32:
            raise ValueError(f"experts take int32 rows and ids, not {rows.dtype} and {ids.dtype}")
        x, rows, ids, count = adjacent(x), rows.contiguous(), ids.contiguous(), len(ids)
        y = torch.empty((count, h), dtype=self._dtype)
        status = self._each(
            self._handle, x.data_ptr(), x.stride(0), t, rows.data_ptr(), ids.data_ptr(), y.data_ptr(), h, count
        )
        if status == 1:
            raise IndexError(f"an expert's id is outside of 0 .. {len(self.linears) // 3 - 1}")
        if status == 2:
            raise MemoryError(f"no memory for {count} rows of experts")
        if status == 3:
            raise IndexError(f"a slot's row is outside of 0 .. {t - 1}")
        return y


class NativePerHead:
    """A linear for each head of x."""

    __slots__ = ("_linears", "k", "n")

    def __init__(self, linears: list[NativeLinear]) -> None:
        if not linears or any((each.n, each.k) != (linears[0].n, linears[0].k) for each in linears):
            raise ValueError(f"heads have weights of one shape, not {[(each.n, each.k) for each in linears]}")
        self._linears = linears
        self.n, self.k = (len(linears) * size for size in (linears[0].n, linears[0].k))

    def __call__(self, x: Tensor) -> Tensor:  # [T, G K] -> [T, G N]
        t, k = x.shape
        if k != self.k:
            raise ValueError(f"this linear per head takes [T, {self.k}], not {list(x.shape)}")
        y = torch.empty((t, self.n), dtype=x.dtype)
        each = self._linears[0]
        for g, linear in enumerate(self._linears):
            linear.into(x[:, g * each.k : (g + 1) * each.k], y[:, g * each.n : (g + 1) * each.n])
        return y
