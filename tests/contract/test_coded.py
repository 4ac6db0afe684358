"""Weights that are kept in twelve bits give the bits of those that are not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import get, random
from torch import Tensor

from workers.kernels.native import NativeOps
from workers.kernels.native_linear import NativeLinear

BF16 = torch.bfloat16
ROWS = (1, 2, 3, 4, 5, 6, 7, 16, 33, 40, 150)


def pair(ops: NativeOps, weight: Tensor, bias: Tensor | None = None) -> tuple[NativeLinear, NativeLinear]:
    raw, coded = (NativeLinear(ops.lib, ops.family, weight, bias, BF16, each) for each in ("raw", "coded"))
    return raw, coded


def decodes(ops: NativeOps) -> bool:
    """Whether these kernels can: a weight that is nothing but zeros is coded wherever one is."""
    raw, coded = pair(ops, torch.zeros(64, 256, dtype=BF16))
    return coded.bytes < raw.bytes


def weights(n: int, k: int, seed: int = 0) -> Tensor:
    return random(BF16, n, k, seed=seed, scale=0.02)


def same(raw: NativeLinear, coded: NativeLinear, rows: int, seed: int) -> None:
    x = random(BF16, rows, raw.k, seed=seed)
    assert torch.equal(raw(x).view(torch.int16), coded(x).view(torch.int16))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (64, 4), (63, 5), (65, 31), (130, 64), (200, 33), (48, 300), (320, 1300)])
def test_coded_weights_have_the_bits_of_raw_ones(bf16_ops: NativeOps, n: int, k: int) -> None:
    raw, coded = pair(bf16_ops, weights(n, k), weights(1, n)[0])
    for rows in ROWS:
        same(raw, coded, rows, seed=rows)


def test_trained_weights_take_three_quarters(bf16_ops: NativeOps) -> None:
    if not decodes(bf16_ops):
        pytest.skip("the generic kernels decode with AVX2 and without AVX-512 alone")
    raw, coded = pair(bf16_ops, weights(640, 896))
    assert raw.bytes == 640 * 896 * 2
    assert coded.bytes < 0.78 * raw.bytes


def test_auto_codes_what_is_large(bf16_ops: NativeOps) -> None:
    for n, codes in ((64, False), (1024, decodes(bf16_ops))):
        weight = weights(n, 896)
        raw, coded = pair(bf16_ops, weight)
        auto = NativeLinear(bf16_ops.lib, bf16_ops.family, weight, None, BF16)
        assert auto.bytes == (coded if codes else raw).bytes


def test_values_beyond_the_book_are_kept(bf16_ops: NativeOps) -> None:
    """Zeros, subnormals and outliers here and there, at the ends of rows and columns too."""
    weight = weights(150, 203)
    odd = torch.tensor([0.0, -0.0, 1e-40, -1e-39, 3e38, 1e-20, -1e10])
    at = torch.arange(0, weight.numel(), 997)
    weight.view(-1)[at] = odd[torch.arange(len(at)) % len(odd)].to(BF16)
    weight[-1, -1], weight[0, 0], weight[149, 0] = 1e-30, 1e-30, 1e20
    raw, coded = pair(bf16_ops, weight)
    if decodes(bf16_ops):
        assert coded.bytes < raw.bytes
    for rows in ROWS:
        same(raw, coded, rows, seed=rows)


def test_weights_of_every_size_stay_as_they_are(bf16_ops: NativeOps) -> None:
    bits = torch.randint(-(2**15), 2**15, (256, 256), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    weight = bits.view(BF16)
    weight[~weight.isfinite()] = 0
    raw, coded = pair(bf16_ops, weight)
    assert coded.bytes == raw.bytes
    same(raw, coded, 5, seed=1)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_passes(bf16_ops: NativeOps, value: float) -> None:
    weight = weights(80, 160)
    weight[17, 31] = weight[79, 159] = value
    raw, coded = pair(bf16_ops, weight)
    for rows in (1, 3, 20):
        same(raw, coded, rows, seed=rows)


@settings(max_examples=40)
@given(
    n=st.integers(1, 200), k=st.integers(1, 700), rows=st.integers(1, 70), strange=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_shape(n: int, k: int, rows: int, strange: int, seed: int) -> None:
    ops = get("native bfloat16 generic")
    assert isinstance(ops, NativeOps)
    dice = torch.Generator().manual_seed(seed)
    weight = weights(n, k, seed)
    at = torch.randint(0, weight.numel(), (strange,), generator=dice)
    weight.view(-1)[at] = torch.pow(2.0, torch.randint(-120, 100, (strange,), generator=dice).float()).to(BF16)
    same(*pair(ops, weight), rows, seed)


def test_threads_read_each_panel_to_its_end(bf16_ops: NativeOps) -> None:
    """Many panels a thread, so that one's end asks for the next one's beginning."""
    raw, coded = pair(bf16_ops, weights(2500, 96))
    for rows in (1, 2, 4, 64):
        same(raw, coded, rows, seed=rows)
