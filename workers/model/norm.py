"""Norms, and where halves of layers meet the residual stream. T rows, H hidden."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.kernels.ops import Ops
from workers.model.load import Loader
from workers.model.spec import Norm


@dataclass(frozen=True, slots=True)
class RowNorm:
    """RMSNorm or LayerNorm of each row: [T, H] -> [T, H]"""

    weight: Tensor  # [H]; float32 where the product is taken in it
    bias: Tensor | None
    eps: float
    rms: bool

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        if self.rms:
            return ops.rms_norm(x, self.weight, self.eps)
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Joint:
    """Adds a half's result to the stream, in place, and gives what the next half reads.

    That is the norm of the stream, or without a norm the stream itself. `keep`: the normed rows are the stream from
    here on (OPT-350m).
    """

    norm: RowNorm | None = None
    keep: bool = False

    def __call__(self, ops: Ops, delta: Tensor | None, stream: Tensor) -> Tensor:
        norm = self.norm
        if delta is not None and norm is not None and norm.rms and not self.keep:
            return ops.add_rms_norm(delta, stream, norm.weight, norm.eps)
        if delta is not None:
            stream += delta
        if norm is None:
            return stream
        x = norm(ops, stream)
        if self.keep:
            stream.copy_(x)
        return x


def load_norm(norm: Norm, name: str, size: int, load: Loader) -> RowNorm:
    weight = norm_weight(norm, f"{name}.weight", size, load)
    bias = load.vector(f"{name}.bias", size) if norm.bias else None
    return RowNorm(weight, bias, norm.eps, norm.kind == "rms")


def norm_weight(norm: Norm, name: str, size: int, load: Loader) -> Tensor:
    """The factors themselves: a weight kept as w - 1 comes as w."""
    if not norm.wide:
        return load.vector(name, size)
    weight = load.wide.vector(name, size)
    return weight + 1 if norm.unit else weight
