"""What other architectures need of every implementation of Ops: its meaning against float64, and the row law."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from implementations import EPS, assert_row_law, experts_weights, random
from torch import Tensor

from workers.kernels.native import NativeOps
from workers.kernels.ops import Ops
from workers.model.spec import Route

ACTS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
PAIRS = [*ACTS, "clamped"]


def gated_pair(act: str, gate: Tensor, up: Tensor) -> Tensor:
    """The definition, in float64."""
    if act != "clamped":
        return ACTS[act](gate) * up
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("n", [1, 15, 3000])
def test_activations(ops: Ops, act: str, n: int) -> None:
    x = random(ops.dtype, 5, n, scale=3.0)
    torch.testing.assert_close(
        ops.act(x, act).double(), ACTS[act](x.double()), rtol=1.1 * EPS[ops.dtype] + 1e-6, atol=1e-6
    )


@pytest.mark.parametrize("act", ACTS)
def test_activations_at_the_ends(ops: Ops, act: str) -> None:
    x = torch.tensor([[-1000.0, -20.0, 0.0, 1000.0, float("inf"), float("nan")]], dtype=ops.dtype)
    got = ops.act(x, act)[0].tolist()
    assert got[0] == got[2] == 0.0
    assert got[1] == pytest.approx(0.0, abs=1e-6)
    assert got[3:5] == [1000.0, float("inf")]
    assert math.isnan(got[5])


@pytest.mark.parametrize("act", PAIRS)
@pytest.mark.parametrize("f", [1, 33, 3000])
def test_gated_pairs(ops: Ops, act: str, f: int) -> None:
    x = random(ops.dtype, 5, 2 * f, scale=4.0)
    want = gated_pair(act, x[:, :f].double(), x[:, f:].double())
    torch.testing.assert_close(ops.gated_act(x, act).double(), want, rtol=2.1 * EPS[ops.dtype] + 2e-6, atol=1e-5)


def test_a_clamped_pair_keeps_what_is_no_number(ops: Ops) -> None:
    nan = float("nan")
    x = torch.tensor([[nan, 1.0, 100.0, 1.0, nan, -100.0]], dtype=ops.dtype)
    got = ops.gated_act(x, "clamped")[0]
    assert got[:2].isnan().all()
    assert got[2].item() == pytest.approx(-42.0, rel=0.01)


@pytest.mark.parametrize("act", PAIRS)
@pytest.mark.parametrize(("t", "k", "f"), [(1, 32, 48), (40, 64, 96)])
def test_gated_has_the_bits_of_its_parts(native: NativeOps, act: str, t: int, k: int, f: int) -> None:
    x, gate, up = random(native.dtype, t, k), random(native.dtype, f, k, seed=1), random(native.dtype, f, k, seed=2)
    bias = random(native.dtype, f, seed=3)
    parts = torch.cat([native.linear(gate, bias)(x), native.linear(up)(x)], dim=1)
    assert torch.equal(native.gated(gate, up, bias, None, act)(x), native.gated_act(parts, act))


def test_unknown_activations_are_named(ops: Ops) -> None:
    with pytest.raises(ValueError, match=r"'swish'.*silu, gelu"):
        ops.act(random(ops.dtype, 1, 2), "swish")
    with pytest.raises(ValueError, match="'clamped'"):
        ops.act(random(ops.dtype, 1, 2), "clamped")
    with pytest.raises(ValueError, match=r"'swish'.*clamped"):
        ops.gated_act(random(ops.dtype, 1, 2), "swish")
    with pytest.raises(ValueError, match="'swish'"):
        ops.gated(random(ops.dtype, 2, 2), random(ops.dtype, 2, 2), act="swish")


def test_softcap(ops: Ops) -> None:
    x = torch.cat([random(ops.dtype, 3, 500, scale=40.0), random(ops.dtype, 3, 500, scale=0.01)], 1)
    want = 30 * torch.tanh(x.double() / 30)
    torch.testing.assert_close(ops.softcap(x, 30.0).double(), want, rtol=1.1 * EPS[ops.dtype] + 1e-6, atol=0)


@pytest.mark.parametrize("h", [1, 15, 64, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_layer_norm(ops: Ops, h: int, biased: bool) -> None:
    x, weight = random(ops.dtype, 9, h, scale=3.0) + 2, random(ops.dtype, h, seed=1)
    bias = random(ops.dtype, h, seed=2) if biased else None
    want = F.layer_norm(x.double(), (h,), weight.double(), None if bias is None else bias.double(), 1e-5)
    torch.testing.assert_close(
        ops.layer_norm(x, weight, bias, 1e-5).double(), want, rtol=1.1 * EPS[ops.dtype], atol=1e-5
    )


def test_a_float32_weight_rounds_once(ops: Ops) -> None:
    x, weight = random(ops.dtype, 9, 100, scale=3.0), random(torch.float32, 100, seed=1)
    wide = x.double()
    want = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    got = ops.rms_norm(x, weight, 1e-6)
    assert got.dtype == ops.dtype
    torch.testing.assert_close(got.double(), want, rtol=1.02 * EPS[ops.dtype] + 5e-7, atol=0)
    residual = torch.zeros_like(x)
    assert torch.equal(ops.add_rms_norm(x, residual, weight, 1e-6), got)


def test_per_head_has_the_bits_of_each(ops: Ops) -> None:
    weights = [random(ops.dtype, 24, 40, seed=s) for s in range(3)]
    x = random(ops.dtype, 17, 120, seed=9)
    both = ops.per_head(weights)
    assert (both.n, both.k) == (72, 120)
    want = torch.cat([ops.linear(w)(x[:, 40 * g : 40 * g + 40]) for g, w in enumerate(weights)], dim=1)
    assert torch.equal(both(x), want)


def test_wide_is_float32(ops: Ops) -> None:
    assert ops.wide.dtype == torch.float32
    assert ops.wide is ops.wide
    assert (ops.wide is ops) == (ops.dtype == torch.float32)
    x, w = random(torch.float32, 3, 20), random(torch.float32, 4, 20, seed=1)
    torch.testing.assert_close(ops.wide.linear(w)(x), x @ w.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "clamped"])
def test_experts_with_biases(ops: Ops, act: str) -> None:
    t, e, f, h = 40, 5, 33, 50
    gate, up, down = experts_weights(ops.dtype, e, f, h)
    biases = tuple([random(ops.dtype, n, seed=s + i) for i in range(e)] for s, n in ((7, f), (17, f), (27, h)))
    x = random(ops.dtype, t, h)
    ids, weights = ops.route(random(ops.dtype, t, e, seed=1), Route(2, "chosen_softmax"))
    got = ops.experts(gate, up, down, biases, act)(x, ids, weights)
    want = torch.zeros(t, h, dtype=torch.float64)
    for row in range(t):
        for slot in range(2):
            i = int(ids[row, slot])
            g = gate[i].double() @ x[row].double() + biases[0][i]
            u = up[i].double() @ x[row].double() + biases[1][i]
            out = down[i].double() @ gated_pair(act, g, u) + biases[2][i]
            want[row] += weights[row, slot].double() * out
    torch.testing.assert_close(got.double(), want, rtol=0, atol=60 * EPS[ops.dtype])


# Routes --------------------------------------------------------------------------------------------------------------

ROUTES = [
    Route(4),
    Route(4, renormalize=False, scale=2.5),
    Route(3, "sigmoid"),
    Route(3, "chosen_softmax"),
    Route(6, "softmax", renormalize=False, groups=4, top_groups=2, group_score="max", scale=16.0),
    Route(6, "sigmoid", groups=4, top_groups=2, group_score="top2", bias=True, scale=2.5),
    Route(2, "sigmoid", bias=True),
]


def routed(logits: Tensor, route: Route, bias: Tensor | None) -> tuple[list[int], list[float]]:
    """The definition for one token, in Python's numbers."""
    x = logits.double()
    scores = {"softmax": x.softmax(-1), "sigmoid": x.sigmoid(), "chosen_softmax": x}[route.scoring].tolist()
    choice = [s + (0.0 if bias is None else float(bias[e])) for e, s in enumerate(scores)]
    size = len(choice) // route.groups

    def mark(group: int) -> float:
        best = sorted(choice[group * size : (group + 1) * size], reverse=True)
        return sum(best[:2]) if route.group_score == "top2" else best[0]

    opened = sorted(range(route.groups), key=lambda g: (-mark(g), g))[: route.top_groups]
    among = [e for e in range(len(choice)) if route.groups == 1 or e // size in opened]
    ids = sorted(among, key=lambda e: (-choice[e], e))[: route.top_k]
    weights = torch.tensor([scores[e] for e in ids], dtype=torch.float64)
    if route.scoring == "chosen_softmax":
        weights = weights.softmax(-1)
    elif route.renormalize:
        weights = weights / weights.sum()
    return ids, (weights * route.scale).tolist()


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_routes(ops: Ops, route: Route) -> None:
    # Values far enough apart that float32 orders them as float64 does.
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s)) for s in range(50)])
    logits = (order.float() / 4 - 2).to(ops.dtype)
    bias = torch.randperm(16, generator=torch.Generator().manual_seed(99)).float() / 37 if route.bias else None
    ids, weights = ops.route(logits, route, bias)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert ids.shape == weights.shape == (50, route.top_k)
    for row in range(50):
        want_ids, want = routed(logits[row], route, bias)
        assert ids[row].tolist() == want_ids
        assert weights[row].tolist() == pytest.approx(want, rel=1e-5, abs=1e-7)


def test_ties_of_groups_go_to_the_lower_id(ops: Ops) -> None:
    route = Route(2, "sigmoid", groups=3, top_groups=1)
    ids, _ = ops.route(torch.tensor([[0.0, 2.0, 2.0, 0.0, 1.0, 1.0]], dtype=ops.dtype), route)
    assert ids.tolist() == [[1, 0]]


def test_sigmoids_that_are_all_zero_are_no_division_by_it(ops: Ops) -> None:
    _, weights = ops.route(torch.full((1, 4), -60000.0, dtype=ops.dtype), Route(2, "sigmoid"))
    assert weights.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("route", "bias", "words"),
    [
        (Route(9), None, r"1 \.\. 8 of 8 experts, not 9"),
        (Route(0), None, "not 0"),
        (Route(3, groups=4, top_groups=1), None, r"1 \.\. 2 of 8"),
        (Route(1, groups=3), None, "8 experts in 3 groups"),
        (Route(1, groups=2, top_groups=3), None, r"1 \.\. 2 open"),
        (Route(1, bias=True), None, "bias is missing"),
        (Route(1), torch.zeros(8), "bias is given"),
        (Route(1, bias=True), torch.zeros(7), r"\(7,\); float32 \(8,\)"),
    ],
)
def test_routes_that_cannot_be(ops: Ops, route: Route, bias: Tensor | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ops.route(random(ops.dtype, 2, 8), route, bias)


# The row law ---------------------------------------------------------------------------------------------------------


def test_kinds_keep_the_row_law(ops: Ops) -> None:
    x = random(ops.dtype, 300, 48, scale=3.0)
    weight, wide = random(ops.dtype, 48, seed=1), random(torch.float32, 48, seed=1)
    bias = random(torch.float32, 48, seed=2)
    assert_row_law(lambda rows: ops.layer_norm(rows, weight, weight, 1e-5), x)
    assert_row_law(lambda rows: ops.rms_norm(rows, wide, 1e-5), x)
    assert_row_law(lambda rows: ops.softcap(rows, 5.0), x)
    assert_row_law(ops.per_head([random(ops.dtype, 8, 12, seed=s) for s in range(4)]), x)
    for act in ("gelu", "gelu_tanh"):
        assert_row_law(lambda rows, act=act: ops.act(rows, act), x)
    assert_row_law(lambda rows: ops.gated_act(rows, "clamped"), x)
    for route in (
        Route(5, "sigmoid", groups=4, top_groups=2, group_score="top2", bias=True),
        Route(5, "chosen_softmax"),
    ):
        assert_row_law(lambda rows, route=route: torch.cat(ops.route(rows, route, bias if route.bias else None), 1), x)


# Experts that are computed apart --------------------------------------------------------------------------------------


def mixed(t: int, k: int, e: int, seed: int) -> tuple[Tensor, Tensor]:
    """k different experts of each row, and weights of either sign, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(e, generator=generator)[:k] for _ in range(t)]).to(torch.int32)
    weights = torch.randn(t, k, generator=generator)
    return ids, weights.masked_fill(weights.abs() < 0.1, 0.0)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
@pytest.mark.parametrize(("t", "k", "e", "f", "h"), [(1, 1, 7, 32, 32), (37, 3, 7, 48, 65), (16, 7, 7, 33, 96)])
def test_experts_computed_apart_and_combined_are_the_fused_call(
    ops: Ops, parts: int, t: int, k: int, e: int, f: int, h: int
) -> None:
    """Whatever experts lie together: slots computed one by one and combined have the bits of one call."""
    gate, up, down = experts_weights(ops.dtype, e, f, h)
    x = random(ops.dtype, t, h)
    x[0] = 0.0  # whose slots are zeros of either sign
    ids, weights = mixed(t, k, e, seed=parts)
    fused = ops.experts(gate, up, down)(x, ids, weights)
    one_by_one = [ops.experts(*([part[i]] for part in (gate, up, down))) for i in range(e)]
    home = torch.randint(parts, (e,), generator=torch.Generator().manual_seed(parts))
    slots = torch.full((t, k, h), float("nan"), dtype=ops.dtype)
    for part in range(parts):
        held = torch.where(home == part)[0].tolist()
        if not held:
            continue
        some = ops.join_experts([one_by_one[i] for i in held])
        rows, at = torch.where(home[ids.long()] == part)
        local = torch.tensor([held.index(i) for i in ids[rows, at].tolist()], dtype=torch.int32)
        slots[rows, at] = some(x[rows], local[:, None], torch.ones(len(rows), 1))
        assert torch.equal(some.slots(x, rows.to(torch.int32), local), slots[rows, at])
    assert torch.equal(ops.combine(slots, weights), fused)
    assert torch.equal(ops.combine(slots, weights).signbit(), fused.signbit())


def test_slots_of_rows_or_experts_that_are_not_there_are_refused(ops: Ops) -> None:
    experts, x = ops.experts(*experts_weights(ops.dtype, 3, 32, 64)), random(ops.dtype, 5, 64)

    def slots(rows: list[int], ids: list[int]) -> Tensor:
        return experts.slots(x, torch.tensor(rows, dtype=torch.int32), torch.tensor(ids, dtype=torch.int32))

    assert slots([], []).shape == (0, 64)
    for rows in ([0, 5], [-1, 0]):
        with pytest.raises(IndexError, match=r"row is outside of 0 \.\. 4"):
            slots(rows, [0, 1])
    for ids in ([0, 3], [-1, 0]):
        with pytest.raises(IndexError, match=r"id is outside of 0 \.\. 2"):
            slots([0, 1], ids)


def test_slots_are_combined_row_by_row(ops: Ops) -> None:
    slots, weights = random(ops.dtype, 300, 4 * 65), torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    both = torch.cat([slots, weights.to(ops.dtype)], dim=1)

    def combined(x: Tensor) -> Tensor:
        return ops.combine(x[:, :-4].reshape(-1, 4, 65), x[:, -4:].float())

    want = (slots.view(300, 4, 65).double() * both[:, -4:].double()[..., None]).sum(1)
    torch.testing.assert_close(combined(both).double(), want, rtol=1.1 * EPS[ops.dtype] + 1e-6, atol=1e-5)
    assert_row_law(combined, both)
    assert ops.combine(slots.view(300, 4, 65)[:0], weights[:0]).shape == (0, 65)


def test_slots_that_cannot_be_combined_are_refused(ops: Ops) -> None:
    slots = random(ops.dtype, 2, 3, 8)
    with pytest.raises(ValueError, match=r"not .* \[2, 3, 8\] with \[2, 2\]"):
        ops.combine(slots, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"float32, not torch\.float64"):
        ops.combine(slots, torch.ones(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least one"):
        ops.join_experts([])
