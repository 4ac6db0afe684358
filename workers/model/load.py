"""From named tensors to packed operations, with progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.kernels.ops import Experts, Linear, Ops
from workers.model.spec import MoeFfn
from workers.model.weights import Part, TensorSource

Progress = Callable[[int], None]  # called with the bytes read since the last call
ExpertsFactory = Callable[[MoeFfn, int, str, "Loader"], Experts]  # of (ffn, hidden, the layer's prefix, loader)


class Loader:
    """Reads tensors of a source in the operations' dtype and packs them. `progress` hears of every tensor.

    `experts_factory` makes a mixture's experts where this process does not hold them: called as
    `workers.model.ffn.load_experts` is.
    """

    def __init__(self, source: TensorSource, ops: Ops, device: torch.device, progress: Progress | None = None) -> None:
        self.ops = ops
        self.experts_factory: ExpertsFactory | None = None
        self._source, self._device, self._progress = source, device, progress

    @property
    def wide(self) -> Loader:
        """The same tensors for operations in float32."""
        return Loader(self._source, self.ops.wide, self._device, self._progress)

    def has(self, name: str) -> bool:
        return name in self._source

    def tensor(self, name: str, *shape: int, part: Part | None = None) -> Tensor:
        """Not a copy where dtype and device allow; whoever keeps it copies it. `shape` is that of the whole."""
        raw = self._source.get(name, shape, part)
        if self._progress is not None:
            self._progress(raw.numel() * raw.element_size())
        return raw.to(self._device, self.ops.dtype)

    def vector(self, name: str, size: int) -> Tensor:
        return self.tensor(name, size).clone()

    def table(self, name: str, rows: int, width: int) -> Tensor:
        return self.tensor(name, rows, width).clone()

    def linear(
        self,
        names: Sequence[str],
        rows: Sequence[int],
        k: int,
        bias: bool,
        transposed: bool = False,
        order: Tensor | None = None,
    ) -> Linear:
        """One packed weight of several projections of the same input, their rows one after the other.

        `transposed`: they are kept as [K, N]. `order`: which of those rows comes where.
        """
        shapes = [(k, n) if transposed else (n, k) for n in rows]
        weights = [self.tensor(f"{name}.weight", *shape) for name, shape in zip(names, shapes, strict=True)]
        weight = _joined([w.T for w in weights] if transposed else weights)
        b = _joined([self.tensor(f"{n}.bias", count) for n, count in zip(names, rows, strict=True)]) if bias else None
        if order is not None:
            weight, b = weight[order], None if b is None else b[order]
        return self.ops.linear(weight, b)

    def gated(self, names: Sequence[str], size: int, k: int, bias: bool, act: str) -> Linear:
        """The gated half of a feed-forward, act(gate(x)) * up(x), from two projections or one of both."""
        if len(names) == 1:
            gate, up = self.tensor(f"{names[0]}.weight", 2 * size, k).split(size)
            biases = self.tensor(f"{names[0]}.bias", 2 * size).split(size) if bias else (None, None)
        else:
            gate, up = (self.tensor(f"{name}.weight", size, k) for name in names)
            biases = tuple(self.tensor(f"{name}.bias", size) if bias else None for name in names)
        return self.ops.gated(gate, up, biases[0], biases[1], act)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
