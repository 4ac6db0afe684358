"""Every implementation of Ops that this machine has, and what their tests share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from workers.kernels.build import BuildError
from workers.kernels.native import NativeOps
from workers.kernels.ops import Ops
from workers.kernels.plain import PlainOps

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = [f"plain {d}" for d in DTYPES] + [
    "native float32",
    "native float16",
    "native bfloat16 generic",
    "native bfloat16 avx512bf16",
    "native bfloat16 amx",
]
NATIVE = [kind for kind in KINDS if kind.startswith("native")]
EPS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place of 1


@cache
def make(kind: str) -> Ops | str:
    """The implementation, or why this machine lacks it."""
    name, dtype, *isa = kind.split()
    if name == "plain":
        return PlainOps(DTYPES[dtype])
    try:
        return NativeOps(DTYPES[dtype], threads=2, isa=isa[0] if isa else None)
    except (BuildError, ValueError) as reason:
        return str(reason)


def get(kind: str) -> Ops:
    made = make(kind)
    if isinstance(made, str):
        pytest.skip(made)
    return made


def random(dtype: torch.dtype, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_close(got: Tensor, want: Tensor, eps: float, error: Tensor | float = 0.0) -> None:
    """`got` is `want` rounded to a type with that eps, give or take `error`."""
    assert got.shape == want.shape
    excess = (got.double() - want).abs() - (want.abs() * eps * 1.01 + error)
    assert excess.max().item() <= 0, f"off by {excess.max().item()} more than rounding explains"


def assert_row_law(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """A row of x has the same bits whatever rows stand beside it: among 1 .. 40 of them, at any place, among all."""
    whole = f(x)
    for m in range(1, 41):
        assert torch.equal(f(x[:m]), whole[:m]), f"{m} rows"
    for start, m in ((1, 1), (7, 2), (13, 16), (31, 33), (39, 1), (100, 129)):
        assert torch.equal(f(x[start : start + m]), whole[start : start + m]), f"{m} rows from row {start}"


def experts_weights(dtype: torch.dtype, e: int, f: int, h: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    def each(n: int, k: int, seed: int) -> list[Tensor]:
        return [random(dtype, n, k, seed=seed + i, scale=k**-0.5) for i in range(e)]

    return each(f, h, 100), each(f, h, 200), each(h, f, 300)
