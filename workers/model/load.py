"""From named tensors to packed operations, with progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.kernels.ops import Experts, Linear, Ops
from workers.model.spec import MoeFfn
from workers.model.weights import TensorSource

Progress = Callable[[int], None]  # called with the bytes read since the last call


class Loader:
    """Reads tensors of a source in the operations' dtype and packs them. `progress` hears of every tensor."""

    def __init__(self, source: TensorSource, ops: Ops, device: torch.device, progress: Progress | None = None) -> None:
        self._source, self._ops, self._device = source, ops, device
        self._progress = progress

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Not a copy where dtype and device allow; whoever keeps it copies it."""
        raw = self._source.get(name, shape)
        if self._progress is not None:
            self._progress(raw.numel() * raw.element_size())
        return raw.to(self._device, self._ops.dtype)

    def vector(self, name: str, size: int) -> Tensor:
        return self.tensor(name, size).clone()

    def table(self, name: str, rows: int, width: int) -> Tensor:
        return self.tensor(name, rows, width).clone()

    def linear(self, names: Sequence[str], rows: Sequence[int], k: int, bias: bool) -> Linear:
        """One packed weight of several projections of the same input, their rows one after the other."""
        weights = [self.tensor(f"{name}.weight", n, k) for name, n in zip(names, rows, strict=True)]
        biases = [self.tensor(f"{name}.bias", n) for name, n in zip(names, rows, strict=True)] if bias else []
        return self._ops.linear(_joined(weights), _joined(biases) if bias else None)

    def swiglu(self, gate: str, up: str, size: int, k: int, bias: bool) -> Linear:
        """The gated half of a feed-forward: silu(gate(x)) * up(x)."""
        weights = [self.tensor(f"{name}.weight", size, k) for name in (gate, up)]
        biases = [self.tensor(f"{name}.bias", size) if bias else None for name in (gate, up)]
        return self._ops.swiglu(*weights, *biases)

    def has(self, name: str) -> bool:
        return name in self._source

    def experts(self, block: str, ffn: MoeFfn, hidden: int) -> Experts:
        """Experts as most checkpoints keep them, tensor by tensor, or fused as transformers 5 holds them in memory:

        `{block}.experts.gate_up_proj` [E, 2F, H] and `{block}.experts.down_proj` [E, H, F].
        """
        if self.has(f"{block}.experts.gate_up_proj"):
            gate_up = self.tensor(f"{block}.experts.gate_up_proj", ffn.experts, 2 * ffn.size, hidden)
            down = self.tensor(f"{block}.experts.down_proj", ffn.experts, hidden, ffn.size)
            gate, up = gate_up.chunk(2, dim=1)
            return self._ops.experts(gate.unbind(0), up.unbind(0), down.unbind(0))
        gates, ups, downs = (
            [self.tensor(f"{block}.experts.{e}.{part}.weight", *shape) for e in range(ffn.experts)]
            for part, shape in zip(ffn.parts, ((ffn.size, hidden), (ffn.size, hidden), (hidden, ffn.size)), strict=True)
        )
        return self._ops.experts(gates, ups, downs)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
