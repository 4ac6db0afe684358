"""The operations as C++ kernels, called through ctypes with plain pointers.

What a call costs beside its kernel is one allocation and one foreign call, 2 to 3 microseconds; so shapes and dtypes
are checked where they are cheap to check, and everything else when weights are packed.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from workers.kernels import build, native_attention
from workers.kernels.native_attention import NativeAttention

VERSION = 2

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FAMILIES = {"generic": 0, "avx512bf16": 1, "amx": 2}

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "understudy_set_threads": (None, [_I]),
    "understudy_threads": (_I, []),
    "understudy_set_spin": (None, [ctypes.c_double]),
    "understudy_keep_memory": (None, []),
    "understudy_has_family": (_I, [_I]),
    "understudy_linear_new": (_P, [_I, _I, _P, _L, _L, _L, _P]),
    "understudy_linear_free": (None, [_P]),
    "understudy_linear": (None, [_P, _P, _L, _P, _L, _L]),
    "understudy_swiglu": (_I, [_P, _P, _P, _L, _P, _L, _L]),
    "understudy_experts_new": (_P, [_P, _L]),
    "understudy_experts_free": (None, [_P]),
    "understudy_experts": (_I, [_P, _P, _L, _P, _L, _P, _P, _L, _L]),
    "understudy_rms_norm": (None, [_I, _P, _L, _P, _P, _L, _L, _F]),
    "understudy_add_rms_norm": (None, [_I, _P, _L, _P, _L, _P, _P, _L, _L, _F]),
    "understudy_silu_mul": (None, [_I, _P, _L, _P, _L, _L]),
    "understudy_gate": (None, [_I, _P, _L, _P, _P, _L, _L, _L, _I]),
    "understudy_embed": (_I, [_P, _L, _L, _P, _P, _L]),
    "understudy_logprobs": (None, [_I, _P, _L, _P, _L, _L]),
    "understudy_argmax": (None, [_I, _P, _L, _P, _L, _L]),
}


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL, build.Library]:
    lib, library = build.load()
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    native_attention.declare(lib)
    lib.understudy_keep_memory()
    return lib, library


def _rows(x: Tensor) -> Tensor:
    """x itself where the elements of a row are adjacent, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


class NativeLinear:
    """A packed weight; its memory is freed with it."""

    __slots__ = ("__weakref__", "_call", "_dtype", "handle", "k", "n")

    def __init__(self, lib: ctypes.CDLL, family: int, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"a linear's weight is [N, K], not {list(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"the bias of a weight {list(weight.shape)} is [{weight.shape[0]}], not {list(bias.shape)}"
            )
        self.n, self.k = weight.shape
        self._dtype = dtype
        self._call: Callable[..., None] = lib.understudy_linear
        w = _rows(weight.to(dtype))
        b = None if bias is None else bias.to(dtype).contiguous()
        self.handle: int | None = lib.understudy_linear_new(
            family, _DTYPES[dtype], w.data_ptr(), self.n, self.k, w.stride(0), None if b is None else b.data_ptr()
        )
        if not self.handle:
            raise MemoryError(f"no memory to pack a weight {list(weight.shape)}")
        weakref.finalize(self, lib.understudy_linear_free, self.handle).atexit = False

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        t, k = x.shape
        if k != self.k or x.dtype is not self._dtype:
            raise ValueError(f"this linear takes [T, {self.k}] {self._dtype}, not {list(x.shape)} {x.dtype}")
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty((t, self.n), dtype=self._dtype)
        self._call(self.handle, x.data_ptr(), x.stride(0), y.data_ptr(), self.n, t)
        return y


class NativeSwiglu:
    """silu(x gate^T) * (x up^T), in one pass over x."""

    __slots__ = ("_call", "_dtype", "_gate", "_up", "k", "n")

    def __init__(self, lib: ctypes.CDLL, gate: NativeLinear, up: NativeLinear, dtype: torch.dtype) -> None:
        if (gate.n, gate.k) != (up.n, up.k):
            raise ValueError(f"gate and up have one shape, not [{gate.n}, {gate.k}] and [{up.n}, {up.k}]")
        self.n, self.k = gate.n, gate.k
        self._gate, self._up, self._dtype = gate, up, dtype
        self._call: Callable[..., int] = lib.understudy_swiglu

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, F]
        t, k = x.shape
        if k != self.k or x.dtype is not self._dtype:
            raise ValueError(f"this swiglu takes [T, {self.k}] {self._dtype}, not {list(x.shape)} {x.dtype}")
        x = _rows(x)
        y = torch.empty((t, self.n), dtype=self._dtype)
        if self._call(self._gate.handle, self._up.handle, x.data_ptr(), x.stride(0), y.data_ptr(), self.n, t):
            raise MemoryError(f"no memory for {t} rows of a feed-forward")
        return y


class NativeExperts:
    """The packed experts of one layer."""

    __slots__ = ("__weakref__", "_call", "_dtype", "_handle", "_linears", "hidden")

    def __init__(self, lib: ctypes.CDLL, linears: list[NativeLinear], dtype: torch.dtype) -> None:
        self._linears = linears  # gate, up, down of each expert; the handle refers to them
        self._dtype = dtype
        self._call: Callable[..., int] = lib.understudy_experts
        self.hidden = linears[0].k
        handles = (ctypes.c_void_p * len(linears))(*(linear.handle for linear in linears))
        self._handle: int = lib.understudy_experts_new(handles, len(linears) // 3)
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
        x, ids, weights = _rows(x), ids.contiguous(), weights.contiguous()
        y = torch.empty((t, self.hidden), dtype=self._dtype)
        status = self._call(
            self._handle, x.data_ptr(), x.stride(0), y.data_ptr(), self.hidden, ids.data_ptr(), weights.data_ptr(), t, k
        )
        if status == 1:
            raise IndexError(f"an expert's id is outside of 0 .. {len(self._linears) // 3 - 1}")
        if status == 2:
            raise MemoryError(f"no memory for {t * k} rows of experts")
        return y


class NativeOps(NativeAttention):
    """Operations of one dtype in C++. See `workers.kernels.ops.Ops` for what each one means.

    `threads` counts the threads of the process's one pool (None: leave it as it is, at first one per CPU). `isa`
    picks the family of bf16 kernels, `amx`, `avx512bf16` or `generic`; None takes `$UNDERSTUDY_ISA`, else the best
    there is.

    Raises:
        BuildError: the kernels cannot be built here.
        ValueError: no such isa, or this CPU lacks it.
    """

    name = "native"

    def __init__(self, dtype: torch.dtype, threads: int | None = None, isa: str | None = None) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"native kernels compute in {', '.join(map(str, _DTYPES))}, not {dtype}")
        self.dtype = dtype
        self.lib, library = _library()
        self.isa = self._choose(isa)
        self._code, self._family = _DTYPES[dtype], _FAMILIES[self.isa]
        self.numerics_id = "/".join(
            (f"native-{VERSION}", library.key, library.compiler, self.isa, str(dtype).removeprefix("torch."))
        )
        if threads is not None:
            self.lib.understudy_set_threads(threads)
        super().__init__()

    @property
    def threads(self) -> int:
        """How many threads share each operation's work, the calling one included."""
        return int(self.lib.understudy_threads())

    def _choose(self, isa: str | None) -> str:
        asked = isa or os.environ.get("UNDERSTUDY_ISA") or None
        if asked is not None and asked not in _FAMILIES:
            raise ValueError(f"UNDERSTUDY_ISA is one of {', '.join(_FAMILIES)}, not {asked!r}")
        if asked is not None and not self.lib.understudy_has_family(_FAMILIES[asked]):
            raise ValueError(f"this CPU, or the compiler used, lacks the instructions of UNDERSTUDY_ISA={asked}")
        if self.dtype is not torch.bfloat16:
            return "generic"
        return asked or next(
            f for f in ("amx", "avx512bf16", "generic") if self.lib.understudy_has_family(_FAMILIES[f])
        )

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
        return NativeLinear(self.lib, self._family, weight, bias, self.dtype)

    def swiglu(
        self, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
    ) -> NativeSwiglu:
        return NativeSwiglu(self.lib, self.linear(gate, gate_bias), self.linear(up, up_bias), self.dtype)

    def experts(self, gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]) -> NativeExperts:
        if not gate:
            raise ValueError("a layer of experts has at least one")
        linears = []
        f, h = gate[0].shape
        for g, u, d in zip(gate, up, down, strict=True):
            if g.shape != (f, h) or u.shape != (f, h) or d.shape != (h, f):
                raise ValueError(
                    f"experts of [{f}, {h}] have gate, up and down of [{f}, {h}], [{f}, {h}], [{h}, {f}], "
                    f"not {list(g.shape)}, {list(u.shape)}, {list(d.shape)}"
                )
            linears += [self.linear(g), self.linear(u), self.linear(d)]
        return NativeExperts(self.lib, linears, self.dtype)

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        table, ids = table.contiguous(), ids.contiguous()
        v, h = table.shape
        y = torch.empty((ids.shape[0], h), dtype=table.dtype)
        if self.lib.understudy_embed(
            table.data_ptr(), h * table.element_size(), v, ids.data_ptr(), y.data_ptr(), y.shape[0]
        ):
            raise IndexError(f"a token id is outside of 0 .. {v - 1}")
        return y

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        t, h = x.shape
        x = _rows(x)
        y = torch.empty((t, h), dtype=self.dtype)
        self.lib.understudy_rms_norm(self._code, x.data_ptr(), x.stride(0), weight.data_ptr(), y.data_ptr(), t, h, eps)
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        t, h = x.shape
        if residual.stride(1) != 1:
            raise ValueError("the elements of a residual's row must be adjacent: it is changed in place")
        x = _rows(x)
        y = torch.empty((t, h), dtype=self.dtype)
        self.lib.understudy_add_rms_norm(
            self._code, x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0), weight.data_ptr(),
            y.data_ptr(), t, h, eps,
        )  # fmt: skip
        return y

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        t, width = gate_up.shape
        x = _rows(gate_up)
        y = torch.empty((t, width // 2), dtype=self.dtype)
        self.lib.understudy_silu_mul(self._code, x.data_ptr(), x.stride(0), y.data_ptr(), t, width // 2)
        return y

    def gate(self, logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        t, experts = logits.shape
        if not 1 <= k <= experts:
            raise ValueError(f"a token goes to 1 .. {experts} of {experts} experts, not {k}")
        x = _rows(logits)
        ids, weights = torch.empty((t, k), dtype=torch.int32), torch.empty((t, k), dtype=torch.float32)
        self.lib.understudy_gate(
            _DTYPES[x.dtype], x.data_ptr(), x.stride(0), ids.data_ptr(), weights.data_ptr(), t, experts, k, renormalize
        )
        return ids, weights

    def logprobs(self, logits: Tensor) -> Tensor:
        s, v = logits.shape
        x = _rows(logits)
        y = torch.empty((s, v), dtype=torch.float32)
        self.lib.understudy_logprobs(_DTYPES[x.dtype], x.data_ptr(), x.stride(0), y.data_ptr(), s, v)
        return y

    def argmax(self, logits: Tensor) -> Tensor:
        s, v = logits.shape
        x = _rows(logits)
        ids = torch.empty(s, dtype=torch.int64)
        self.lib.understudy_argmax(_DTYPES[x.dtype], x.data_ptr(), x.stride(0), ids.data_ptr(), s, v)
        return ids
