"""The feed-forward half of a layer: dense, or a mixture of experts. T rows, H hidden, F size, E experts, k chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from workers.kernels.ops import Experts, Linear, Ops
from workers.model.load import Loader
from workers.model.names import Names
from workers.model.spec import DenseFfn, ModelSpec, MoeFfn, Route
from workers.model.weights import Part
from workers.parallel.experts import SlicedExperts

_SIGMOID = Route(top_k=1, scoring="sigmoid", renormalize=False)  # of the one logit of a shared expert's gate


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Where a mixture's tensors lie below its layer; {} is an expert's number.

    `fused` experts are kept as gpt-oss has them, [E, in, out] with gate and up in turns; other checkpoints that keep
    all experts in one tensor have [E, out, in] with the rows of gate before those of up, as transformers 5 does.
    """

    block: str = "mlp"
    gate: str = "gate"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    fused: bool = False


NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", parts=("w1", "w3", "w2")),
    "qwen": ExpertNames(shared="shared_expert"),
    "deepseek": ExpertNames(shared="shared_experts"),
    "gpt_oss": ExpertNames(gate="router", fused=True),
}


@dataclass(frozen=True, slots=True)
class DenseLayer:
    """down(act(gate(x)) * up(x)), or down(act(up(x))): [T, H] -> [T, H]"""

    up: Linear  # with its gate and activation, where there is one
    down: Linear
    act: str | None  # None: `up` has it

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.down(y if self.act is None else ops.act(y, self.act))


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """The chosen experts' outputs, added by the gate's weights in the order of its slots, and then the shared one's."""

    gate: Linear  # [E, H]; float32 where `wide`
    wide: bool
    route: Route
    correction: Tensor | None  # float32 [E]
    experts: Experts
    shared: DenseLayer | None
    shared_gate: Linear | None  # [1, H]

    def choose(self, ops: Ops, x: Tensor) -> tuple[Tensor, Tensor]:
        """The experts of each row and their weights: [T, H] -> int32 [T, k], float32 [T, k]"""
        if self.wide:
            ops, x = ops.wide, x.float()
        return ops.route(self.gate(x), self.route, self.correction)

    def begin(self, ops: Ops, x: Tensor) -> Callable[[], Tensor]:
        """[T, H] -> what gives [T, H]. Experts elsewhere compute between the two, while the shared one does here."""
        ids, weights = self.choose(ops, x)
        start = getattr(self.experts, "start", None)
        finish = partial(self.experts, x, ids) if start is None else start(x, ids)
        shared = None if self.shared is None else self._share(ops, self.shared(ops, x), x)

        def end() -> Tensor:
            y: Tensor = finish(weights)
            return y if shared is None else y + shared

        return end

    def _share(self, ops: Ops, shared: Tensor, x: Tensor) -> Tensor:
        if self.shared_gate is None:
            return shared
        _, share = ops.route(self.shared_gate(x), _SIGMOID)
        return (shared.float() * share).to(x.dtype)

    def __call__(self, ops: Ops, x: Tensor) -> Tensor:
        return self.begin(ops, x)()


def load_moe(ffn: MoeFfn, hidden: int, prefix: str, load: Loader) -> MoeLayer:
    """Packs the mixture of the layer `prefix`; experts come from the loader's `experts_factory`, where it has one."""
    names, block = NAMES[ffn.names], _block(ffn, prefix, load)
    shared, gates = f"{block}.{names.shared}", load.wide if ffn.wide_gate else load
    return MoeLayer(
        gate=gates.linear([f"{block}.{names.gate}"], [ffn.experts], hidden, ffn.gate_bias),
        wide=ffn.wide_gate,
        route=ffn.route,
        correction=load.wide.vector(f"{block}.{names.gate}.e_score_correction_bias", ffn.experts)
        if ffn.route.bias
        else None,
        experts=(load.experts_factory or load_experts)(ffn, hidden, prefix, load),
        shared=load_dense(
            DenseFfn(ffn.shared, act=ffn.act),
            hidden,
            [f"{shared}.gate_proj", f"{shared}.up_proj"],
            f"{shared}.down_proj",
            load,
        )
        if ffn.shared
        else None,
        shared_gate=load.linear([f"{block}.shared_expert_gate"], [1], hidden, bias=False) if ffn.shared_gate else None,
    )


def _block(ffn: MoeFfn, prefix: str, load: Loader) -> str:
    """Where the mixture of the layer `prefix` lies."""
    names = NAMES[ffn.names]
    block = f"{prefix}.{names.block}"
    if not load.has(f"{block}.{names.gate}.weight") and load.has(f"{prefix}.mlp.{names.gate}.weight"):
        return f"{prefix}.mlp"  # as transformers 5 calls it in memory, whatever the family's files do
    return block


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert as `Ops.experts` takes it: gate and up [F, H], down [H, F]; views of the checkpoint if possible."""

    gate: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor, Tensor | None] | None = None


def expert_weights(
    ffn: MoeFfn, hidden: int, prefix: str, load: Loader, expert: int, columns: range | None = None
) -> ExpertWeights:
    """Reads one expert of the layer `prefix`, and nothing of the others, however the family keeps them.

    `columns`: these of its F alone; the bias of down then comes with the first.
    """
    names, e, f, h = NAMES[ffn.names], ffn.experts, ffn.size, hidden
    block, some = _block(ffn, prefix, load), columns or range(f)

    def one(name: str, *shape: int, axis: int = 0, begin: int = 0, step: int = 1) -> Tensor:
        """Its slice of the one tensor of all experts, of which some columns along `axis` of the expert."""
        cut = Part(axis + 1, begin + step * some.start, begin + step * some.stop)
        whole = f"{block}.experts.{name}"
        return load.tensor(whole, e, *shape, part=Part(0, expert, expert + 1), within=[cut])[0]

    if names.fused:
        pairs, biases = one("gate_up_proj", h, 2 * f, axis=1, step=2).T, None
        if ffn.bias:
            both = one("gate_up_proj_bias", 2 * f, step=2)
            out = load.tensor(f"{block}.experts.down_proj_bias", e, h, part=Part(0, expert, expert + 1))[0]
            biases = (both[0::2], both[1::2], out if some.start == 0 else None)
        return ExpertWeights(pairs[0::2], pairs[1::2], one("down_proj", f, h).T, biases)
    if load.has(f"{block}.experts.gate_up_proj"):
        gate, up = (one("gate_up_proj", 2 * f, h, begin=begin) for begin in (0, f))
        return ExpertWeights(gate, up, one("down_proj", h, f, axis=1))
    shapes, axes = ((f, h), (f, h), (h, f)), (0, 0, 1)
    return ExpertWeights(
        *(
            load.tensor(
                f"{block}.experts.{expert}.{name}.weight", *shape,
                part=None if columns is None else Part(axis, some.start, some.stop),
            )
            for name, shape, axis in zip(names.parts, shapes, axes, strict=True)
        )
    )  # fmt: skip


class _Each(Sequence[Any]):
    """Experts' tensors, each read when it is asked for, and the last one kept: what is in memory is what is packed."""

    def __init__(self, count: int, read: Callable[[int], Any]) -> None:
        self._count, self._read = count, read
        self._last: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, expert: Any) -> Any:
        if not 0 <= expert < self._count:
            raise IndexError(expert)
        if self._last is None or self._last[0] != expert:
            self._last = (expert, self._read(expert))
        return self._last[1]

    def then(self, f: Callable[[Any], Tensor]) -> _Each:
        return _Each(self._count, lambda expert: f(self[expert]))


def load_experts(ffn: MoeFfn, hidden: int, prefix: str, load: Loader) -> Experts:
    """Packs the experts of the layer `prefix`, or this rank's part of each."""
    share = load.share
    if share.alone:
        return pack_experts(ffn, hidden, prefix, load)
    parts = [pack_experts(ffn, hidden, prefix, load, columns) for columns in share.summed(ffn.size)]
    return SlicedExperts(parts, load.group)


def pack_experts(ffn: MoeFfn, hidden: int, prefix: str, load: Loader, columns: range | None = None) -> Experts:
    """All experts of the layer `prefix`, or these columns of each."""
    each = _Each(ffn.experts, lambda i: expert_weights(ffn, hidden, prefix, load, i, columns))
    gate, up, down = (each.then(lambda w, part=part: getattr(w, part)) for part in ("gate", "up", "down"))
    biases = None
    if ffn.bias:
        biases = (each.then(lambda w: w.biases[0]), each.then(lambda w: w.biases[1]), each.then(lambda w: w.biases[2]))
    return load.ops.experts(gate, up, down, biases, ffn.act)


def load_dense(
    ffn: DenseFfn, hidden: int, gate_up: Sequence[str], down: str, load: Loader, transposed: bool = False
) -> DenseLayer:
    """Packs this rank's part of a feed-forward: `gate_up` names gate and up, or the one tensor of both, or without a
    gate up alone."""
    out = load.summed(down, hidden, ffn.size, ffn.bias, load.share.summed(ffn.size), transposed)
    if ffn.gated:
        return DenseLayer(load.gated(gate_up, ffn.size, hidden, ffn.bias, ffn.act), out, act=None)
    mine = None if load.share.size == 1 else [[load.share.even(ffn.size)]]
    return DenseLayer(load.linear(gate_up, [ffn.size], hidden, ffn.bias, transposed, rows=mine), out, ffn.act)


def load_ffn(spec: ModelSpec, layer: int, load: Loader, names: Names) -> DenseLayer | MoeLayer:
    """Packs the feed-forward of one layer."""
    ffn, prefix = spec.ffn[layer], names.layer(layer)
    if isinstance(ffn, MoeFfn):
        return load_moe(ffn, spec.hidden, prefix, load)
    gate_up = [f"{prefix}.{name}" for name in names.gate_up]
    return load_dense(ffn, spec.hidden, gate_up, f"{prefix}.{names.down}", load, names.transposed)
