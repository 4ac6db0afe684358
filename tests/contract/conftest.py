"""Fixtures: each implementation of Ops in turn."""

from __future__ import annotations

import pytest
from implementations import KINDS, NATIVE, get

from workers.kernels.native import NativeOps
from workers.kernels.ops import Ops


@pytest.fixture(params=KINDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return get(request.param)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> NativeOps:
    made = get(request.param)
    assert isinstance(made, NativeOps)
    return made


@pytest.fixture(params=[kind for kind in NATIVE if " bfloat16 " in kind])
def bf16_ops(request: pytest.FixtureRequest) -> NativeOps:
    made = get(request.param)
    assert isinstance(made, NativeOps)
    return made
