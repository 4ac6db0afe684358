"""Spans of a real service, at a real collector: gateway and leaders in one trace, a failover as an event of it. Runs on
the session's service, and leaves it whole."""

from __future__ import annotations

import os
import signal

from otlp_collector import Collector, Got
from service_process import Service, until

from understudy.v1 import admin_pb2

CALLER = "b7ad6b7169203331"
CALL = "understudy.v1.Inference/Generate"
STREAMS, TOKENS = 24, 400


def replicas(service: Service) -> list[admin_pb2.Replica]:
    """Those of `text` that are ready, busiest first."""
    found = [r for r in service.status().replicas if r.model == "text" and r.state == admin_pb2.REPLICA_STATE_READY]
    return sorted(found, key=lambda r: -r.running)


def trace_id(number: int) -> str:
    return f"{number + 1:032x}"


def named(spans: list[Got], name: str) -> list[Got]:
    ours = {trace_id(i) for i in range(STREAMS)}
    return [span for span in spans if span.name == name and span.trace in ours]


def test_a_failover_in_one_trace_from_gateway_and_leaders(service: Service, collector: Collector) -> None:
    until(lambda: len(replicas(service)) == 2)
    leaders = {p.replica: p.pid for p in service.status().processes if p.role == "shard"}
    with service.client() as client:
        streams = [
            client.generate(
                [1, 2], model="text", seed=i, max_tokens=TOKENS, ignore_eos=True, timeout=120,
                traceparent=f"00-{trace_id(i)}-{CALLER}-01",
            )
            for i in range(STREAMS)
        ]  # fmt: skip
        for stream in streams:
            next(stream)
        until(lambda: replicas(service)[0].running)
        victim, other = (r.id for r in replicas(service))
        os.kill(leaders[victim], signal.SIGKILL)
        for stream in streams:
            for _ in stream:
                pass
            assert len(stream.token_ids) == TOKENS
    # Both processes export once a second, each on its own.
    spans = collector.wait(lambda spans: min(len(named(spans, CALL)), len(named(spans, "decode"))) >= STREAMS)
    calls = {call.trace: call for call in named(spans, CALL)}
    assert set(calls) == {trace_id(i) for i in range(STREAMS)}
    moved = [call for call in calls.values() if call.events]
    assert moved, "some of them ran at the one that was killed"
    for call in calls.values():
        assert call.parent == CALLER
        assert call.attributes["gen_ai.usage.output_tokens"] == TOKENS
        assert call.resource["understudy.role"] == "gateway"
        places = sorted((s for s in named(spans, "replica") if s.trace == call.trace), key=lambda s: s.begin)
        assert {place.parent for place in places} == {call.id}
        assert places[-1].attributes["understudy.replica"] == other
        assert [name for name, _ in places[-1].events] == ["first_token", "finish"]
        # What the leader tells of it that went on to the end.
        for part in ("queue", "prefill", "decode"):
            (span,) = [s for s in named(spans, part) if s.parent == places[-1].id]
            assert span.trace == call.trace
            assert span.resource["understudy.role"] == "replica"
            assert span.resource["service.instance.id"] == other
            assert span.resource["process.pid"] == leaders[other]
        if call not in moved:
            assert len(places) == 1
            continue
        ((name, about),) = call.events
        assert name == "failover"
        assert (about["understudy.failover.from"], about["understudy.failover.to"]) == (victim, other)
        assert about["understudy.failover.tokens"] == places[1].attributes["understudy.tokens.before"] > 0
        assert (places[0].attributes["understudy.replica"], places[0].attributes["error.type"]) == (
            victim, "REPLICA_LOST"
        )  # fmt: skip
    until(lambda: len(replicas(service)) == 2)
