"""Every implementation of Ops: what it computes, and the row law of `workers.kernels.ops`. Attention: its own file."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import EPS, KINDS, NATIVE, assert_close, assert_row_law, experts_weights, get, make, random

from workers.kernels.native import NativeOps
from workers.kernels.ops import Ops
from workers.kernels.plain import PlainOps
from workers.model.spec import Route


def check_linear(ops: Ops, t: int, n: int, k: int, bias: bool, seed: int = 0) -> None:
    x, w = random(ops.dtype, t, k, seed=seed), random(ops.dtype, n, k, seed=seed + 1)
    b = random(ops.dtype, n, seed=seed + 2) if bias else None
    linear = ops.linear(w, b)
    assert (linear.n, linear.k) == (n, k)
    want = x.double() @ w.double().T + (0 if b is None else b.double())
    bound = x.double().abs() @ w.double().abs().T + (0 if b is None else b.double().abs())
    got = linear(x)
    assert got.dtype == ops.dtype
    # Summing k terms in float32 in any order errs by at most about k * 2^-24 of the sum of magnitudes.
    assert_close(got, want, EPS[ops.dtype], bound * (k + 2) * 2.0**-24)


# Linear --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "n", "k", "bias"),
    [
        (1, 1, 1, True),
        (5, 17, 33, False),
        (40, 100, 37, True),
        (33, 64, 64, False),
        (16, 257, 129, True),
        (3, 31, 1000, True),
    ],
)
def test_linear_is_the_product(ops: Ops, t: int, n: int, k: int, bias: bool) -> None:
    check_linear(ops, t, n, k, bias)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(NATIVE),
    t=st.integers(1, 70),
    n=st.integers(1, 150),
    k=st.integers(1, 150),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear_of_any_shape(kind: str, t: int, n: int, k: int, bias: bool, seed: int) -> None:
    check_linear(get(kind), t, n, k, bias, seed)


@pytest.mark.parametrize(("n", "k"), [(96, 64), (160, 897), (33, 2600)])
def test_linear_keeps_the_row_law(ops: Ops, n: int, k: int) -> None:
    linear = ops.linear(random(ops.dtype, n, k), random(ops.dtype, n, seed=1))
    assert_row_law(linear, random(ops.dtype, 300, k, seed=2))


def test_rows_in_the_thousands_have_the_bits_of_one(native: NativeOps) -> None:
    linear = native.linear(random(native.dtype, 300, 2700))
    x = random(native.dtype, 1030, 2700, seed=1)
    whole = linear(x)
    for row in (0, 31, 500, 1024, 1029):
        assert torch.equal(linear(x[row : row + 1])[0], whole[row])


def test_one_thread_gives_the_bits_of_two(native: NativeOps) -> None:
    linear = native.linear(random(native.dtype, 500, 200))
    x = random(native.dtype, 300, 200, seed=1)
    two = linear(x)
    native.lib.understudy_set_threads(1)
    try:
        one = linear(x)
    finally:
        native.lib.understudy_set_threads(2)
    assert torch.equal(one, two)


def test_linear_takes_rows_that_lie_apart(ops: Ops) -> None:
    w = random(ops.dtype, 70, 45)
    x = random(ops.dtype, 20, 100, seed=1)
    linear = ops.linear(w)
    want = linear(x[:, 3:48].contiguous())
    assert torch.equal(linear(x[:, 3:48]), want)
    assert torch.equal(linear(x[:, 3:48].T.contiguous().T), want)


def test_linear_packs_a_view_and_forgets_it(ops: Ops) -> None:
    storage = random(ops.dtype, 60, 80)
    x = random(ops.dtype, 4, 50, seed=1)
    linear = ops.linear(storage[5:45, 10:60])
    want = ops.linear(storage[5:45, 10:60].clone())(x)
    storage.zero_()
    assert torch.equal(linear(x), want)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_linear_passes_on_what_is_not_finite_in_its_row_only(ops: Ops, value: float) -> None:
    linear = ops.linear(random(ops.dtype, 40, 50).abs() + 0.5)
    x = random(ops.dtype, 9, 50, seed=1)
    clean = linear(x)
    x[4, 49] = value
    got = linear(x)
    assert torch.equal(got[4], torch.full((40,), value, dtype=ops.dtype)) or (
        math.isnan(value) and got[4].isnan().all()
    )
    keep = torch.arange(9) != 4
    assert torch.equal(got[keep], clean[keep])


def test_linear_of_no_rows(ops: Ops) -> None:
    assert ops.linear(random(ops.dtype, 40, 50))(random(ops.dtype, 0, 50)).shape == (0, 40)


def test_native_linear_says_what_does_not_fit(native: NativeOps) -> None:
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        native.linear(random(native.dtype, 40))
    with pytest.raises(ValueError, match="bias"):
        native.linear(random(native.dtype, 40, 50), random(native.dtype, 41))
    with pytest.raises(ValueError, match=r"takes \[T, 50\]"):
        native.linear(random(native.dtype, 40, 50))(random(native.dtype, 2, 51))
    with pytest.raises(ValueError, match="takes"):
        native.linear(random(native.dtype, 40, 50))(random(torch.float64, 2, 50))


# Experts and their gate ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "k", "f", "h"), [(1, 2, 96, 64), (40, 2, 33, 50), (70, 3, 65, 130)])
def test_experts_are_the_weighted_sum(ops: Ops, t: int, k: int, f: int, h: int) -> None:
    gate, up, down = experts_weights(ops.dtype, 5, f, h)
    x = random(ops.dtype, t, h)
    ids, weights = ops.route(random(ops.dtype, t, 5, seed=1), Route(k))
    got = ops.experts(gate, up, down)(x, ids, weights)
    want = torch.zeros(t, h, dtype=torch.float64)
    for row in range(t):
        for slot in range(k):
            e = int(ids[row, slot])
            g, u = gate[e].double() @ x[row].double(), up[e].double() @ x[row].double()
            want[row] += weights[row, slot].double() * (down[e].double() @ (F.silu(g) * u))
    assert got.dtype == ops.dtype
    # Gate, up, their product and each output are rounded on the way: some roundings of values of magnitude about 1.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=40 * EPS[ops.dtype])


def test_experts_keep_the_row_law(ops: Ops) -> None:
    experts = ops.experts(*experts_weights(ops.dtype, 4, 70, 64))
    x = random(ops.dtype, 300, 64)
    ids, weights = ops.route(random(ops.dtype, 300, 4, seed=1), Route(2))
    whole = experts(x, ids, weights)
    for start, m in ((0, 1), (1, 1), (7, 2), (13, 16), (31, 33), (39, 1), (0, 40), (100, 129)):
        rows = slice(start, start + m)
        assert torch.equal(experts(x[rows], ids[rows], weights[rows]), whole[rows]), f"{m} rows from row {start}"


def test_experts_of_no_rows(ops: Ops) -> None:
    experts, none = ops.experts(*experts_weights(ops.dtype, 4, 16, 16)), torch.zeros(0, 2)
    assert experts(random(ops.dtype, 0, 16), none.int(), none).shape == (0, 16)


def test_native_experts_refuse_an_id_that_names_none(native: NativeOps) -> None:
    experts = native.experts(*experts_weights(native.dtype, 4, 16, 16))
    for bad in (-1, 4):
        with pytest.raises(IndexError, match=r"0 \.\. 3"):
            experts(random(native.dtype, 1, 16), torch.tensor([[0, bad]], dtype=torch.int32), torch.ones(1, 2))


@pytest.mark.parametrize("renormalize", [True, False])
def test_gate_is_softmax_and_the_likeliest(ops: Ops, renormalize: bool) -> None:
    logits = random(ops.dtype, 50, 37, scale=2.0)
    ids, weights = ops.route(logits, Route(4, renormalize=renormalize))
    probs = torch.softmax(logits.double(), -1)
    chosen = torch.gather(probs, 1, ids.long())
    assert ids.dtype == torch.int32
    assert torch.equal(chosen, chosen.sort(descending=True).values)
    assert (chosen[:, -1] >= probs.sort(descending=True).values[:, 3]).all()
    want = chosen / chosen.sum(-1, keepdim=True) if renormalize else chosen
    torch.testing.assert_close(weights.double(), want, rtol=1e-5, atol=1e-7)


def test_gate_breaks_ties_by_the_lower_id(ops: Ops) -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0] * 5], dtype=ops.dtype)
    ids, _ = ops.route(logits, Route(2))
    assert ids.tolist() == [[1, 2], [0, 1]]


# Row by row ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [1, 15, 64, 100, 1000])
def test_rms_norm(ops: Ops, h: int) -> None:
    x, weight = random(ops.dtype, 9, h, scale=3.0), random(ops.dtype, h, seed=1)
    wide = x.double()
    want = (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()) * weight.double()
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6).double(), want, rtol=5 * EPS[ops.dtype], atol=1e-6)


def test_add_rms_norm_changes_the_residual(ops: Ops) -> None:
    x, residual, weight = random(ops.dtype, 9, 70), random(ops.dtype, 9, 70, seed=1), random(ops.dtype, 70, seed=2)
    total = residual + x
    got = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(got, ops.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("f", [1, 15, 33, 3000])
def test_silu_mul(ops: Ops, f: int) -> None:
    x = random(ops.dtype, 5, 2 * f, scale=4.0)
    want = F.silu(x[:, :f].double()) * x[:, f:].double()
    torch.testing.assert_close(ops.gated_act(x).double(), want, rtol=2.1 * EPS[ops.dtype] + 1e-6, atol=1e-7)


def test_silu_mul_at_the_ends(ops: Ops) -> None:
    x = torch.tensor([[-1000.0, 1000.0, 0.0, 1.0, 1.0, 1.0]], dtype=ops.dtype)
    assert ops.gated_act(x).tolist() == [[0.0, 1000.0, 0.0]]


@pytest.mark.parametrize(("t", "k", "f"), [(1, 32, 48), (3, 40, 17), (40, 64, 96), (300, 96, 600)])
@pytest.mark.parametrize("biased", [False, True])
def test_swiglu_has_the_bits_of_its_parts(ops: Ops, t: int, k: int, f: int, biased: bool) -> None:
    x, gate, up = random(ops.dtype, t, k), random(ops.dtype, f, k, seed=1), random(ops.dtype, f, k, seed=2)
    biases = [random(ops.dtype, f, seed=3), random(ops.dtype, f, seed=4)] if biased else [None, None]
    parts = torch.cat([ops.linear(gate, biases[0])(x), ops.linear(up, biases[1])(x)], dim=1)
    want = ops.gated_act(parts)
    if isinstance(ops, PlainOps):  # its linears differ with their shape
        torch.testing.assert_close(
            ops.gated(gate, up, *biases)(x), want, rtol=4 * EPS[ops.dtype], atol=4 * EPS[ops.dtype]
        )
    else:
        assert torch.equal(ops.gated(gate, up, *biases)(x), want)


@pytest.mark.parametrize("v", [1, 50, 8192, 20001])
def test_logprobs(ops: Ops, v: int) -> None:
    logits = random(ops.dtype, 3, v, scale=5.0)
    got = ops.logprobs(logits)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.log_softmax(logits.double(), -1), rtol=1e-6, atol=2e-5)


def test_logprobs_of_masked_tokens(ops: Ops) -> None:
    logits = torch.tensor([[0.0, float("-inf"), 0.0]], dtype=ops.dtype)
    got = ops.logprobs(logits)
    assert got[0, 1] == float("-inf")
    assert got[0, 0].item() == pytest.approx(-0.6931472)


def test_logprobs_takes_float32(ops: Ops) -> None:
    logits = random(torch.float32, 2, 100)
    torch.testing.assert_close(ops.logprobs(logits), torch.log_softmax(logits, -1))


def test_row_functions_keep_the_row_law(ops: Ops) -> None:
    weight = random(ops.dtype, 134)
    x = random(ops.dtype, 300, 134, seed=1, scale=3.0)
    assert_row_law(lambda rows: ops.rms_norm(rows, weight, 1e-6), x)
    assert_row_law(lambda rows: ops.add_rms_norm(rows, rows.clone(), weight, 1e-6), x)
    assert_row_law(ops.gated_act, x)
    assert_row_law(ops.logprobs, x)
    assert_row_law(lambda rows: ops.route(rows, Route(3))[1], x)


def test_swiglu_keeps_the_row_law(ops: Ops) -> None:
    f, k = 333, 70
    assert_row_law(
        ops.gated(random(ops.dtype, f, k, seed=1), random(ops.dtype, f, k, seed=2)), random(ops.dtype, 300, k)
    )


def test_row_functions_take_rows_that_lie_apart(ops: Ops) -> None:
    x, weight = random(ops.dtype, 12, 200), random(ops.dtype, 66)
    part = x[:, 7:73]
    for f in (ops.gated_act, ops.logprobs, lambda rows: ops.rms_norm(rows, weight, 1e-6)):
        assert torch.equal(f(part), f(part.contiguous()))
        torch.testing.assert_close(f(part.T.contiguous().T), f(part.contiguous()))


def test_embed(ops: Ops) -> None:
    table = random(ops.dtype, 30, 20)
    ids = torch.tensor([3, 0, 29, 3])
    assert torch.equal(ops.embed(table, ids), table[ids])
    with pytest.raises(IndexError):
        ops.embed(table, torch.tensor([30]))


@pytest.mark.parametrize("v", [1, 15, 4096, 10_007])
def test_argmax_takes_the_first_of_equals(ops: Ops, v: int) -> None:
    logits = random(ops.dtype, 40, v)
    logits[7, [v // 2, v - 1]] = 50.0
    logits[8] = float("-inf")
    logits[9, [v // 3, v - 1]] = float("inf")
    assert ops.argmax(logits).tolist() == logits.float().numpy().argmax(axis=1).tolist()
    assert ops.argmax(logits)[7] == v // 2


def test_argmax_cannot_overlook_what_is_no_number(ops: Ops) -> None:
    logits = random(ops.dtype, 3, 9001)
    logits[0, [4500, 8999]] = float("nan")
    logits[0, 17] = float("inf")
    logits[2, 9000] = float("nan")
    assert ops.argmax(logits)[[0, 2]].tolist() == [4500, 9000]
    assert ops.argmax(logits[:, :9000][1:2]).item() == logits[1, :9000].float().argmax()


# What it is called ---------------------------------------------------------------------------------------------------


def test_numerics_ids_tell_kernels_apart() -> None:
    made = [make(kind) for kind in KINDS]
    ids = [ops.numerics_id for ops in made if not isinstance(ops, str)]
    assert len(set(ids)) == len(ids)


def test_an_unknown_isa_is_named(native: NativeOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_ISA", "sse2")
    with pytest.raises(ValueError, match="sse2"):
        NativeOps(native.dtype)
    with pytest.raises(ValueError, match="float64"):
        NativeOps(torch.float64)
