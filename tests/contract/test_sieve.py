"""A sieve's answer is the argmax of the whole product, bit for bit, or none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import get, random
from torch import Tensor

from workers.kernels.native import NativeOps
from workers.kernels.native_linear import NativeLinear, NativeSieve

BF16 = torch.bfloat16


def sieve_of(ops: NativeOps, weight: Tensor) -> tuple[NativeLinear, NativeSieve | None]:
    head = ops.linear(weight)
    handle = ops.lib.understudy_sieve_new(head.handle, weight.data_ptr(), weight.stride(0))
    return head, NativeSieve(ops.lib, head, handle) if handle else None


def agree(ops: NativeOps, head: NativeLinear, sieve: NativeSieve, x: Tensor) -> bool:
    """Whether the sieve answered; where it did, rightly."""
    logits, found = head(x), sieve(x)
    if found is None:
        return False
    ids, values = found
    assert torch.equal(ids, ops.argmax(logits))
    assert values.item() == logits[0, ids.item()].item()
    return True


@pytest.mark.parametrize(("n", "k"), [(4096, 64), (5000, 65), (3001, 96), (8192, 300)])
def test_the_likeliest_is_found(bf16_ops: NativeOps, n: int, k: int) -> None:
    weight = random(BF16, n, k, seed=1, scale=0.02)
    head, sieve = sieve_of(bf16_ops, weight)
    if sieve is None:
        pytest.skip("no sieve without AVX2")
    answered = 0
    for seed in range(40):
        answered += agree(bf16_ops, head, sieve, random(BF16, 1, k, seed=seed))
        toward = weight[seed * 71] * 40 + random(BF16, 1, k, seed=seed)  # one far ahead, as in trained models
        assert agree(bf16_ops, head, sieve, toward)
    assert answered > 0


def test_of_equals_the_first_is_found(bf16_ops: NativeOps) -> None:
    weight = random(BF16, 4096, 64, seed=2)
    weight[[3000, 77, 4095]] = weight[1234] * 2
    weight[1234] = weight[77]
    _, sieve = sieve_of(bf16_ops, weight)
    if sieve is None:
        pytest.skip("no sieve without AVX2")
    found = sieve(weight[77:78].clone())
    assert found is not None
    assert found[0].item() == 77


def test_what_rounding_makes_equal_is_not_lost(bf16_ops: NativeOps) -> None:
    """Columns that differ by less than the logit's last bit: the lower id wins, though its sum is smaller."""
    weight = random(BF16, 4096, 64, seed=3)
    direction = torch.ones(64)
    weight[100], weight[2000] = direction.to(BF16), direction.to(BF16)
    weight[100, 0] = 0.9921875  # one unit in the last place below
    head, sieve = sieve_of(bf16_ops, weight)
    if sieve is None:
        pytest.skip("no sieve without AVX2")
    x = torch.ones(1, 64, dtype=BF16)
    assert head(x)[0, 100] == head(x)[0, 2000]
    found = sieve(x)
    assert found is not None
    assert found[0].item() == 100


def test_what_a_sieve_cannot_tell_it_leaves(bf16_ops: NativeOps) -> None:
    weight = random(BF16, 4096, 64, seed=4)
    _, sieve = sieve_of(bf16_ops, weight)
    if sieve is None:
        pytest.skip("no sieve without AVX2")
    for value in (0.0, float("nan"), float("inf")):
        assert sieve(torch.full((1, 64), value, dtype=BF16)) is None
    x = random(BF16, 1, 64, seed=5)
    x[0, 3] = float("nan")
    assert sieve(x) is None
    _, flat = sieve_of(bf16_ops, weight[:1].expand(4096, 64).contiguous())  # all alike
    assert flat is not None
    assert flat(random(BF16, 1, 64, seed=5)) is None


def test_no_sieve_of_what_is_not_finite(bf16_ops: NativeOps) -> None:
    weight = random(BF16, 4096, 64, seed=6)
    weight[4000, 63] = float("inf")
    assert sieve_of(bf16_ops, weight)[1] is None


def test_a_small_head_has_none(bf16_ops: NativeOps) -> None:
    weight = random(BF16, 640, 64, seed=7)
    assert bf16_ops.sieve(bf16_ops.linear(weight), weight) is None


def test_a_sieve_says_what_does_not_fit(bf16_ops: NativeOps) -> None:
    _, sieve = sieve_of(bf16_ops, random(BF16, 4096, 64, seed=8))
    if sieve is None:
        pytest.skip("no sieve without AVX2")
    for x in (torch.zeros(2, 64, dtype=BF16), torch.zeros(1, 63, dtype=BF16), torch.zeros(1, 64)):
        with pytest.raises(ValueError, match="this sieve takes"):
            sieve(x)


@settings(max_examples=60)
@given(
    n=st.integers(256, 3000), k=st.integers(1, 200), power=st.integers(-30, 20), spread=st.integers(0, 12),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_head(n: int, k: int, power: int, spread: int, seed: int) -> None:
    """Columns and inputs of all sizes, some of them nearly alike."""
    ops = get("native bfloat16 generic")
    assert isinstance(ops, NativeOps)
    dice = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=dice) * 2.0**power
    weight *= torch.pow(2.0, torch.randint(-spread, 1, (n, 1), generator=dice).float())
    twins = torch.randint(0, n, (2, n // 8), generator=dice)
    weight[twins[0]] = weight[twins[1]] * (1 + 2.0**-9 * torch.randn(n // 8, 1, generator=dice))
    head, sieve = sieve_of(ops, weight.to(BF16))
    if sieve is None:
        return
    x = torch.randn(6, k, generator=dice) * torch.pow(2.0, torch.randint(-spread, 1, (6, k), generator=dice).float())
    x[3:] = weight[torch.randint(0, n, (3,), generator=dice)] / 2.0**power
    for row in x.to(BF16):
        agree(ops, head, sieve, row[None])
