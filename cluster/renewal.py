"""Other models for a service that runs: reads the configuration again and rolls what has changed in it.

Serve starts replicas of the new plan and then drains old ones, a few at a time. A model whose new checkpoint cannot be
loaded keeps its old one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

from cluster import app
from cluster.config import ServiceConfig
from cluster.console import Console
from cluster.directory import Directory
from cluster.plan import Plan, ReplicaPlan, late_keys, machine_cpus, renew
from cluster.signals import Signals
from understudy.errors import UnderstudyError
from workers.model.config import read_spec

log = logging.getLogger(__name__)

Reload = Callable[[], ServiceConfig]
_POLL_S = 0.5  # see `cluster.serve`


class Renewal:
    """`asked` is the configuration that the service was started with, as it was written; `reload` reads it again."""

    def __init__(self, asked: ServiceConfig, reload: Reload, console: Console, signals: Signals) -> None:
        self._asked = asked
        self._reload = reload
        self._console = console
        self._signals = signals

    def run(self, plan: Plan, directory: Directory) -> Plan:
        """The plan that the service has from now on. What is wrong with the new configuration is said, and nothing
        changes. Raises Stopped."""
        try:
            config = self._reload()
            for model in config.models:
                read_spec(model.path)
            after = renew(plan, config, machine_cpus())
        except UnderstudyError as error:
            self._console.say(f"error: {error.message}; nothing was changed")
            return plan
        for key in late_keys(self._asked, config):
            self._console.say(f"warning: {key} will be taken at the next start")
        old = {p.model: p for p in plan.replicas}
        changed = [p for p in after.replicas if old.get(p.model) is not p]
        gone = old.keys() - {p.model for p in after.replicas}
        if not changed and not gone:
            self._console.say("understudy: no model has changed")
            return after
        directory.exchange_now(after.gateway.catalog)
        app.redeploy(changed, gone)
        failed = self._follow({p.model: p for p in changed}, directory)
        for name in sorted(p.model for p in changed if p.model not in failed):
            self._console.say(f"understudy: {name} is renewed")
        for name in sorted(gone):
            self._console.say(f"understudy: {name} is no longer served")
        return self._go_back(plan, after, failed, directory) if failed else after

    def _follow(self, changed: Mapping[str, ReplicaPlan], directory: Directory) -> dict[str, str]:
        """Waits until Serve has done it. Models whose new replicas could not be started, and why."""
        failed: dict[str, str] = {}
        said: dict[str, str] = {}  # by replicas that failed: their words do not stay long
        open_ = set(changed)
        while open_:
            self._signals.check()
            self._console.stage(f"renewing {', '.join(sorted(open_))}")
            with suppress(ConnectionError):
                said |= {m.model: m.error for m in directory.members_now() if m.stage == "failed" and m.error}
            for model, well in app.settled(open_).items():
                open_.discard(model)
                if not well:
                    failed[model] = said.get(model, "its replicas do not start")
            time.sleep(_POLL_S)
        self._console.done()
        return failed

    def _go_back(self, before: Plan, after: Plan, failed: Mapping[str, str], directory: Directory) -> Plan:
        """The new plan, but with the old one for models that failed. A model that was new is served no more."""
        old = {p.model: p for p in before.replicas}
        for model, why in failed.items():
            kept = "the old one stays" if model in old else "it is not served"
            self._console.say(f"error: {model}: {why}; {kept}")
        models = [replace(old[m], upgrade=True, generation=time.time_ns()) for m in failed if m in old]
        back = {p.model: p for p in models}
        replicas = tuple(back.get(p.model, p) for p in after.replicas if p.model not in failed or p.model in back)
        configs = {m.name: m for m in before.gateway.config.models}
        kept_models = tuple(
            configs[m.name] if m.name in failed else m
            for m in after.gateway.config.models
            if m.name not in failed or m.name in back
        )
        gateway = replace(
            after.gateway,
            config=after.gateway.config.model_copy(update={"models": kept_models}),
            models={p.model: p.replicas for p in replicas},
            generation=time.time_ns(),
        )
        directory.exchange_now(gateway.catalog)
        app.redeploy(models, failed.keys() - back.keys())
        return Plan(gateway, replicas)
