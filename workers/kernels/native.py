"""The operations as C++ kernels, called through ctypes with plain pointers.

What a call costs beside its kernel is one allocation and one foreign call, 2 to 3 microseconds; so shapes and dtypes
are checked where they are cheap to check, and everything else when weights are packed.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from workers.kernels import build, native_attention
from workers.kernels.checks import ACTS, GATED, check_route, check_slots, known_act
from workers.kernels.native_attention import DTYPES, NativeAttention
from workers.kernels.native_linear import (
    ACT_CODES,
    NativeExperts,
    NativeGated,
    NativeLinear,
    NativePerHead,
    NativeSieve,
    adjacent,
)
from workers.model.spec import Route

VERSION = 3

_FAMILIES = {"generic": 0, "avx512bf16": 1, "amx": 2}

_SIFTED = 8 << 20  # bytes of a head from which on reading it takes longer than two looks at parts of it

_P, _L, _I, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "understudy_set_threads": (None, [_I]),
    "understudy_threads": (_I, []),
    "understudy_set_spin": (None, [ctypes.c_double]),
    "understudy_keep_memory": (None, []),
    "understudy_has_family": (_I, [_I]),
    "understudy_linear_new": (_P, [_I, _I, _P, _L, _L, _L, _P, _I]),
    "understudy_linear_bytes": (_L, [_P]),
    "understudy_linear_free": (None, [_P]),
    "understudy_sieve_new": (_P, [_P, _P, _L]),
    "understudy_sieve_free": (None, [_P]),
    "understudy_sieve": (_L, [_P, _P, _P, _P, _P]),
    "understudy_linear": (None, [_P, _P, _L, _P, _L, _L]),
    "understudy_gated": (_I, [_I, _P, _P, _P, _L, _P, _L, _L]),
    "understudy_experts_new": (_P, [_P, _L, _I]),
    "understudy_experts_free": (None, [_P]),
    "understudy_experts": (_I, [_P, _P, _L, _P, _L, _P, _P, _L, _L]),
    "understudy_expert_slots": (_I, [_P, _P, _L, _L, _P, _P, _P, _L, _L]),
    "understudy_combine": (None, [_I, _P, _P, _P, _L, _L, _L]),
    "understudy_rms_norm": (None, [_I, _I, _P, _L, _P, _P, _L, _L, _F]),
    "understudy_add_rms_norm": (None, [_I, _I, _P, _L, _P, _L, _P, _P, _L, _L, _F]),
    "understudy_layer_norm": (None, [_I, _I, _P, _L, _P, _P, _P, _L, _L, _F]),
    "understudy_gated_act": (None, [_I, _I, _P, _L, _P, _L, _L]),
    "understudy_act": (None, [_I, _I, _P, _L, _P, _L, _L]),
    "understudy_softcap": (None, [_I, _P, _L, _P, _L, _L, _F]),
    "understudy_route": (None, [_I, _P, _P, _L, _P, _P, _P, _L, _L]),
    "understudy_embed": (_I, [_P, _L, _L, _P, _P, _L]),
    "understudy_logprobs": (None, [_I, _P, _L, _P, _L, _L]),
    "understudy_argmax": (None, [_I, _P, _L, _P, _L, _L]),
}


class _RouteCode(ctypes.Structure):
    """`struct Route` of src/route.cpp."""

    _fields_ = (
        *((name, _I) for name in ("top_k", "scoring", "renormalize", "groups", "top_groups", "top2")),
        ("scale", _F),
    )


@lru_cache(maxsize=64)
def _route_code(route: Route) -> Any:
    scoring = ("softmax", "sigmoid", "chosen_softmax").index(route.scoring)
    top2 = route.group_score == "top2"
    return ctypes.pointer(
        _RouteCode(route.top_k, scoring, route.renormalize, route.groups, route.top_groups, top2, route.scale)
    )


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL, build.Library]:
    lib, library = build.load()
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    native_attention.declare(lib)
    lib.understudy_keep_memory()
    return lib, library


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
        if dtype not in DTYPES:
            raise ValueError(f"native kernels compute in {', '.join(map(str, DTYPES))}, not {dtype}")
        self.dtype = dtype
        self.lib, library = _library()
        self.isa = self._choose(isa)
        self._wide: NativeOps | None = None
        self._code, self.family = DTYPES[dtype], _FAMILIES[self.isa]  # `enum Family` of src/linear.h
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
        return NativeLinear(self.lib, self.family, weight, bias, self.dtype)

    def sieve(self, head: Any, weight: Tensor) -> NativeSieve | None:
        if not isinstance(head, NativeLinear) or self.dtype is not torch.bfloat16 or head.bytes < _SIFTED:
            return None
        w = adjacent(weight.to(self.dtype))
        handle = self.lib.understudy_sieve_new(head.handle, w.data_ptr(), w.stride(0))
        return NativeSieve(self.lib, head, handle) if handle else None

    def gated(
        self,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        act: str = "silu",
    ) -> NativeGated:
        known_act(act, GATED)
        return NativeGated(self.lib, self.linear(gate, gate_bias), self.linear(up, up_bias), act, self.dtype)

    def experts(
        self,
        gate: Sequence[Tensor],
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        biases: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]] | None = None,
        act: str = "silu",
    ) -> NativeExperts:
        known_act(act, GATED)
        if not gate:
            raise ValueError("a layer of experts has at least one")
        linears = []
        f, h = gate[0].shape
        gates, ups, downs = biases or ([None] * len(gate),) * 3
        for g, u, d, *bias in zip(gate, up, down, gates, ups, downs, strict=True):
            if g.shape != (f, h) or u.shape != (f, h) or d.shape != (h, f):
                raise ValueError(
                    f"experts of [{f}, {h}] have gate, up and down of [{f}, {h}], [{f}, {h}], [{h}, {f}], "
                    f"not {list(g.shape)}, {list(u.shape)}, {list(d.shape)}"
                )
            linears += [self.linear(g, bias[0]), self.linear(u, bias[1]), self.linear(d, bias[2])]
        return NativeExperts(self.lib, linears, act, self.dtype)

    def join_experts(self, parts: Sequence[NativeExperts]) -> NativeExperts:
        linears = [linear for part in parts for linear in part.linears]
        if not linears:
            raise ValueError("a layer of experts has at least one")
        return NativeExperts(self.lib, linears, parts[0].act, self.dtype)

    def combine(self, slots: Tensor, weights: Tensor) -> Tensor:
        check_slots(slots, weights, self.dtype)
        t, k, h = slots.shape
        slots, weights = slots.contiguous(), weights.contiguous()
        y = torch.empty((t, h), dtype=self.dtype)
        self.lib.understudy_combine(self._code, slots.data_ptr(), y.data_ptr(), weights.data_ptr(), t, k, h)
        return y

    def per_head(self, weights: Sequence[Tensor]) -> NativePerHead:
        return NativePerHead([self.linear(weight) for weight in weights])

    @property
    def wide(self) -> NativeOps:
        if self.dtype is torch.float32:
            return self
        if self._wide is None:
            self._wide = NativeOps(torch.float32)
        return self._wide

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
        x, wide = adjacent(x), self._wide_weight(weight, h)
        y = torch.empty((t, h), dtype=self.dtype)
        self.lib.understudy_rms_norm(
            self._code, wide, x.data_ptr(), x.stride(0), weight.data_ptr(), y.data_ptr(), t, h, eps
        )
        return y

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        t, h = x.shape
        if residual.stride(1) != 1:
            raise ValueError("the elements of a residual's row must be adjacent: it is changed in place")
        x, wide = adjacent(x), self._wide_weight(weight, h)
        y = torch.empty((t, h), dtype=self.dtype)
        self.lib.understudy_add_rms_norm(
            self._code, wide, x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0), weight.data_ptr(),
            y.data_ptr(), t, h, eps,
        )  # fmt: skip
        return y

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        t, h = x.shape
        x, wide = adjacent(x), self._wide_weight(weight, h)
        if bias is not None and (bias.dtype != weight.dtype or bias.shape != weight.shape or not bias.is_contiguous()):
            raise ValueError(f"the bias is {bias.dtype} {list(bias.shape)}, and the weight {weight.dtype} [{h}]")
        y = torch.empty((t, h), dtype=self.dtype)
        self.lib.understudy_layer_norm(
            self._code, wide, x.data_ptr(), x.stride(0), weight.data_ptr(), None if bias is None else bias.data_ptr(),
            y.data_ptr(), t, h, eps,
        )  # fmt: skip
        return y

    def _wide_weight(self, weight: Tensor, h: int) -> bool:
        """Whether a norm's weight is float32 beside this dtype."""
        if weight.dtype not in (self.dtype, torch.float32) or weight.shape != (h,) or not weight.is_contiguous():
            raise ValueError(
                f"a norm's weight is {self.dtype} or float32 [{h}], not {weight.dtype} {list(weight.shape)}"
            )
        return weight.dtype is torch.float32

    def gated_act(self, gate_up: Tensor, act: str = "silu") -> Tensor:
        known_act(act, GATED)
        t, width = gate_up.shape
        x, code = adjacent(gate_up), DTYPES[gate_up.dtype]
        y = torch.empty((t, width // 2), dtype=x.dtype)
        self.lib.understudy_gated_act(code, ACT_CODES[act], x.data_ptr(), x.stride(0), y.data_ptr(), t, width // 2)
        return y

    def act(self, x: Tensor, act: str) -> Tensor:
        known_act(act, ACTS)
        t, n = x.shape
        x = adjacent(x)
        y = torch.empty((t, n), dtype=x.dtype)
        self.lib.understudy_act(DTYPES[x.dtype], ACT_CODES[act], x.data_ptr(), x.stride(0), y.data_ptr(), t, n)
        return y

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        t, n = x.shape
        x = adjacent(x)
        y = torch.empty((t, n), dtype=x.dtype)
        self.lib.understudy_softcap(DTYPES[x.dtype], x.data_ptr(), x.stride(0), y.data_ptr(), t, n, cap)
        return y

    def route(self, logits: Tensor, route: Route, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t, experts = logits.shape
        check_route(route, experts, bias)
        x = adjacent(logits)
        bias = None if bias is None else bias.contiguous()
        ids = torch.empty((t, route.top_k), dtype=torch.int32)
        weights = torch.empty((t, route.top_k), dtype=torch.float32)
        self.lib.understudy_route(
            DTYPES[x.dtype], _route_code(route), x.data_ptr(), x.stride(0), None if bias is None else bias.data_ptr(),
            ids.data_ptr(), weights.data_ptr(), t, experts,
        )  # fmt: skip
        return ids, weights

    def logprobs(self, logits: Tensor) -> Tensor:
        s, v = logits.shape
        x = adjacent(logits)
        y = torch.empty((s, v), dtype=torch.float32)
        self.lib.understudy_logprobs(DTYPES[x.dtype], x.data_ptr(), x.stride(0), y.data_ptr(), s, v)
        return y

    def argmax(self, logits: Tensor) -> Tensor:
        s, v = logits.shape
        x = adjacent(logits)
        ids = torch.empty(s, dtype=torch.int64)
        self.lib.understudy_argmax(DTYPES[x.dtype], x.data_ptr(), x.stride(0), ids.data_ptr(), s, v)
        return ids
