"""Spans of a real service, at a real collector: gateway and leaders in one trace, a failover as an event of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from otlp_collector import Collector, Got
from service_process import Service, running, until

from understudy.client import Client
from understudy.v1 import admin_pb2

CALLER = "b7ad6b7169203331"
CALL = "understudy.v1.Inference/Generate"
STREAMS, TOKENS = 8, 900


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, demo_model: Path, collector: Collector) -> Iterator[Service]:
    """Two replicas of the bundled model."""
    if not (demo_model / "model.safetensors").is_file():
        pytest.skip("the bundled model is not there")
    flags = ["--model", f"demo={demo_model}", "--replicas", "2", "--threads", "1", "--redis-url", "none"]
    with running(tmp_path_factory.mktemp("traced"), [*flags, "--otlp-endpoint", collector.endpoint]) as made:
        made.wait_until_ready()
        yield made
        assert made.stop()[-1] == "understudy: stopped"


def ready(service: Service) -> int:
    return sum(r.state == admin_pb2.REPLICA_STATE_READY for r in service.status().replicas)


def trace_id(number: int) -> str:
    return f"{number + 1:032x}"


def named(spans: list[Got], name: str) -> list[Got]:
    return [span for span in spans if span.name == name and span.parent]


def test_a_failover_in_one_trace_from_gateway_and_leaders(traced: Service, collector: Collector) -> None:
    until(lambda: ready(traced) == 2)
    leaders = {p.replica: p.pid for p in traced.status().processes if p.role == "shard"}
    victim, other = sorted(leaders)
    with Client(traced.address, timeout=120) as client:
        streams = [
            client.generate(
                "Once", seed=i, max_tokens=TOKENS, ignore_eos=True, traceparent=f"00-{trace_id(i)}-{CALLER}-01"
            )
            for i in range(STREAMS)
        ]
        for stream in streams:
            next(stream)
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
    assert moved, "half of them should have run at the one that was killed"
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
    until(lambda: ready(traced) == 2)
