"""Sends the rows of a step to the hosts of their experts and adds what comes back, with the bits of experts at home.

One `Dispatcher` per engine; `RemoteExperts` is what a layer sees of it. For each layer there is one exchange with each
host: everything is sent, then everything received; two may be under way, of the two halves of a step. A host that
breaks off, or says nothing for `silence_s`, is lost until it can be reached again: its rows go to other homes of their
experts in the same step, and experts without another home are loaded by hosts that have room. A placement that is
handed in takes effect between two steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from understudy.errors import ConfigError, Unavailable
from workers.experts.channel import ChannelError
from workers.experts.links import Link, Links, Question
from workers.experts.placement import DispatchReport, ExpertsPlan, HostsView, Placement
from workers.experts.split import NOBODY
from workers.experts.table import Table, arrange
from workers.kernels.ops import Experts, Ops
from workers.model.load import Loader
from workers.model.spec import ModelSpec, MoeFfn

log = logging.getLogger(__name__)

_STEP_S = 1.0  # between two layers of a step, at most in most
_ABANDONED_S = 60.0  # for an exchange that nobody finished
_FEW_BYTES = 64 << 10  # of rows: picking those that a host needs takes longer than sending all


class Dispatcher:
    """Used by the engine's thread; `offer` and `report` by any. `close` it at the end."""

    def __init__(
        self, plan: ExpertsPlan, spec: ModelSpec, ops: Ops, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan, self._ops, self._clock = plan, ops, clock
        self._hidden = spec.hidden
        self._slot = {layer: i for i, layer in enumerate(plan.view.placement.layers)}
        check_placement(plan.view.placement, spec)
        self._links = Links(plan, ops.numerics_id, spec.hidden)
        self._view = plan.view
        self._table: Table | None = None
        self._prepared: tuple[int, Table] | None = None  # of a view to come
        self._turn = threading.Lock()  # to begin, to end or to adopt
        self._under_way: list[_Exchange] = []  # at most two
        self._in_step, self._touched = False, clock()
        self._sequence = self._exchanges = self._moved = 0
        self._rooms = [np.empty(0, np.uint8)] * 2

    # What others say ----------------------------------------------------------------------------------------------

    def offer(self, view: HostsView) -> None:
        """A newer placement or other hosts: connects to those that are new, and takes effect before the next step."""
        table = arrange(view, frozenset(h.name for h in view.hosts), {})
        with self._turn:
            self._prepared = view.number, table
        self._links.offer(view)
        self._adopt_if_idle()

    def report(self) -> DispatchReport:
        """What has been seen."""
        self._adopt_if_idle()
        view = self._view
        homeless = self._table.homeless if self._table is not None else 0
        return DispatchReport(
            view.placement.version, view.number, self._links.lost(), self._exchanges, self._moved, homeless
        )

    def close(self) -> None:
        """Ends every connection. Idempotent."""
        self._links.close()

    # What a layer asks --------------------------------------------------------------------------------------------

    def experts(self, _ffn: MoeFfn, _hidden: int, prefix: str, _load: Loader) -> Experts:
        """The experts of a layer, as `workers.model.load.Loader.experts_factory`."""
        layer = int(prefix.rpartition(".")[2])
        return RemoteExperts(self, layer)

    def begin(self, layer: int, x: Tensor, ids: Tensor) -> _Exchange:
        """Sends a layer's rows. Only the exchange that was begun last may be under way, that of the step's other half;
        what is older belongs to a step that failed, and its results go nowhere."""
        slot = self._slot[layer]
        with self._turn:
            while len(self._under_way) > 1:
                self._under_way.pop(0).abandon()
            if slot == 0 and not self._under_way:
                self._adopt()
            exchange = _Exchange(self, layer, x, ids)
            self._under_way.append(exchange)
            self._in_step, self._touched = slot < len(self._slot) - 1, self._clock()
        exchange.send()
        return exchange

    def _end(self, exchange: _Exchange, failed: bool) -> None:
        """Where one half of a step has failed, nobody will finish the other."""
        with self._turn:
            ended = list(self._under_way) if failed else [exchange]
            for each in ended:
                each.abandon()
            self._under_way = [each for each in self._under_way if each not in ended]
            self._touched = self._clock()

    def _adopt_if_idle(self) -> None:
        """For an engine that has no steps to do it between. A step that failed, or that wanted no row of the last
        layer, leaves no other trace than its silence."""
        with self._turn:
            silent = self._clock() - self._touched
            if silent > _ABANDONED_S or (not self._under_way and (not self._in_step or silent > _STEP_S)):
                self._adopt()

    def _adopt(self) -> None:
        """What was handed in, and hosts that are back: between two steps, or while a step waits for either."""
        if (view := self._links.adopt()) is not None:
            self._view, self._table = view, None

    def _current(self) -> Table:
        present = self._links.present()
        if self._table is None:
            known, self._prepared = self._prepared, None
            if known is not None and known[0] == self._view.number and known[1].present == present:
                self._table = known[1]
        if self._table is None or self._table.present != present:
            self._table = self._arrange(present)
        return self._table

    def _arrange(self, present: frozenset[str]) -> Table:
        """Has experts loaded elsewhere whose hosts are lost."""
        before = self._table.moved if self._table is not None else {}
        table = arrange(self._view, present, before)
        for host in dict.fromkeys(table.moved.values()):
            places = [place for place, at in table.moved.items() if at == host and before.get(place) != host]
            if places:
                log.warning("%d experts whose hosts are lost are loaded by %s", len(places), host)
                self._moved += len(places)
                self._links.ask_to_load(host, places)
        return table

    def room(self, rows: int, width: int) -> NDArray[np.uint8]:
        """For an exchange's results, in turns, since two may be under way: memory that is new for each would cost more
        than what is done with it."""
        self._rooms.reverse()
        if len(self._rooms[0]) < rows * width:
            self._rooms[0] = np.empty(2 * rows * width, np.uint8)
        return self._rooms[0][: rows * width].reshape(rows, width)

    def _next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence


class _Exchange:
    """One layer's rows on their way: slots are places in [T k]. `finish` gives the layer's outputs."""

    def __init__(self, dispatcher: Dispatcher, layer: int, x: Tensor, ids: Tensor) -> None:
        self._d, self._layer = dispatcher, layer
        self._k = ids.shape[1]
        self._experts = ids.reshape(-1).cpu().numpy()
        self._device = x.device
        # Rows are moved as bytes, by numpy: torch would wake its threads, which then spin on the hosts' cores.
        self._x: NDArray[np.uint8] = x.contiguous().cpu().view(torch.uint8).numpy()
        self._deadline: float | None = None
        self._refusal = ""
        self._out = dispatcher.room(len(self._experts), self._x.shape[1])
        self._dtype = x.dtype
        self._parts: list[tuple[Link, Question]] = []
        self._unsent = np.arange(len(self._experts))

    def send(self) -> None:
        """What is not sent yet, to the hosts."""
        d, slots, self._unsent = self._d, self._unsent, np.empty(0, np.int64)
        if not len(slots):
            return
        hosts = d._current().splits[d._slot[self._layer]](self._experts[slots])
        for host in np.flatnonzero(np.bincount(hosts + 1)).tolist():
            host, mine = host - 1, slots[hosts == host - 1]
            part = None if host == NOBODY else self._send_to(d._view.placement.hosts[host], mine)
            if part is None:
                self._unsent = np.concatenate([self._unsent, mine])
            else:
                self._parts.append(part)

    def finish(self, weights: Tensor) -> Tensor:
        """[T, k] -> [T, H]. Raises Unavailable where experts are nowhere to be had in time."""
        failed = True
        try:
            while self._parts or len(self._unsent):
                if not self._parts and self._d._current().homeless:
                    self._wait()
                self.receive()
                self.send()
            failed = False
        finally:
            self._d._end(self, failed)
        slots = torch.from_numpy(self._out).view(self._dtype).view(len(self._x), self._k, -1)
        return self._d._ops.combine(slots.to(self._device), weights)

    def abandon(self) -> None:
        """Nobody will take what has not been taken."""
        for _, question in self._parts:
            question.wanted = False

    def _send_to(self, name: str, slots: NDArray[np.int64]) -> tuple[Link, Question] | None:
        """None where that host is lost."""
        d = self._d
        link = d._links.get(name)
        if link is None:
            return None
        numbers = np.empty(2 * len(slots), np.int32)
        x = self._rows_of(slots, numbers[: len(slots)])
        numbers[len(slots) :] = self._experts[slots]
        data = x.data.cast("B") if x.size else memoryview(b"")
        question = Question(self._layer, d._next_sequence(), len(x), slots, self._out)
        try:
            link.ask(question, numbers.data.cast("B"), data)
        except ChannelError as error:
            d._links.lose(link, str(error))
            return None
        d._exchanges += 1
        return link, question

    def _rows_of(self, slots: NDArray[np.int64], at: NDArray[np.int32]) -> NDArray[np.uint8]:
        """The rows that these slots are of, all of them where they are few or nearly all are wanted; fills in the place
        of each slot's row among them. [S] -> [R, bytes of a row]"""
        x, of = self._x, slots // self._k
        if x.nbytes <= _FEW_BYTES or len(slots) >= 2 * len(x):
            at[:] = of
            return x
        chosen = np.zeros(len(x), np.bool_)
        chosen[of] = True
        at[:] = (np.cumsum(chosen) - 1)[of]
        return x[chosen]

    def receive(self) -> None:
        """Takes all results; what is lost is to be sent again. Raises Unavailable where a host refuses."""
        d = self._d
        while self._parts:
            link, question = self._parts[0]
            try:
                link.take(question, d._plan.wait_s)
            except ChannelError as error:
                d._links.lose(link, str(error))
                self._unsent = np.concatenate([self._unsent, question.slots])
            self._refusal = self._refusal or question.refusal
            self._parts.pop(0)
        if self._refusal:
            raise Unavailable(f"an expert host cannot compute layer {self._layer}: {self._refusal}")

    def _wait(self) -> None:
        """Until something about the hosts changes. Raises Unavailable after `wait_s`."""
        d = self._d
        now = d._clock()
        if self._deadline is None:
            self._deadline = now + d._plan.wait_s
            log.warning("layer %d waits: experts have no host; lost are %s", self._layer, ", ".join(d._links.lost()))
        if now >= self._deadline:
            raise Unavailable(
                f"experts of layer {self._layer} have had no host for {d._plan.wait_s:g} s; lost are "
                f"{', '.join(d._links.lost()) or 'none, but nobody has room'}"
            )
        d._links.wait(min(0.05, self._deadline - now))
        with d._turn:
            d._adopt()


@dataclass(frozen=True, slots=True)
class RemoteExperts:
    """One layer's experts. See `workers.kernels.ops.Experts`."""

    dispatcher: Dispatcher
    layer: int

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.start(x, ids)(weights)

    def start(self, x: Tensor, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """Sends the rows; what is returned waits for their results and adds them: [T, k] -> [T, H]. What is computed
        between the two costs no time of its own."""
        return self.dispatcher.begin(self.layer, x, ids).finish


def check_placement(placement: Placement, spec: ModelSpec) -> None:
    """Raises ConfigError where a placement is not one of this model's experts."""
    sizes = {i: ffn.experts for i, ffn in enumerate(spec.ffn) if isinstance(ffn, MoeFfn)}
    placed = {layer: len(row) for layer, row in zip(placement.layers, placement.table, strict=True)}
    if not sizes:
        raise ConfigError("expert_hosts: this model has no experts; leave it out")
    if placed != sizes:
        raise ConfigError(f"expert_hosts: the placement has experts {placed} by layer, the model {sizes}")
