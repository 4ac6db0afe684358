"""Linears, feed-forwards and experts in torch alone, whose rows are blind to their mates.

The row law is kept by construction: whatever torch computes differently for other row counts or other places in a
buffer (matrix products, exponentials, reductions) runs in calls of one fixed shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def by_rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f on each row alone: [T, ...] -> [T, ...].

    A vectorized loop of torch ends in scalar code that rounds exp differently, and threads cut a large tensor
    anywhere; one row at a time the cuts fall in the same places.
    """
    return torch.cat([f(row) for row in x.split(1)]) if x.shape[0] else f(x)


def aligned(x: Tensor) -> Tensor:
    """x where a fresh buffer would begin: a BLAS may sum in another order at another alignment."""
    return x if x.is_contiguous() and x.data_ptr() % 64 == 0 else x.clone(memory_format=torch.contiguous_format)


def in_calls_of(rows: int, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f on x, T > 0, in calls of exactly `rows` rows, the last one filled up with zeros."""
    t = x.shape[0]
    if t % rows:
        x = torch.cat([x, x.new_zeros(rows - t % rows, *x.shape[1:])])
    parts = [f(aligned(part)) for part in x.split(rows)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:t]


def alike_sizes(f: Callable[[Tensor], Tensor], reference: int, sizes: Sequence[int], sample: Tensor) -> tuple[int, ...]:
    """Those row counts in which f gives a row the bits that it has in a call of `reference` rows, at every place.

    A matrix product runs the same code whenever the shape is the same, so trying each shape once settles it.
    `sample`: [T, K] rows to try. Where bits depend on the place among `reference` rows, rows have to run alone: (1,).
    """
    one = sample[:1]
    want = f(one.repeat(reference, 1))
    if not torch.equal(want, want[:1].expand_as(want)):
        return (1,)
    whole = in_calls_of(reference, f, sample)

    def alike(m: int) -> bool:
        same = f(one.repeat(m, 1))
        return torch.equal(same, want[:1].expand_as(same)) and torch.equal(in_calls_of(m, f, sample), whole)

    return tuple(m for m in sorted({*sizes, reference}) if alike(m))


class RowLinear:
    """A linear whose rows do not depend on their number: it only ever runs with row counts `sizes` proven alike."""

    def __init__(self, call: Callable[[Tensor], Tensor], n: int, k: int, sizes: tuple[int, ...]) -> None:
        self.n, self.k, self.sizes = n, k, sizes
        self._call = call

    def __call__(self, x: Tensor) -> Tensor:
        t = x.shape[0]
        parts: list[Tensor] = []
        at = 0
        for m in reversed(self.sizes):  # the largest first; what is left over is filled up to the smallest
            end = t if m == self.sizes[0] else at + (t - at) // m * m
            if end > at:
                parts.append(in_calls_of(m, self._call, x[at:end]))
                at = end
        if not parts:
            return x.new_zeros(0, self.n)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def gated_pair(rows: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor], pair: Tensor, act: str) -> Tensor:
    """`Ops.gated_act` of [gate | up]; `rows` applies a function so that no row sees how many there are."""
    gate, up = (half.float() for half in pair.chunk(2, dim=-1))
    if act != "clamped":
        return (rows(ACTIVATIONS[act], gate) * up).to(pair.dtype)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (gate * rows(torch.sigmoid, gate * 1.702) * (up + 1.0)).to(pair.dtype)


class PlainGated:
    """One linear over gate and up, then `gated_act`."""

    def __init__(self, gate_up: RowLinear, act: Callable[[Tensor], Tensor]) -> None:
        self.n, self.k = gate_up.n // 2, gate_up.k
        self._gate_up, self._act = gate_up, act

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, F]
        return self._act(self._gate_up(x))


class PlainExperts:
    """Each expert runs over the rows that chose it; a row's slots are added in their order."""

    def __init__(self, first: Sequence[PlainGated], down: Sequence[RowLinear]) -> None:
        self.first, self.down = first, down

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        t, k = ids.shape
        outputs = x.new_zeros(t, k, x.shape[1])
        for expert in ids.unique().tolist():
            rows, slots = torch.where(ids == expert)
            outputs[rows, slots] = self.down[expert](self.first[expert](x[rows]))
        return added_slots(outputs, weights)

    def slots(self, x: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """See `workers.kernels.ops.PackedExperts`."""
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.down):
            raise IndexError(f"an expert's id is outside of 0 .. {len(self.down) - 1}")
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(x):
            raise IndexError(f"a slot's row is outside of 0 .. {len(x) - 1}")
        ones = torch.ones(len(ids), 1, dtype=torch.float32, device=x.device)
        return self(x.index_select(0, rows), ids[:, None], ones)


def added_slots(slots: Tensor, weights: Tensor) -> Tensor:
    """`Ops.combine`. [T, k, H] and float32 [T, k] -> [T, H]"""
    total = torch.zeros(slots.shape[0], slots.shape[2], dtype=torch.float32, device=slots.device)
    for slot in range(slots.shape[1]):
        total += slots[:, slot].float() * weights[:, slot, None]
    return total.to(slots.dtype)


class PlainPerHead:
    """A linear for each head of x."""

    def __init__(self, linears: Sequence[RowLinear]) -> None:
        self._linears = linears
        self.n, self.k = (len(linears) * size for size in (linears[0].n, linears[0].k))

    def __call__(self, x: Tensor) -> Tensor:  # [T, G K] -> [T, G N]
        heads = x.chunk(len(self._linears), dim=1)
        return torch.cat([linear(head) for linear, head in zip(self._linears, heads, strict=True)], dim=1)
