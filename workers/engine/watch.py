"""What happened inside the layers for some rows of one step, seen by standing between a decoder and its operations.

The operations are called as ever, with the same arguments, so no bit of any row changes; a step without such rows
runs without this. What a row attended to is computed a second time, for that row alone, in plain torch from the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workers.engine.contract import LayerAttention, LayerExperts, Probe, TokenTrace
from workers.kernels.ops import BLOCK, Batch, KvCache
from workers.parallel.group import ALONE, Group, tree_sum


class Watch:
    """Collects a trace for every row of `probes`, by row of the step. `sampled` [S], ascending, are the rows that go
    on after the last layer's attention; `rows` is how many the step has. Each rank of `group` has as many heads."""

    def __init__(self, probes: Mapping[int, Probe], sampled: Tensor, rows: int, group: Group = ALONE) -> None:
        self.traces = {row: TokenTrace() for row in probes}
        self._probes = probes
        self._after = {int(row): i for i, row in enumerate(sampled.tolist())}
        self._rows, self._group = rows, group
        self._layer = -1
        self._routed = False

    def attends(
        self,
        q: Tensor,
        cache: KvCache,
        slot: int,
        batch: Batch,
        group: int,
        scale: float,
        window: int | None,
        sinks: Tensor | None = None,
        softcap: float | None = None,
    ) -> None:
        """A layer's attention begins: its keys are in the cache."""
        self._layer += 1
        self._routed = False
        for row, probe in self._probes.items():
            if self._layer in probe.attention:
                position = int(batch.positions[row])
                start = 0 if window is None else max(0, position - window + 1)
                table = batch.tables[group][int(batch.row_seq[row])]
                blocks = table[start // BLOCK : position // BLOCK + 1].tolist()
                keys = torch.cat([cache.read_block(slot, block)[0] for block in blocks], dim=1)  # [Hkv, n P, D]
                first = start // BLOCK * BLOCK
                weights = attention_weights(
                    q[row], keys[:, start - first : position + 1 - first], scale, sinks, softcap
                )
                weights = tree_sum(self._group.gather(weights[None]))[0] / self._group.size
                self.traces[row].attention.append(LayerAttention(self._layer, start, weights.tolist()))

    def routed(self, ids: Tensor, weights: Tensor) -> None:
        """A gate has chosen; the layer's first one is the mixture's (a shared expert may have one too)."""
        if self._routed:
            return
        self._routed = True
        for row, probe in self._probes.items():
            if probe.experts:
                at = row if len(ids) == self._rows else self._after[row]
                chosen = LayerExperts(self._layer, ids[at].tolist(), weights[at].float().tolist())
                self.traces[row].experts.append(chosen)


class WatchedOps:
    """The operations of a decoder, told to a watch. Everything else passes through."""

    def __init__(self, ops: Any, watch: Watch) -> None:
        self._ops, self._watch = ops, watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    @property
    def wide(self) -> WatchedOps:
        return WatchedOps(self._ops.wide, self._watch)

    def attend(self, *arguments: Any, **named: Any) -> Tensor:
        self._watch.attends(*arguments, **named)
        result: Tensor = self._ops.attend(*arguments, **named)
        return result

    def route(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self._ops.route(*arguments)
        self._watch.routed(*result)
        return result


def attention_weights(q: Tensor, keys: Tensor, scale: float, sinks: Tensor | None, softcap: float | None) -> Tensor:
    """q: [Hq, D]; keys: [Hkv, L, D] -> float32 [L]: the share of each position, mean over the heads. They sum to 1
    but for what sinks take."""
    heads, size = q.shape
    grouped = q.float().view(keys.shape[0], heads // keys.shape[0], size)
    scores = (grouped @ keys.float().transpose(1, 2)).view(heads, -1) * scale  # [Hq, L]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None]], dim=1)
    return torch.softmax(scores, dim=1)[:, : keys.shape[1]].mean(0)
