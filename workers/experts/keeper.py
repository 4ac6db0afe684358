"""What a process has of a model's experts: packs what it is asked to hold beside what it computes, and counts rows."""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from understudy.errors import UnderstudyError
from workers.experts.placement import HostAddress, HostReport
from workers.experts.shelf import Place, Shelf

log = logging.getLogger(__name__)

_BUSY_S = 1.0  # since rows were asked for


class Keeper:
    """`start`, then `hold` and `keep` as the placement wants it, at last `stop`. For any thread."""

    def __init__(self, shelf: Shelf, name: str) -> None:
        """`name` is for the log."""
        self.shelf, self._name = shelf, name
        self._slot = {layer: i for i, layer in enumerate(shelf.layers)}
        self._rows = np.zeros((len(shelf.layers), max(shelf.experts, default=0)), np.int64)
        self._asked: queue.SimpleQueue[Place | None] = queue.SimpleQueue()
        self._wanted: set[Place] = set()
        self._failure: Exception | None = None
        self._computed = -_BUSY_S  # when rows were last asked for
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """From now on what is asked for is packed, one expert at a time."""
        self._thread = threading.Thread(target=self._load_ahead, name="expert-keeper", daemon=True)
        self._thread.start()

    def hold(self, places: Iterable[Place]) -> None:
        """Loads experts in the background; those that are there stay. Returns at once: `report` tells how far it is."""
        for place in places:
            with self._lock:
                self._wanted.add(place)
            self._asked.put(place)

    def release(self, places: Iterable[Place]) -> None:
        """Gives experts back."""
        gone = list(places)
        with self._lock:
            self._wanted.difference_update(gone)
        self.shelf.drop(gone)

    def keep(self, places: Iterable[Place]) -> None:
        """Gives all others back."""
        kept = set(places)
        with self._lock:
            wanted = set(self._wanted)
        self.release((wanted | self.shelf.held) - kept)

    def compute(self, layer: int, x: Tensor, rows: Tensor, experts: NDArray[np.int32]) -> Tensor:
        """See `Shelf.compute`; counts the rows."""
        self._computed = time.monotonic()
        with torch.inference_mode():
            result = self.shelf.compute(layer, x, rows, experts)
        counts = np.bincount(experts, minlength=self._rows.shape[1])
        with self._lock:
            self._rows[self._slot[layer]] += counts
        return result

    def report(self, address: HostAddress, node: str) -> HostReport:
        """What is known right now, as that host's; quick."""
        held = self.shelf.held
        with self._lock:
            wanted, failure = set(self._wanted), self._failure
        return HostReport(
            address,
            os.getpid(),
            node,
            len(held),
            len(held | wanted),
            self.shelf.expert_bytes,
            tuple(map(tuple, self._rows.tolist())),
            "" if failure is None else str(failure),
            "" if failure is None else failure.kind if isinstance(failure, UnderstudyError) else "INTERNAL",
        )

    def stop(self) -> None:
        """Waits for the thread. Idempotent."""
        self._stopped.set()
        self._asked.put(None)
        if self._thread is not None:
            self._thread.join(10.0)

    def _rest(self, seconds: float) -> None:
        """Leaves steps under way as much time as loading took: it needs a core, and the memory's bandwidth."""
        if time.monotonic() - self._computed < _BUSY_S:
            self._stopped.wait(min(seconds, _BUSY_S))

    def _load_ahead(self) -> None:
        while (place := self._asked.get()) is not None and not self._stopped.is_set():
            with self._lock:
                wanted = place in self._wanted
            try:
                if wanted:
                    begin = time.monotonic()
                    self.shelf.load(place)
                    self._rest(time.monotonic() - begin)
                    with self._lock:
                        stale = place not in self._wanted
                    if stale:  # released while it was being packed
                        self.shelf.drop([place])
            except Exception as error:
                log.error("expert host %s cannot load expert %d of layer %d: %s", self._name, *place[::-1], error)
                with self._lock:
                    self._failure = error
                    self._wanted.discard(place)
