"""The feed-forward half of a layer: dense, or a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.kernels.ops import Experts, Linear, Ops
from workers.model.load import Loader
from workers.model.spec import ModelSpec, MoeFfn


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """down(silu(gate(x)) * up(x)): [T, H] -> [T, H]"""

    gated: Linear  # silu(gate(x)) * up(x)
    down: Linear

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return self.down(self.gated(x))


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """The chosen experts' outputs, added by the gate's weights in the order of its slots: [T, H] -> [T, H]"""

    gate: Linear  # [E, H]
    experts: Experts
    top_k: int
    renormalize: bool

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        ids, weights = ops.gate(self.gate(x), self.top_k, self.renormalize)
        return self.experts(x, ids, weights)


def load_ffn(spec: ModelSpec, layer: int, load: Loader) -> DenseLayer | MoeLayer:
    """Packs the feed-forward of one layer from `model.layers.N.mlp` or where its experts lie."""
    ffn = spec.ffn[layer]
    prefix = f"model.layers.{layer}.mlp"
    if isinstance(ffn, MoeFfn):
        named = f"model.layers.{layer}.{ffn.block}"
        block = prefix if load.has(f"{prefix}.gate.weight") else named
        gate = load.linear([f"{block}.gate"], [ffn.experts], spec.hidden, bias=False)
        return MoeLayer(gate, load.experts(block, ffn, spec.hidden), ffn.top_k, ffn.renormalize)
    return DenseLayer(
        load.swiglu(f"{prefix}.gate_proj", f"{prefix}.up_proj", ffn.size, spec.hidden, ffn.bias),
        load.linear([f"{prefix}.down_proj"], [spec.hidden], ffn.size, ffn.bias),
    )
