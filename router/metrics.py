"""What Prometheus is told by a gateway."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The instruments of one gateway in a registry of its own, so that several can run in one process.

    `outcome` is OK or the word of an error's kind. Times in seconds.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry if registry is not None else CollectorRegistry()
        r = self.registry
        self.requests = Counter("understudy_requests", "Calls that ended.", ["method", "outcome"], registry=r)
        self.first_token = Histogram(
            "understudy_time_to_first_token_seconds", "From call to first delta.", buckets=_LATENCIES, registry=r
        )
        self.between = Histogram(
            "understudy_inter_delta_seconds", "Between deltas of a stream.", buckets=_LATENCIES, registry=r
        )
        self.duration = Histogram(
            "understudy_request_seconds", "From call to its end.", ["method"], buckets=_LATENCIES, registry=r
        )
        self.prompt_tokens = Counter("understudy_prompt_tokens", "Prompt tokens taken.", ["model"], registry=r)
        self.completion_tokens = Counter("understudy_completion_tokens", "Tokens passed on.", ["model"], registry=r)
        self.active = Gauge("understudy_active_streams", "Streams under way.", registry=r)
        self.failovers = Counter("understudy_failovers", "Streams that went on at another replica.", registry=r)
        self.alone = Counter("understudy_decisions_without_router", "Replicas chosen by this gateway.", registry=r)
        self.serving = Gauge("understudy_model_serving", "1 while a token can be had.", ["model"], registry=r)
        self.ready_replicas = Gauge("understudy_ready_replicas", "Replicas with a live wire.", registry=r)
