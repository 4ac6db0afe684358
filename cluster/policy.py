"""The autoscaling policy as Serve calls it: in its controller's loop, once per deployment and turn.

Serve pickles this module by value and runs the copy: so it holds nothing, and imports what does when it is called.
A policy per deployment rather than one of the application: Serve takes the latter only from its own configuration
files, where every change starts all deployments anew, gateways included. All of them ask the same `Scaler`.
"""

from __future__ import annotations

from typing import Any


class ReplicaPolicy:
    """Decides for one model; `goal` are the fields of an `autoscale.Goal`."""

    def __init__(self, model: str, namespace: str, goal: dict[str, Any]) -> None:
        self._model = model
        self._namespace = namespace
        self._goal = goal

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        from cluster.autoscale import Goal
        from cluster.scaling import scaler_of

        scaler = scaler_of(self._namespace)
        return scaler.decide(self._model, Goal(**self._goal), context.target_num_replicas), {}
