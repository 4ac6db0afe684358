"""The autoscaling inside Serve's controller: a thread asks the router what is asked of the models, the controller's
loop decides by the latest answer and never waits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from cluster.autoscale import Autoscaler, Decision, Goal
from router.demand import ModelDemand

log = logging.getLogger(__name__)

Ask = Callable[[Mapping[str, Decision]], Mapping[str, ModelDemand]]  # tells decisions; raises ConnectionError
_SILENCE_S = 5.0  # what is older is not known
_UNUSED_S = 30.0  # then the thread ends


class Scaler:
    """Decisions for all models of a service. `decide` from the loop; the thread starts with it.

    `ask` tells the decisions and brings the demand; it is asked every `every_s` seconds.
    """

    def __init__(self, ask: Ask, *, clock: Callable[[], float] = time.monotonic, every_s: float = 0.5) -> None:
        self._ask = ask
        self._clock = clock
        self._every_s = every_s
        self._autoscaler = Autoscaler(clock)
        self._demands: Mapping[str, ModelDemand] = {}
        self._heard = -_SILENCE_S  # never
        self._used = clock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._failed = ""

    def decide(self, model: str, goal: Goal, present: int) -> int:
        """How many replicas there should be, where `present` should be there now. Never waits."""
        self._used = self._clock()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, name="demand", daemon=True)
            self._thread.start()
        fresh = self._used - self._heard < _SILENCE_S
        wanted = self._autoscaler.decide(model, goal, self._demands if fresh else None, present)
        if wanted != present:
            decision = self._autoscaler.decisions[model]
            log.info("%s: %d replicas, not %d: %s: %s", model, wanted, present, decision.why, decision.said)
            self._wake.set()  # told at once
        return wanted

    def _run(self) -> None:
        while self._clock() - self._used < _UNUSED_S:
            self.look()
            self._wake.wait(self._every_s)
            self._wake.clear()

    def look(self) -> None:
        """Asks once. What went wrong is logged when it changes."""
        failed = ""
        try:
            self._demands = self._ask(dict(self._autoscaler.decisions))
            self._heard = self._clock()
        except Exception as error:  # a thread has no caller: without an answer the numbers stay
            failed = f"{type(error).__name__}: {error}"
        if failed and failed != self._failed:
            log.warning("the router does not tell the demand: %s", failed)
        self._failed = failed


_scalers: dict[str, Scaler] = {}


def scaler_of(namespace: str) -> Scaler:
    """The scaler of a service, one per process."""
    if namespace not in _scalers:
        _scalers[namespace] = Scaler(lambda decisions: _ask_router(namespace, decisions))
    return _scalers[namespace]


def _ask_router(namespace: str, decisions: Mapping[str, Decision]) -> Mapping[str, ModelDemand]:
    from cluster.directory import find

    return find(namespace).scale_now(decisions)
