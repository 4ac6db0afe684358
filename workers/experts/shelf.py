"""The packed experts of one process, more and fewer while it serves."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.kernels.ops import Ops, PackedExperts
from workers.model.ffn import expert_weights
from workers.model.load import Loader
from workers.model.names import find_names
from workers.model.quantized import open_weights
from workers.model.spec import ModelSpec, MoeFfn

Place = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is held of a layer: `local[e]` is the place of expert e among `experts`, -1 where it is not there."""

    local: NDArray[np.int32]
    experts: PackedExperts | None


class Shelf:
    """Experts of one checkpoint. Loading packs one expert at a time, beside calls that compute; a caller that needs an
    expert right now goes before those that load ahead."""

    def __init__(self, spec: ModelSpec, load: Loader) -> None:
        self.spec, self.ops = spec, load.ops
        self.layers = tuple(i for i, ffn in enumerate(spec.ffn) if isinstance(ffn, MoeFfn))
        self._load = load
        self._names = find_names(spec.names, load.has)
        self._packed: dict[Place, PackedExperts] = {}
        self._layers = {i: self._arranged(i) for i in self.layers}
        self._packing = threading.Lock()
        self._changing = threading.Lock()
        self._urgent = 0
        self._calm = threading.Condition()

    @classmethod
    def open(cls, model_dir: Path, spec: ModelSpec, ops: Ops, device: str = "cpu") -> Shelf:
        """A shelf with nothing on it. Raises CheckpointError."""
        checkpoint = open_weights(model_dir, spec.quantization, ops.dtype)
        return cls(spec, Loader(checkpoint, ops, torch.device(device)))

    @property
    def held(self) -> set[Place]:
        """What can be computed without loading."""
        with self._changing:
            return set(self._packed)

    @property
    def experts(self) -> tuple[int, ...]:
        """How many the model has, of each of `layers`."""
        return tuple(self._ffn(layer).experts for layer in self.layers)

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        return self._load.device

    @property
    def expert_bytes(self) -> int:
        """Of the largest expert, packed."""
        sizes = [3 * f.size * self.spec.hidden for f in self.spec.ffn if isinstance(f, MoeFfn)]
        return max(sizes, default=0) * int(self.ops.dtype.itemsize)

    def load(self, place: Place, urgent: bool = False) -> None:
        """Packs an expert, unless it is there. Raises CheckpointError, or ValueError for one that the model lacks."""
        layer, expert = place
        ffn = self._ffn(layer)
        if not 0 <= expert < ffn.experts:
            raise ValueError(f"layer {layer} has {ffn.experts} experts, not one numbered {expert}")
        with self._turn(urgent):
            if place in self._packed:
                return
            w = expert_weights(ffn, self.spec.hidden, self._names.layer(layer), self._load, expert)
            biases = None if w.biases is None else ([w.biases[0]], [w.biases[1]], [w.biases[2]])
            packed = self.ops.experts([w.gate], [w.up], [w.down], biases, ffn.act)
            with self._changing:
                self._packed[place] = packed
                self._layers[layer] = self._arranged(layer)

    def drop(self, places: Iterable[Place]) -> None:
        """Gives memory back; a call under way still has its experts. Unknown ones are ignored."""
        with self._changing:
            gone = [place for place in places if self._packed.pop(place, None) is not None]
            for layer in dict.fromkeys(layer for layer, _ in gone):
                self._layers[layer] = self._arranged(layer)

    def compute(self, layer: int, x: Tensor, rows: Tensor, experts: NDArray[np.int32]) -> Tensor:
        """Slot s is expert[experts[s]](x[rows[s]]), loaded first where it is not there. x: [T, H]; rows: int32 [S];
        experts: [S] -> [S, H]. Raises IndexError for rows and experts that there are not."""
        ffn = self._ffn(layer)
        if len(experts) and not (experts.min() >= 0 and experts.max() < ffn.experts):
            raise IndexError(f"an expert's number is outside of 0 .. {ffn.experts - 1}")
        held = self._layers[layer]
        local = held.local[experts]
        while len(local) and local.min() < 0:
            for expert in dict.fromkeys(experts[local < 0].tolist()):
                self.load((layer, expert), urgent=True)
            held = self._layers[layer]
            local = held.local[experts]
        if held.experts is None:
            return x.new_zeros(0, x.shape[1])
        return held.experts.slots(x, rows, torch.from_numpy(local).to(x.device))

    def _ffn(self, layer: int) -> MoeFfn:
        ffn = self.spec.ffn[layer] if 0 <= layer < self.spec.layers else None
        if not isinstance(ffn, MoeFfn):
            raise ValueError(f"layer {layer} has no experts; those are {', '.join(map(str, self.layers))}")
        return ffn

    def _arranged(self, layer: int) -> _Layer:
        held = sorted(expert for at, expert in self._packed if at == layer)
        local = np.full(self._ffn(layer).experts, -1, np.int32)
        local[held] = np.arange(len(held), dtype=np.int32)
        parts = [self._packed[layer, expert] for expert in held]
        return _Layer(local, self.ops.join_experts(parts) if parts else None)

    def _turn(self, urgent: bool) -> _Turn:
        return _Turn(self, urgent)


class _Turn:
    """The right to pack."""

    def __init__(self, shelf: Shelf, urgent: bool) -> None:
        self._shelf, self._urgent = shelf, urgent

    def __enter__(self) -> None:
        shelf = self._shelf
        with shelf._calm:
            if self._urgent:
                shelf._urgent += 1
            else:
                shelf._calm.wait_for(lambda: not shelf._urgent)
        shelf._packing.acquire()

    def __exit__(self, *exc: object) -> None:
        shelf = self._shelf
        shelf._packing.release()
        if self._urgent:
            with shelf._calm:
                shelf._urgent -= 1
                shelf._calm.notify_all()
