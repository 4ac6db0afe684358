"""From named tensors to packed operations: this rank's share of them, with progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workers.kernels.ops import Experts, Linear, Ops
from workers.model.spec import MoeFfn
from workers.model.weights import Part, TensorSource
from workers.parallel.group import ALONE, Group
from workers.parallel.layers import RowParallel
from workers.parallel.share import ALONE as WHOLE
from workers.parallel.share import Share

Progress = Callable[[int], None]  # called with the bytes read since the last call
ExpertsFactory = Callable[[MoeFfn, int, str, "Loader"], Experts]  # of (ffn, hidden, the layer's prefix, loader)
Rows = Sequence[range] | None  # of the outputs of a weight; None: all


class Loader:
    """Reads tensors of a source in the operations' dtype and packs them. `progress` hears of every tensor.

    `share` is what this rank of `group` holds of the model. Of a tensor of which it holds a part, only that is read.
    `experts_factory` makes a mixture's experts where this process does not hold them: called as
    `workers.model.ffn.load_experts` is.
    """

    def __init__(
        self,
        source: TensorSource,
        ops: Ops,
        device: torch.device,
        progress: Progress | None = None,
        share: Share = WHOLE,
        group: Group = ALONE,
    ) -> None:
        self.ops, self.share, self.group = ops, share, group
        self.experts_factory: ExpertsFactory | None = None
        self._source, self._device, self._progress = source, device, progress

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def wide(self) -> Loader:
        """The same tensors for operations in float32."""
        return Loader(self._source, self.ops.wide, self._device, self._progress, self.share, self.group)

    def hush(self) -> None:
        """Nobody hears of what is read from now on."""
        self._progress = None

    def has(self, name: str) -> bool:
        return name in self._source

    def tensor(self, name: str, *shape: int, part: Part | None = None, within: Sequence[Part] = ()) -> Tensor:
        """Not a copy where dtype and device allow; whoever keeps it copies it. `shape` is that of the whole, `within`
        are parts of the part."""
        raw = self._source.get(name, shape, part)
        for cut in within:
            raw = raw.narrow(cut.dim, cut.start, cut.stop - cut.start)
        if self._progress is not None:
            self._progress(raw.numel() * raw.element_size())
        return raw.to(self._device, self.ops.dtype)

    def rows(self, name: str, *shape: int, rows: Rows = None, axis: int = 0) -> Tensor:
        """A tensor's parts along one axis, one after the other."""
        if rows is None:
            return self.tensor(name, *shape)
        return _joined([self.tensor(name, *shape, part=Part(axis, r.start, r.stop)) for r in rows], axis)

    def vector(self, name: str, size: int, rows: Rows = None) -> Tensor:
        return self.rows(name, size, rows=rows).clone()

    def table(self, name: str, rows: int, width: int, some: range | None = None) -> Tensor:
        return self.rows(name, rows, width, rows=None if some is None else [some]).clone()

    def linear(
        self,
        names: Sequence[str],
        sizes: Sequence[int],
        k: int,
        bias: bool,
        transposed: bool = False,
        order: Tensor | None = None,
        rows: Sequence[Rows] | None = None,
    ) -> Linear:
        """One packed weight of several projections of the same input, their rows one after the other.

        `transposed`: they are kept as [K, N]. `rows`: which of each one's rows are taken; `order`: which of those
        comes where.
        """
        weights, biases = [], []
        for i, (name, n) in enumerate(zip(names, sizes, strict=True)):
            some = None if rows is None else rows[i]
            if transposed:
                weights.append(self.rows(f"{name}.weight", k, n, rows=some, axis=1).T)
            else:
                weights.append(self.rows(f"{name}.weight", n, k, rows=some))
            if bias:
                biases.append(self.rows(f"{name}.bias", n, rows=some))
        weight, b = _joined(weights), _joined(biases) if bias else None
        if order is not None:
            weight, b = weight[order], None if b is None else b[order]
        return self.ops.linear(weight, b)

    def summed(
        self, name: str, n: int, k: int, bias: bool, columns: Sequence[range], transposed: bool = False
    ) -> Linear:
        """A projection whose input is divided over the ranks. `columns`: of the input, this rank's parts."""
        axis, shape = (0, (k, n)) if transposed else (1, (n, k))
        b = self.tensor(f"{name}.bias", n) if bias else None
        if self.share.alone:
            weight = self.tensor(f"{name}.weight", *shape)
            return self.ops.linear(weight.T if transposed else weight, b)
        parts = []
        for c in columns:
            weight = self.tensor(f"{name}.weight", *shape, part=Part(axis, c.start, c.stop))
            parts.append(self.ops.linear(weight.T if transposed else weight))
        return RowParallel(parts, None if b is None else b.float(), self.group)

    def gated(self, names: Sequence[str], size: int, k: int, bias: bool, act: str) -> Linear:
        """The gated half of a feed-forward, act(gate(x)) * up(x), from two projections or one of both."""
        mine = self.share.even(size)
        if len(names) == 1:
            places = [(names[0], 2 * size, [mine]), (names[0], 2 * size, [range(size + mine.start, size + mine.stop)])]
        else:
            places = [(name, size, [mine]) for name in names]
        gate, up = (self.rows(f"{name}.weight", n, k, rows=rows) for name, n, rows in places)
        if not bias:
            return self.ops.gated(gate, up, act=act)
        gate_bias, up_bias = (self.rows(f"{name}.bias", n, rows=rows) for name, n, rows in places)
        return self.ops.gated(gate, up, gate_bias, up_bias, act)


def _joined(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)
