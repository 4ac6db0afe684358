"""The router's figures for Prometheus, and the replicas' as it last heard them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.admin import wanted_of
from cluster.catalog import Known
from router.port import ReplicaView, RouterFigures, State
from router.rebalance import ExpertsView

_Value = Callable[[ReplicaView], float]
_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("running", "Sequences that run.", lambda v: v.stats.running),
    ("waiting", "Sequences that wait.", lambda v: v.stats.waiting),
    ("waiting_prefill_tokens", "Prompt tokens not yet computed.", lambda v: v.stats.waiting_prefill_tokens),
    ("blocks", "Blocks of the cache.", lambda v: v.info.blocks),
    ("blocks_in_use", "Blocks held by running sequences.", lambda v: v.stats.blocks_in_use),
    ("blocks_cached", "Blocks held by the prefix tree alone.", lambda v: v.stats.blocks_cached),
    ("stalled", "1 where it makes no tokens at present.", lambda v: float(v.state is State.STALLED)),
    ("ready", "1 where the replica takes requests.", lambda v: float(v.state is State.READY)),
    ("silent_seconds", "Since its last heartbeat.", lambda v: v.silent_s),
)
_COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("steps", "Engine steps.", lambda v: v.stats.steps),
    ("generated_tokens", "Tokens made.", lambda v: v.stats.generated_tokens),
    ("computed_prompt_tokens", "Prompt tokens computed.", lambda v: v.stats.computed_prompt_tokens),
    ("hit_tokens", "Prompt tokens found in the prefix tree.", lambda v: v.stats.hit_tokens),
    ("prefill_rows", "Rows of steps that computed prompts.", lambda v: v.stats.prefill_rows),
    ("prefill_seconds", "Seconds of those steps.", lambda v: v.stats.prefill_seconds),
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

_MODELS: tuple[tuple[str, str, Callable[[Known, str], float]], ...] = (
    ("replicas_wanted", "Replicas that there should be.", wanted_of),
    ("replicas_least", "Replicas that there are at least.", lambda k, m: float(k.catalog.models[m][0])),
    ("replicas_most", "Replicas that there are at most.", lambda k, m: float(k.catalog.models[m][1])),
)

_Figure = Callable[[RouterFigures], float]
_ROUTER_GAUGES: tuple[tuple[str, str, _Figure], ...] = (
    ("suspects", "Requests under which a replica was lost, that have not got on yet.", lambda f: f.suspects),
    ("leases", "Assignments that replicas have not yet reported.", lambda f: f.leases),
    ("index_blocks", "Blocks that the index knows.", lambda f: f.index.blocks),
    ("index_stored_blocks", "Those of the shared store.", lambda f: f.index.stored),
    ("index_expected_blocks", "Blocks that assignments should bring.", lambda f: f.index.expected),
    ("index_holder_sets", "Different sets of holders.", lambda f: f.index.sets),
    ("index_bytes", "Size of the index's table.", lambda f: f.index.nbytes),
)
_ROUTER_COUNTERS: tuple[tuple[str, str, _Figure], ...] = (
    ("refused", "Requests that found no room.", lambda f: f.refused),
    ("index_changes", "Changes of caches that replicas told.", lambda f: f.index.taken),
    ("index_gaps", "Gaps in what they told.", lambda f: f.index.gaps),
    ("index_snapshots", "Snapshots taken to close them.", lambda f: f.index.snapshots),
    ("index_refused_blocks", "Blocks not taken in for want of room.", lambda f: f.index.refused),
)


class ReplicaMetrics(Collector):
    """Set `views`, `experts`, `figures` and `known`; every scrape shows the latest."""

    def __init__(self) -> None:
        self.views: list[ReplicaView] = []
        self.experts: list[ExpertsView] = []
        self.figures: RouterFigures | None = None
        self.known = Known()

    def collect(self) -> Iterator[Metric]:
        if self.figures is not None:
            yield from _router(self.figures)
        yield from self._models()
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

    def _models(self) -> Iterator[Metric]:
        known = self.known
        for name, said, value in _MODELS:
            gauge = GaugeMetricFamily(f"understudy_model_{name}", said, labels=["model"])
            for model in known.catalog.models:
                gauge.add_metric([model], value(known, model))
            yield gauge
        ready = GaugeMetricFamily("understudy_model_replicas_ready", "Replicas that take requests.", labels=["model"])
        why = GaugeMetricFamily(
            "understudy_model_scaling", "1 for the reason of the last change of the number.", labels=["model", "reason"]
        )
        for model in known.catalog.models:
            ready.add_metric([model], sum(v.info.model == model and v.state is State.READY for v in self.views))
            if model in known.decisions:
                why.add_metric([model, known.decisions[model].why], 1.0)
        yield from (ready, why)
        start = GaugeMetricFamily(
            "understudy_replica_cold_start_seconds", "How long a part of its start took.", labels=[*_LABELS, "part"]
        )
        for view in self.views:
            if view.replica in known.starts:
                for part, seconds in msgspec.structs.asdict(known.starts[view.replica]).items():
                    start.add_metric((view.info.model, view.replica, part.removesuffix("_s")), seconds)
        yield start


def _router(figures: RouterFigures) -> Iterator[Metric]:
    for name, said, value in _ROUTER_GAUGES:
        yield GaugeMetricFamily(f"understudy_router_{name}", said, value=value(figures))
    for name, said, value in _ROUTER_COUNTERS:
        yield CounterMetricFamily(f"understudy_router_{name}", said, value=value(figures))
    for name, said, label, counts in (
        ("decisions", "Requests assigned, by why that replica.", "reason", figures.decisions),
        ("reused_tokens", "Prompt tokens that chosen replicas were taken to have.", "tier", figures.reused_tokens),
    ):
        counter = CounterMetricFamily(f"understudy_router_{name}", said, labels=[label])
        for key, count in counts.items():
            counter.add_metric([key], count)
        yield counter
