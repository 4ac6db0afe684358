"""The plain torch meaning of every operation, and the way out where no compiler is found.

The row law is kept by construction: whatever torch computes differently for other row counts or other places in a
buffer (matrix products, exponentials, reductions) runs in calls of one fixed shape.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.ops import BLOCK, Batch


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


class PlainSwiglu:
    """One linear over gate and up, then silu_mul."""

    def __init__(self, gate_up: RowLinear, act: Callable[[Tensor], Tensor]) -> None:
        self.n, self.k = gate_up.n // 2, gate_up.k
        self._gate_up, self._act = gate_up, act

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, F]
        return self._act(self._gate_up(x))


class PlainExperts:
    """Each expert runs over the rows that chose it; a row's slots are added in their order."""

    def __init__(
        self, gate_up: Sequence[RowLinear], down: Sequence[RowLinear], act: Callable[[Tensor], Tensor]
    ) -> None:
        self._gate_up, self._down, self._act = gate_up, down, act

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        t, k = ids.shape
        outputs = x.new_zeros(t, k, x.shape[1])
        for expert in ids.unique().tolist():
            rows, slots = torch.where(ids == expert)
            outputs[rows, slots] = self._down[expert](self._act(self._gate_up[expert](x[rows])))
        total = torch.zeros(t, x.shape[1], dtype=torch.float32, device=x.device)
        for slot in range(k):
            total += outputs[:, slot].float() * weights[:, slot, None]
        return total.to(x.dtype)


class PlainCache:
    """Blocks in the canonical order: [layers, 2 (K, V), blocks, Hkv, P, D]."""

    def __init__(self, data: Tensor) -> None:
        self.data = data
        self.blocks = data.shape[2]
        self.bytes = data.numel() * data.element_size()

    def read_block(self, layer: int, block: int) -> tuple[Tensor, Tensor]:
        """K and V, each [Hkv, P, D]."""
        return self.data[layer, 0, block], self.data[layer, 1, block]


class PlainOps:
    """Operations in torch alone. See `workers.kernels.ops.Ops` for what each one means."""

    name = "plain"
    version = 1
    reference_rows = 16  # the row count whose bits every other one must have
    row_sizes: tuple[int, ...] = (1, 16, 64, 256)

    def __init__(self, dtype: torch.dtype, device: str = "cpu") -> None:
        self.dtype = dtype
        self.device = torch.device(device)
        self.numerics_id = self._numerics_id()
        self._proven: dict[tuple[int, int, bool], tuple[int, ...]] = {}

    def _numerics_id(self) -> str:
        amx = "+amx" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else ""
        return (
            f"{self.name}-{self.version}/torch-{torch.__version__}/{platform.machine()}"
            f"-{torch.backends.cpu.get_cpu_capability().lower()}{amx}/threads-{torch.get_num_threads()}"
            f"/{str(self.dtype).removeprefix('torch.')}"
        )

    # Linears -------------------------------------------------------------------------------------------------------

    def linear(self, weight: Tensor, bias: Tensor | None = None) -> RowLinear:
        n, k = weight.shape
        shape = (n, k, bias is not None)
        if shape not in self._proven:
            self._proven[shape] = self._prove(*shape)
        return RowLinear(self._product(weight, bias), n, k, self._proven[shape])

    def _prove(self, n: int, k: int, biased: bool) -> tuple[int, ...]:
        """The row counts that give equal bits at this shape.

        Tried on sums whose terms cancel: what is left of them is rounding alone, so that another order of summation
        shows even when the result is rounded to 16 bits.
        """
        generator = torch.Generator().manual_seed(0)
        half = k // 2
        order = torch.randperm(half, generator=generator)

        def cancelling(rows: int, sign: int) -> Tensor:
            values = torch.randn(rows, half, generator=generator)
            both = torch.cat([values, sign * values[:, order], torch.zeros(rows, k - 2 * half)], dim=1)
            return both.to(self.device, self.dtype)

        bias = torch.zeros(n, dtype=self.dtype, device=self.device) if biased else None
        call = self._product(cancelling(n, -1), bias)
        return alike_sizes(call, self.reference_rows, self.row_sizes, cancelling(max(self.row_sizes), 1))

    def _product(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        """x W^T + b for this dtype, rounded once."""
        if self.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous().clone(), 16)
            b = None if bias is None else bias.to(self.dtype, copy=True)
            return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, b, "none", [], "")
        # Sixteen bits without hardware for them: the product of the same values in float32, rounded once.
        w = weight.to(self.dtype).to(torch.float32, copy=True)
        b = None if bias is None else bias.to(self.dtype).to(torch.float32, copy=True)
        return lambda x: F.linear(x.float(), w, b).to(x.dtype)

    def swiglu(
        self, gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
    ) -> PlainSwiglu:
        bias = None if gate_bias is None or up_bias is None else torch.cat([gate_bias, up_bias])
        return PlainSwiglu(self.linear(torch.cat([gate, up]), bias), self.silu_mul)

    def experts(self, gate: Sequence[Tensor], up: Sequence[Tensor], down: Sequence[Tensor]) -> PlainExperts:
        gate_up = [self.linear(torch.cat([g, u])) for g, u in zip(gate, up, strict=True)]
        return PlainExperts(gate_up, [self.linear(d) for d in down], self.silu_mul)

    def _rows(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f on x so that no row sees how many there are."""
        return by_rows(f, x)

    # Rows ----------------------------------------------------------------------------------------------------------

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        return table[ids]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        mean = self._rows(lambda rows: rows.pow(2).mean(-1, keepdim=True), x32)
        return weight * (x32 * torch.rsqrt(mean + eps)).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (self._rows(F.silu, gate.float()) * up.float()).to(gate_up.dtype)

    def gate(self, logits: Tensor, k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
        probs = self._rows(lambda rows: torch.softmax(rows, -1), logits.float())
        # A stable sort: of equal probabilities the lower id comes first.
        probs, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
        weights = probs[:, :k]
        if renormalize:
            total = weights[:, 0].clone()
            for slot in range(1, k):
                total += weights[:, slot]
            weights = weights / total[:, None]
        return ids[:, :k].to(torch.int32).contiguous(), weights.contiguous()

    def argmax(self, logits: Tensor) -> Tensor:
        if logits.device.type != "cpu":
            return torch.argmax(logits, dim=-1)
        # numpy's takes the lowest of equals by its documentation, and is 30 times as fast as torch's.
        return torch.from_numpy(logits.float().numpy().argmax(axis=1))

    def logprobs(self, logits: Tensor) -> Tensor:
        return self._rows(lambda rows: torch.log_softmax(rows, -1), logits.float())

    # The cache and attention -----------------------------------------------------------------------------------------

    def cache(self, layers: int, blocks: int, kv_heads: int, head_dim: int) -> PlainCache:
        shape = (layers, 2, blocks, kv_heads, BLOCK, head_dim)
        return PlainCache(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def cache_block_bytes(self, layers: int, kv_heads: int, head_dim: int) -> int:
        return layers * 2 * kv_heads * BLOCK * head_dim * self.dtype.itemsize

    def rope_write(
        self,
        qkv: Tensor,
        heads: tuple[int, int],
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        cache: PlainCache,
        layer: int,
        batch: Batch,
        group: int,
    ) -> Tensor:
        hq, hkv = heads
        t = qkv.shape[0]
        q, k, v = qkv.view(t, hq + 2 * hkv, -1).split([hq, hkv, hkv], dim=1)
        q = self._rotate(q, q_norm, eps, cos, sin, batch)
        k = self._rotate(k, k_norm, eps, cos, sin, batch)
        blocks = batch.tables[group][batch.row_seq.long(), batch.positions // BLOCK].long()
        offsets = batch.positions % BLOCK
        cache.data[layer, 0][blocks, :, offsets] = k
        cache.data[layer, 1][blocks, :, offsets] = v
        return q

    def _rotate(
        self, x: Tensor, norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor, batch: Batch
    ) -> Tensor:  # [T, heads, D]
        if norm is not None:
            x = self.rms_norm(x, norm, eps)
        c, s = cos[batch.positions, None], sin[batch.positions, None]
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1).to(x.dtype)

    def attend(
        self, q: Tensor, cache: PlainCache, layer: int, batch: Batch, group: int, scale: float, window: int | None
    ) -> Tensor:
        t, hq, d = q.shape
        out = q.new_empty(t, hq * d)
        sequences, positions = batch.row_seq.tolist(), batch.positions.tolist()
        for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            first = 0 if window is None else max(0, position - window + 1)
            begin = first // BLOCK  # sums begin at a block boundary
            blocks = batch.tables[group][sequence, begin : position // BLOCK + 1].long()
            k, v = (
                cache.data[layer, kv, blocks].float().transpose(0, 1).flatten(1, 2)[:, : position + 1 - begin * BLOCK]
                for kv in (0, 1)
            )  # [Hkv, positions, D]
            query = q[row].float().view(k.shape[0], -1, d).clone()  # [Hkv, Hq / Hkv, D], where a fresh buffer begins
            scores = query @ k.transpose(1, 2) * scale
            scores[..., : first - begin * BLOCK] = float("-inf")
            out[row] = (torch.softmax(scores, -1) @ v).reshape(-1).to(q.dtype)
        return out
