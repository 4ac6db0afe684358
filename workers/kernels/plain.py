"""The plain torch meaning of every operation, and the way out where no compiler is found.

How the row law is kept: `workers.kernels.plain_linear`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.kernels.checks import ACTS, GATED, check_route, check_slots, known_act
from workers.kernels.plain_attention import PlainAttention
from workers.kernels.plain_linear import (
    ACTIVATIONS,
    PlainExperts,
    PlainGated,
    PlainPerHead,
    RowLinear,
    added_slots,
    alike_sizes,
    by_rows,
    gated_pair,
)
from workers.model.spec import Route


class PlainOps(PlainAttention):
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
        self._wide: PlainOps | None = None

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

    def sieve(self, head: Any, weight: Tensor) -> None:
        return None

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

    def gated(
        self,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        act: str = "silu",
    ) -> PlainGated:
        known_act(act, GATED)
        bias = None
        if gate_bias is not None or up_bias is not None:
            none = gate.new_zeros(gate.shape[0])
            bias = torch.cat([none if gate_bias is None else gate_bias, none if up_bias is None else up_bias])
        return PlainGated(self.linear(torch.cat([gate, up]), bias), lambda pair: self.gated_act(pair, act))

    def experts(
        self,
        gate: Sequence[Tensor],
        up: Sequence[Tensor],
        down: Sequence[Tensor],
        biases: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]] | None = None,
        act: str = "silu",
    ) -> PlainExperts:
        gates, ups, downs = biases or ([None] * len(gate),) * 3
        first = [self.gated(*each, act) for each in zip(gate, up, gates, ups, strict=True)]
        return PlainExperts(first, [self.linear(*each) for each in zip(down, downs, strict=True)])

    def join_experts(self, parts: Sequence[PlainExperts]) -> PlainExperts:
        if not parts:
            raise ValueError("a layer of experts has at least one")
        return PlainExperts([each for p in parts for each in p.first], [each for p in parts for each in p.down])

    def combine(self, slots: Tensor, weights: Tensor) -> Tensor:
        check_slots(slots, weights, self.dtype)
        return added_slots(slots, weights)

    def per_head(self, weights: Sequence[Tensor]) -> PlainPerHead:
        return PlainPerHead([self.linear(weight) for weight in weights])

    @property
    def wide(self) -> PlainOps:
        if self.dtype == torch.float32:
            return self
        if self._wide is None:
            self._wide = self._in_float32()
        return self._wide

    def _in_float32(self) -> PlainOps:
        return PlainOps(torch.float32, str(self.device))

    def _rows(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """f on x so that no row sees how many there are."""
        return by_rows(f, x)

    # Rows ----------------------------------------------------------------------------------------------------------

    def embed(self, table: Tensor, ids: Tensor) -> Tensor:
        return table[ids]

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        mean = self._rows(lambda rows: rows.pow(2).mean(-1, keepdim=True), x32)
        normed = x32 * torch.rsqrt(mean + eps)
        # A weight in float32 is multiplied in float32; one of x's dtype meets what is already rounded to it.
        return (weight * (normed if weight.dtype == torch.float32 else normed.to(x.dtype))).to(x.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        residual += x
        return self.rms_norm(residual, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x32 = x.float()
        centred = x32 - self._rows(lambda rows: rows.mean(-1, keepdim=True), x32)
        variance = self._rows(lambda rows: rows.pow(2).mean(-1, keepdim=True), centred)
        y = centred * torch.rsqrt(variance + eps) * weight.float()
        return (y if bias is None else y + bias.float()).to(x.dtype)

    def gated_act(self, gate_up: Tensor, act: str = "silu") -> Tensor:
        known_act(act, GATED)
        return gated_pair(self._rows, gate_up, act)

    def act(self, x: Tensor, act: str) -> Tensor:
        known_act(act, ACTS)
        return self._rows(ACTIVATIONS[act], x.float()).to(x.dtype)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return (cap * self._rows(torch.tanh, x.float() / cap)).to(x.dtype)

    def route(self, logits: Tensor, route: Route, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        t, e = logits.shape
        check_route(route, e, bias)
        scores = logits.float()
        if route.scoring == "softmax":
            scores = self._rows(lambda rows: torch.softmax(rows, -1), scores)
        elif route.scoring == "sigmoid":
            scores = self._rows(torch.sigmoid, scores)
        choice = scores if bias is None else scores + bias
        if route.groups > 1:
            best = _sorted(choice.view(t, route.groups, -1))[0]
            of_group = best[..., :2].sum(-1) if route.group_score == "top2" else best[..., 0]
            open_groups = torch.zeros_like(of_group, dtype=torch.bool)
            open_groups.scatter_(1, _sorted(of_group)[1][:, : route.top_groups], True)
            choice = choice.masked_fill(~open_groups.repeat_interleave(e // route.groups, dim=1), float("-inf"))
        ids = _sorted(choice)[1][:, : route.top_k]
        weights = scores.gather(1, ids)
        if route.scoring == "chosen_softmax":
            weights = self._rows(lambda rows: torch.softmax(rows, -1), weights)
        elif route.renormalize:
            total = weights[:, 0].clone()
            for slot in range(1, route.top_k):
                total += weights[:, slot]
            weights = weights / (total + 1e-20)[:, None]  # sigmoids may all be 0
        return ids.to(torch.int32).contiguous(), (weights * route.scale).contiguous()

    def argmax(self, logits: Tensor) -> Tensor:
        if logits.device.type != "cpu":
            return torch.argmax(logits, dim=-1)
        # numpy's takes the lowest of equals by its documentation, and is 30 times as fast as torch's.
        return torch.from_numpy(logits.float().numpy().argmax(axis=1))

    def logprobs(self, logits: Tensor) -> Tensor:
        return self._rows(lambda rows: torch.log_softmax(rows, -1), logits.float())


def _sorted(x: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest first, and where they stood; of equals the lower id comes first."""
    values, ids = torch.sort(x, dim=-1, descending=True, stable=True)
    return values, ids
