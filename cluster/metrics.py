"""Replicas' figures for Prometheus, as the router last heard them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from router.rebalance import ExpertsView
from router.state import ReplicaView, State

_Value = Callable[[ReplicaView], float]
_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("running", "Sequences that run.", lambda v: v.stats.running),
    ("waiting", "Sequences that wait.", lambda v: v.stats.waiting),
    ("waiting_prefill_tokens", "Prompt tokens not yet computed.", lambda v: v.stats.waiting_prefill_tokens),
    ("blocks", "Blocks of the cache.", lambda v: v.info.blocks),
    ("blocks_in_use", "Blocks held by running sequences.", lambda v: v.stats.blocks_in_use),
    ("blocks_cached", "Blocks held by the prefix tree alone.", lambda v: v.stats.blocks_cached),
    ("ready", "1 where the replica takes requests.", lambda v: float(v.state is State.READY)),
    ("silent_seconds", "Since its last heartbeat.", lambda v: v.silent_s),
)
_COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("steps", "Engine steps.", lambda v: v.stats.steps),
    ("generated_tokens", "Tokens made.", lambda v: v.stats.generated_tokens),
    ("computed_prompt_tokens", "Prompt tokens computed.", lambda v: v.stats.computed_prompt_tokens),
    ("hit_tokens", "Prompt tokens found in the prefix tree.", lambda v: v.stats.hit_tokens),
    ("queried_tokens", "Prompt tokens looked up.", lambda v: v.stats.queried_tokens),
    ("host_hit_tokens", "Prompt tokens that came from host memory.", lambda v: v.stats.host_hit_tokens),
    ("store_hit_tokens", "Prompt tokens that came from the shared store.", lambda v: v.stats.store_hit_tokens),
    ("host_loaded_bytes", "Bytes loaded from host memory.", lambda v: v.stats.host_loaded_bytes),
    ("host_load_seconds", "Time that copying them took.", lambda v: v.stats.host_load_seconds),
    ("store_loaded_bytes", "Bytes loaded from the shared store.", lambda v: v.stats.store_loaded_bytes),
    ("store_load_seconds", "Time that receiving them took.", lambda v: v.stats.store_load_seconds),
    ("store_loads_given_up", "Loads that were waited for in vain.", lambda v: v.stats.store_loads_given_up),
    ("store_misses", "Values that were expected and not there.", lambda v: v.stats.store_misses),
    ("store_bad_values", "Values that did not verify.", lambda v: v.stats.store_bad_values),
    ("store_written_bytes", "Bytes written to the shared store.", lambda v: v.stats.store_written_bytes),
    ("store_writes_dropped", "Blocks that were not written to it.", lambda v: v.stats.store_writes_dropped),
    ("store_failures", "Times that it failed or did not answer.", lambda v: v.stats.store_failures),
    ("preemptions", "Sequences that gave their blocks back.", lambda v: v.stats.preemptions),
    ("drafted_tokens", "Tokens of drafts that were checked.", lambda v: v.stats.drafted_tokens),
    ("accepted_tokens", "Tokens of drafts that the model agreed with.", lambda v: v.stats.accepted_tokens),
)
_LABELS = ("model", "replica")
_Of = Callable[[ExpertsView], float]
_EXPERTS: tuple[tuple[str, str, _Of], ...] = (
    ("rebalance_age_seconds", "Since the placement of experts last changed.", lambda v: v.age_s),
    ("balance", "Mean over maximum of the expert hosts' rows.", lambda v: v.balance),
    ("placement_version", "Of the placement in force.", lambda v: float(v.version)),
    ("copies", "Experts that the hosts hold, copies of hot ones included.", lambda v: float(v.copies)),
    ("hosts_ready", "Expert hosts that serve.", lambda v: float(sum(h.state == "ready" for h in v.hosts))),
    ("hosts_wanted", "Expert hosts that there should be.", lambda v: float(v.wanted)),
)


class ReplicaMetrics(Collector):
    """Set `views` and `experts`; every scrape shows the latest."""

    def __init__(self) -> None:
        self.views: list[ReplicaView] = []
        self.experts: list[ExpertsView] = []

    def collect(self) -> Iterator[Metric]:
        for name, said, value in _GAUGES:
            gauge = GaugeMetricFamily(f"understudy_replica_{name}", said, labels=_LABELS)
            for view in self.views:
                gauge.add_metric((view.info.model, view.replica), value(view))
            yield gauge
        for name, said, value in _COUNTERS:
            counter = CounterMetricFamily(f"understudy_replica_{name}", said, labels=_LABELS)
            for view in self.views:
                counter.add_metric((view.info.model, view.replica), value(view))
            yield counter
        for name, said, of in _EXPERTS:
            gauge = GaugeMetricFamily(f"understudy_expert_{name}", said, labels=_LABELS)
            for each in self.experts:
                gauge.add_metric((each.model, each.replica), of(each))
            yield gauge
