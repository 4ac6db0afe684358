"""The torch operations, plain and CUDA's: right against float64, and rows blind to their mates."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from understudy.errors import ConfigError
from workers.kernels import build
from workers.kernels.choose import make_ops
from workers.kernels.cuda import CudaOps
from workers.kernels.ops import BLOCK, Batch
from workers.kernels.plain import PlainOps
from workers.kernels.plain_linear import alike_sizes, in_calls_of
from workers.model.spec import Route

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(kind: str, dtype: torch.dtype) -> PlainOps:
    if kind == "plain":
        return PlainOps(dtype)
    ops = CudaOps(dtype, "cpu", exact=kind == "cuda")
    ops.reference_rows, ops.row_sizes, ops.attend_rows = 8, (8, 16), 4
    return ops


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(lengths: list[tuple[int, int]], blocks: int) -> Batch:
    """Sequences of (start, rows), their blocks scattered."""
    order = iter(torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).tolist())
    width = max(-(-(start + rows) // BLOCK) for start, rows in lengths)
    table = torch.full((len(lengths), width), -1, dtype=torch.int32)
    for row, (start, rows) in zip(table, lengths, strict=True):
        for b in range(-(-(start + rows) // BLOCK)):
            row[b] = next(order)
    counts = torch.tensor([rows for _, rows in lengths])
    return Batch(
        positions=torch.cat([torch.arange(start, start + rows) for start, rows in lengths]),
        row_start=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int(),
        tables=[table],
        row_seq=torch.repeat_interleave(torch.arange(len(lengths)), counts).int(),
    )


@pytest.mark.parametrize("kind", ["plain", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 90),
    t=st.integers(0, 40),
    data=st.data(),
)
def test_rows_of_a_linear_are_blind(kind: str, dtype: torch.dtype, n: int, k: int, t: int, data: st.DataObject) -> None:
    weight, bias, x = random(n, k), random(n, seed=1), random(t, k, seed=2).to(dtype)
    linear = make(kind, dtype).linear(weight, bias if n % 2 else None)
    y = linear(x)
    assert (y.shape, y.dtype) == ((t, n), dtype)
    want = x.double() @ weight.to(dtype).double().T + (bias.to(dtype).double() if n % 2 else 0)
    torch.testing.assert_close(y.double(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    start = data.draw(st.integers(0, t))
    stop = data.draw(st.integers(start, t))
    assert torch.equal(linear(x[start:stop]), y[start:stop])


def test_row_counts_that_change_bits_are_not_used() -> None:
    """A product that adds up in another order from 32 rows on, or that looks at where a row stands."""

    def forwards(x: Tensor) -> Tensor:
        return reduce(torch.add, x.unbind(1))[:, None]

    def by_count(x: Tensor) -> Tensor:
        return forwards(x if x.shape[0] < 32 else x.flip(1))

    def by_place(x: Tensor) -> Tensor:
        return torch.cat([forwards(x[:3]), forwards(x[3:].flip(1))]) if x.shape[0] > 3 else forwards(x)

    sample = random(64, 50)
    assert alike_sizes(forwards, 16, (1, 16, 64), sample) == (1, 16, 64)
    assert alike_sizes(by_count, 16, (1, 16, 64), sample) == (1, 16)
    assert alike_sizes(by_place, 16, (1, 16, 64), sample) == (1,)


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20))
def test_calls_have_one_size(t: int, rows: int) -> None:
    seen = []

    def double(x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return x * 2

    x = random(t, 3)
    assert torch.equal(in_calls_of(rows, double, x), x * 2)
    assert set(seen) == {rows}


@pytest.mark.parametrize("kind", ["plain", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_the_small_operations_are_blind(kind: str, dtype: torch.dtype) -> None:
    ops = make(kind, dtype)
    x, weight = random(40, 66).to(dtype), random(66, seed=1).to(dtype)
    experts = ops.experts(
        *(
            [random(*shape, seed=seed + e) for e in range(5)]
            for seed, shape in ((2, (20, 66)), (9, (20, 66)), (20, (66, 20)))
        )
    )
    ids, weights = ops.route(random(40, 5, seed=3).to(dtype), Route(3))
    operations: dict[str, Any] = {
        "rms_norm": lambda rows: ops.rms_norm(x[rows], weight, 1e-5),
        "add_rms_norm": lambda rows: ops.add_rms_norm(x[rows], x[rows].flip(1), weight, 1e-5),
        "gated_act": lambda rows: ops.gated_act(x[rows]),
        "logprobs": lambda rows: ops.logprobs(x[rows]),
        "route": lambda rows: torch.cat(ops.route(x[rows], Route(7, renormalize=False)), 1),
        "experts": lambda rows: experts(x[rows], ids[rows], weights[rows]),
    }
    for name, operation in operations.items():
        whole = operation(slice(None))
        for rows in (slice(0, 1), slice(7, 8), slice(3, 20), slice(39, 40)):
            assert torch.equal(operation(rows), whole[rows]), (name, rows)


@pytest.mark.parametrize("kind", ["plain", "cuda", "cuda-fast"])
def test_small_operations_mean_what_they_say(kind: str) -> None:
    ops = make(kind, torch.float32)
    x, residual, weight = random(9, 12), random(9, 12, seed=1), random(12, seed=2)
    d = x.double()
    norm = d / (d.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5).double(), norm, rtol=1e-5, atol=1e-5)
    total = x + residual
    got = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(got, ops.rms_norm(total, weight, 1e-5))
    silu = d[:, :6] / (1 + torch.exp(-d[:, :6])) * d[:, 6:]
    torch.testing.assert_close(ops.gated_act(x).double(), silu, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ops.logprobs(x).double(), torch.log_softmax(d, -1), rtol=1e-5, atol=1e-6)
    assert torch.equal(ops.embed(x, torch.tensor([3, 3, 0])), x[[3, 3, 0]])


@pytest.mark.parametrize("kind", ["plain", "cuda"])
def test_ties_of_the_gate_go_to_the_lower_id(kind: str) -> None:
    ids, weights = make(kind, torch.float32).route(torch.tensor([[0.0, 1.0, 1.0, -1.0, 1.0]]), Route(4))
    assert ids.tolist() == [[1, 2, 4, 0]]
    assert ids.dtype == torch.int32
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("kind", ["plain", "cuda", "cuda-fast"])
@pytest.mark.parametrize("window", [None, 1, 16, 21])
def test_attention(kind: str, window: int | None) -> None:
    """Against float64 over the positions in order; blocks that are not the sequence's hold infinities."""
    ops, hq, hkv, d = make(kind, torch.float32), 4, 2, 8
    lengths = [(0, 1), (0, 40), (33, 1), (20, 7), (300, 3)]
    cache = ops.cache(1, 64, hkv, d)
    cache.data.fill_(float("inf"))
    past = {s: (random(start + rows, hkv, d, seed=s), random(start + rows, hkv, d, seed=90 + s))
            for s, (start, rows) in enumerate(lengths)}  # fmt: skip
    batch = batch_of(lengths, 64)
    for s, (k, v) in past.items():
        for p in range(len(k)):
            block = batch.tables[0][s, p // BLOCK]
            cache.data[0, 0, block, :, p % BLOCK], cache.data[0, 1, block, :, p % BLOCK] = k[p], v[p]
    q = random(52, hq, d, seed=7)
    got = ops.attend(q, cache, 0, batch, 0, 0.3, window)
    for row in range(52):
        s, p = int(batch.row_seq[row]), int(batch.positions[row])
        first = 0 if window is None else max(0, p - window + 1)
        k, v = (part[first : p + 1].double().repeat_interleave(hq // hkv, 1) for part in past[s])
        weights = torch.softmax(torch.einsum("hd,phd->hp", q[row].double(), k) * 0.3, -1)
        want = torch.einsum("hp,phd->hd", weights, v).reshape(-1)
        torch.testing.assert_close(got[row].double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["cuda", "cuda-fast"])
@pytest.mark.parametrize(
    ("window", "sunk", "cap", "latent"),
    [(None, True, None, None), (21, True, 2.0, None), (None, False, 2.0, 6), (16, True, None, 6)],
)
def test_kinds_of_attention_mean_what_plain_means(
    kind: str, window: int | None, sunk: bool, cap: float | None, latent: int | None
) -> None:
    ops, plain = make(kind, torch.float32), PlainOps(torch.float32)
    lengths, kv_heads = [(0, 1), (0, 40), (33, 1), (20, 7), (300, 3)], 1 if latent else 2
    batch, cache = batch_of(lengths, 64), ops.cache(1, 64, kv_heads, 8, latent)
    cache.data.copy_(random(*cache.data.shape))
    q, sinks = random(52, 4, 8, seed=7), random(4, seed=8) if sunk else None
    got = ops.attend(q, cache, 0, batch, 0, 0.3, window, sinks, cap)
    want = plain.attend(q, cache, 0, batch, 0, 0.3, window, sinks, cap)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["cuda", "cuda-fast"])
def test_wide_kernels_are_of_the_same_kind(kind: str) -> None:
    ops = make(kind, torch.bfloat16)
    assert isinstance(ops.wide, CudaOps)
    assert (ops.wide.dtype, ops.wide.exact) == (torch.float32, kind == "cuda")


@pytest.mark.parametrize("kernels", ["native", "auto"])
def test_without_a_compiler(kernels: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from workers.kernels import native

    def no_compiler() -> None:
        raise build.BuildError("no C++ compiler found")

    monkeypatch.setattr(native, "_library", no_compiler)
    if kernels == "native":
        with pytest.raises(ConfigError, match=r"native .* no C\+\+ compiler found"):
            make_ops("float32", kernels=kernels)
        return
    with caplog.at_level(logging.WARNING, "understudy"):
        assert make_ops("float32").name == "plain"
    assert "no C++ compiler found" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dtype": "int4"}, "dtype: 'int4'"),
        ({"kernels": "quick"}, "kernels: 'quick'"),
        ({"kernels": "fast"}, "fast is for CUDA"),
        ({"threads": 0}, "threads: 0"),
        ({"device": "mps"}, "device: 'mps'"),
        ({"device": "cuda", "kernels": "native"}, "native is for the CPU"),
    ],
)
def test_choices_that_cannot_be(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_ops(**({"dtype": "float32"} | arguments))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_no_cuda_device() -> None:
    with pytest.raises(ConfigError, match="sees no CUDA device"):
        make_ops("float32", device="cuda")


def test_numerics_ids_tell_apart_what_computes_differently() -> None:
    ids = {make(kind, dtype).numerics_id for kind in ("plain", "cuda", "cuda-fast") for dtype in DTYPES}
    assert len(ids) == 9
