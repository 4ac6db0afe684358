"""From configuration to plan, from what members say to what people see."""

from __future__ import annotations

import pickle
import shutil
import signal
import socket
from pathlib import Path
from unittest.mock import create_autospec

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from cluster.admin import describe
from cluster.autoscale import Decision, Why
from cluster.catalog import Catalog, Known, Library, Texts
from cluster.config import ServiceConfig, load
from cluster.console import Console
from cluster.local import join
from cluster.metrics import ReplicaMetrics
from cluster.plan import late_keys, make_plan, renew, unpack
from cluster.roster import Claim, Member, ProcessInfo
from cluster.serve import (
    Signals,
    Stopped,
    _ray,
    all_ready,
    check_files,
    example,
    first_token,
    new_log_directory,
    progress_of,
    raise_failure,
    with_free_ports,
)
from router.index import IndexStats
from router.port import ReplicaView, RouterFigures, State
from router.rebalance import ExpertsView, HostState
from understudy.errors import CheckpointError, ConfigError, InternalError
from understudy.v1 import admin_pb2 as pb
from workers.engine import EngineStats
from workers.engine.fake import FakeEngine


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "m"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text('{"some": "text"}')
    return directory


@pytest.fixture
def config(checkpoint: Path) -> ServiceConfig:
    return load({"model": [f"a={checkpoint}", f"b={checkpoint}"], "replicas": 2, "cache_bytes": "1GiB"})


def replica(name: str, stage: str, done: float = 0.0, epoch: int = 1, **more: str) -> Member:
    claim = Claim(name, epoch)
    processes = (ProcessInfo("replica", 10, "n", name), ProcessInfo("shard", 11, "n", name))
    return Member(name, "replica", stage, processes, done, name.partition("-")[0], claim, **more)


def gateway(stage: str = "ready") -> Member:
    return Member("g", "gateway", stage, (ProcessInfo("gateway", 12, "n"),))


def test_a_plan_shares_the_machine_and_crosses_the_cluster(config: ServiceConfig) -> None:
    plan = make_plan(config, 8, Path("logs"))
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert [(r.model, r.replicas, r.engine.threads) for r in plan.replicas] == [("a", (2, 2), 2), ("b", (2, 2), 2)]
    assert {r.engine.cache_bytes for r in plan.replicas} == {1 << 30}
    assert {r.secret for r in plan.replicas} == {plan.gateway.secret}
    assert plan.gateway.models == {"a": (2, 2), "b": (2, 2)}
    assert unpack(plan.replicas[0].files) == {"config.json": b"{}", "tokenizer.json": b'{"some": "text"}'}
    assert make_plan(config, 8).gateway.secret != plan.gateway.secret
    assert {r.engine.threads for r in make_plan(config, 1).replicas} == {1}


def test_in_a_cluster_replicas_take_whole_cpus_and_real_addresses(checkpoint: Path) -> None:
    config = load({"model": [str(checkpoint)], "ray_address": "auto", "threads": 4})
    (plan,) = make_plan(config, 8, Path("logs")).replicas
    assert (plan.leader_cpus, plan.loopback, plan.logs) == (4.0, False, None)


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint: Path, config: ServiceConfig) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*save_pretrained"):
        make_plan(config, 2)


def test_progress_is_that_of_the_slowest() -> None:
    assert progress_of([]) == ("starting replicas", None)
    loading = [replica("a-0", "ready", 1.0), replica("a-1", "loading", 0.5)]
    assert progress_of(loading) == ("loading weights", 0.75)
    assert progress_of([*loading, replica("b-0", "starting")]) == ("starting replicas", None)
    assert progress_of([replica("a-0", "warming")]) == ("warming up", None)
    assert progress_of([replica("a-0", "ready"), gateway("starting")]) == ("waiting for the gateway", None)


def test_ready_is_when_everybody_is(config: ServiceConfig) -> None:
    plan = make_plan(config, 2)
    everybody = [*(replica(f"{m}-{i}", "ready") for m in "ab" for i in range(2)), gateway()]
    assert all_ready(everybody, plan)
    for missing in range(len(everybody)):
        assert not all_ready(everybody[:missing] + everybody[missing + 1 :], plan)
    assert not all_ready([*everybody[:-1], gateway("starting")], plan)


def test_a_failure_keeps_its_kind() -> None:
    raise_failure([replica("a-0", "loading"), gateway()])
    with pytest.raises(CheckpointError) as caught:
        raise_failure([replica("a-0", "failed", error_kind="CHECKPOINT", error="x: is cut off")])
    assert caught.value.message == "x: is cut off"
    with pytest.raises(InternalError, match="a-1: the process is dead"):
        raise_failure([replica("a-1", "failed", error="the process is dead")])


def test_a_taken_port_is_named_by_its_flag(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag in ("port", "admin_port", "metrics_port"):
            with pytest.raises(ConfigError, match=f"--{flag.replace('_', '-')}: cannot listen on 127.0.0.1:{port}"):
                with_free_ports(load({"model": [str(checkpoint)], "port": 0, "admin_port": 0, flag: port}))
    free = with_free_ports(load({"model": [str(checkpoint)], "port": 0, "admin_port": 0, "metrics_port": 0}))
    assert len({free.port, free.admin_port, free.metrics_port} - {0}) == 3


def test_a_host_that_is_not_ours_is_named(checkpoint: Path, tmp_path: Path) -> None:
    config = load({"model": [str(checkpoint)], "port": 0, "admin_port": 0, "metrics_port": 0})
    for host in ("192.0.2.1", "2001:db8::1", "no-such-host.invalid"):
        with pytest.raises(ConfigError, match=f"--host = '{host}': cannot listen there"):
            with_free_ports(config.model_copy(update={"host": host}))


def test_files_are_looked_at_before_anything_starts(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.model.config.read_spec", lambda _: None)
    tokens = tmp_path / "tokens"
    tokens.write_text("secret\n")
    with pytest.raises(ConfigError, match="line 1: has 1 words") as caught:
        check_files(load({"model": [str(checkpoint)], "tokens": tokens}))
    assert "secret" not in caught.value.message


def test_a_place_for_logs_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"logs cannot be written to .*XDG_CACHE_HOME"):
        new_log_directory()


def test_a_signal_while_ray_starts_is_a_stop(config: ServiceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes SIGTERM for itself meanwhile and answers it with SystemExit(15)."""
    ended: list[str] = []

    class Interrupted:
        def __init__(self, _logs: Path) -> None: ...

        def start(self, _cpus: int, _verbose: bool) -> None:
            raise SystemExit(15)

        def stop(self) -> None:
            ended.append("stop")

    monkeypatch.setattr("cluster.serve.LocalRay", Interrupted)
    console = create_autospec(Console, instance=True)
    before = signal.getsignal(signal.SIGTERM)
    signals = Signals()
    with signals, pytest.raises(Stopped), _ray(config, Path("logs"), console, signals):
        raise AssertionError("it must not begin")
    assert ended == ["stop"]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("problem", [ConnectionError, RuntimeError, ValueError])
def test_a_cluster_that_is_not_there_is_named(problem: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise problem("nobody\nanswers")

    monkeypatch.setattr("ray.init", init)
    monkeypatch.setenv("RAY_ENABLE_AUTO_CONNECT", "0")
    with pytest.raises(ConfigError, match=r"--ray-address = 'h:1': no Ray cluster.*nobody; start one") as caught:
        join("h:1", verbose=False)
    assert "\n" not in caught.value.message


def test_the_secret_is_not_shown(config: ServiceConfig) -> None:
    plan = make_plan(config, 2)
    assert plan.gateway.secret not in repr(plan)


def test_the_example_can_be_typed(checkpoint: Path, config: ServiceConfig) -> None:
    plain = load({"model": [str(checkpoint)]})
    assert example(plain) == 'try: understudy complete "The capital of France is"'
    assert example(config.model_copy(update={"port": 7})).endswith('is" --model a --address 127.0.0.1:7')


def test_the_first_token_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text("# ours\n\nsecret tenant\nother tenant\n")
    assert first_token(file) == "secret"
    assert first_token(None) is None


def view(name: str, state: State = State.READY, epoch: int = 1) -> ReplicaView:
    info = FakeEngine(model=name.partition("-")[0]).info
    return ReplicaView(name, "h:1", epoch, state, info, EngineStats(running=3, generated_tokens=40), 0.5, "n")


def test_status_joins_the_router_and_the_roster() -> None:
    views = [view("a-0"), view("a-1", State.LOST)]
    members = [
        replica("a-0", "ready"),
        replica("a-1", "ready"),
        replica("a-1", "loading", epoch=2),
        replica("b-0", "failed", error="no such file"),
        gateway(),
    ]
    status = describe(views, members, Known(Catalog(1, {"a": (2, 2), "b": (1, 1)})))
    assert [(m.name, m.replicas_ready, m.replicas_wanted) for m in status.models] == [("a", 1, 2), ("b", 0, 1)]
    assert [(r.id, r.epoch, pb.ReplicaState.Name(r.state), r.cause) for r in status.replicas] == [
        ("a-0", 1, "REPLICA_STATE_READY", ""),
        ("a-1", 1, "REPLICA_STATE_LOST", "silent for 0.5 s"),
        ("a-1", 2, "REPLICA_STATE_STARTING", "loading"),
        ("b-0", 1, "REPLICA_STATE_LOST", "no such file"),
    ]
    assert [p.role for p in status.processes] == ["replica", "shard"] * 4 + ["gateway"]


def test_replicas_figures_are_exported() -> None:
    registry, metrics = CollectorRegistry(), ReplicaMetrics()
    registry.register(metrics)
    metrics.views = [view("a-0"), view("a-1", State.LOST)]
    text = generate_latest(registry).decode()
    assert 'understudy_replica_running{model="a",replica="a-0"} 3.0' in text
    assert 'understudy_replica_generated_tokens_total{model="a",replica="a-1"} 40.0' in text
    assert 'understudy_replica_ready{model="a",replica="a-1"} 0.0' in text
    assert "understudy_router" not in text
    assert "understudy_expert_balance{" not in text
    hosts = (HostState("h0", 1, "ready"), HostState("h1", 2, "lost"))
    metrics.experts = [ExpertsView("a", "a-0", 3, 3, 0.9, 12.5, 16, 18, hosts, 2)]
    text = generate_latest(registry).decode()
    for line in (
        'understudy_expert_rebalance_age_seconds{model="a",replica="a-0"} 12.5',
        'understudy_expert_balance{model="a",replica="a-0"} 0.9',
        'understudy_expert_placement_version{model="a",replica="a-0"} 3.0',
        'understudy_expert_hosts_ready{model="a",replica="a-0"} 1.0',
        'understudy_expert_hosts_wanted{model="a",replica="a-0"} 2.0',
    ):
        assert line in text
    index = IndexStats(blocks=7, gaps=1)
    metrics.figures = RouterFigures({"device": 5, "spread": 0}, 2, {"device": 160}, 3, index)
    text = generate_latest(registry).decode()
    for line in (
        'understudy_router_decisions_total{reason="device"} 5.0',
        'understudy_router_decisions_total{reason="spread"} 0.0',
        'understudy_router_reused_tokens_total{tier="device"} 160.0',
        "understudy_router_refused_total 2.0",
        "understudy_router_leases 3.0",
        "understudy_router_index_blocks 7.0",
        "understudy_router_index_gaps_total 1.0",
    ):
        assert line in text


def test_status_says_how_many_are_wanted_and_why() -> None:
    old, new = view("a-0"), view("a-1")
    new = msgspec.structs.replace(new, info=msgspec.structs.replace(new.info, model_fingerprint="new"))
    decided = {"a": Decision(3, Why.QUEUE, "prompts of 9 s wait", 4.0)}
    known = Known(Catalog(1, {"a": (0, 4), "b": (0, 1)}), {"a": {"fake": 1, "new": 2}}, decided)
    a, b = describe([old, new], [], known).models
    assert (a.replicas_ready, a.replicas_wanted, a.replicas_least, a.replicas_most) == (2, 3, 0, 4)
    assert (a.model_fingerprint, a.versions) == ("new", 2)
    assert (a.scaling.reason, a.scaling.detail, a.scaling.age_s) == ("queue", "prompts of 9 s wait", 4.0)
    assert (b.replicas_wanted, b.HasField("scaling"), b.versions) == (1, False, 0)
    registry, metrics = CollectorRegistry(), ReplicaMetrics()
    registry.register(metrics)
    metrics.known, metrics.views = known, [old, new]
    text = generate_latest(registry).decode()
    for line in (
        'understudy_model_replicas_wanted{model="a"} 3.0',
        'understudy_model_replicas_most{model="a"} 4.0',
        'understudy_model_replicas_ready{model="a"} 2.0',
        'understudy_model_replicas_ready{model="b"} 0.0',
        'understudy_model_scaling{model="a",reason="queue"} 1.0',
    ):
        assert line in text


def test_only_what_changed_gets_another_plan(config: ServiceConfig, checkpoint: Path, tmp_path: Path) -> None:
    plan = make_plan(config, 8)
    other = tmp_path / "n"
    shutil.copytree(checkpoint, other)
    flags = {"replicas": 2, "cache_bytes": "1GiB"}
    same = renew(plan, load({"model": [f"a={checkpoint}", f"b={checkpoint}"], **flags}), 8)
    assert [s is p for s, p in zip(same.replicas, plan.replicas, strict=True)] == [True, True]
    after = renew(plan, load({"model": [f"a={other}", f"b={checkpoint}", f"c={other}"], **flags, "port": 1}), 8)
    a, b, c = after.replicas
    assert b is plan.replicas[1]
    assert (a.upgrade, c.upgrade, b.upgrade) == (True, False, False)
    assert a.generation > plan.replicas[0].generation
    assert {a.secret, c.secret} == {plan.gateway.secret}
    assert after.gateway.config.port == plan.gateway.config.port
    assert after.gateway.catalog.generation > plan.gateway.catalog.generation
    assert after.gateway.catalog.models == {"a": (2, 2), "b": (2, 2), "c": (2, 2)}
    (checkpoint / "tokenizer.json").write_text('{"other": "text"}')
    a, b = renew(plan, load({"model": [f"a={checkpoint}", f"b={checkpoint}"], **flags}), 8).replicas
    assert a.upgrade, "another tokenizer is another version"


def test_keys_that_a_running_service_cannot_take_are_named(checkpoint: Path) -> None:
    before = load({"model": [str(checkpoint)]})
    after = load({"model": [f"b={checkpoint}"], "port": 7, "drain_seconds": 1})
    assert late_keys(before, after) == ["port", "drain_seconds"]


def test_a_catalog_and_texts_outlive_a_router_that_forgot() -> None:
    now = [0.0]
    library = Library(lambda: now[0])
    first, second = Catalog(1, {"a": (1, 1)}), Catalog(2, {"a": (0, 3)})
    assert library.exchange(second).catalog == second
    assert library.exchange(first).catalog == second, "the newer one stays"
    assert Library(lambda: 0.0).exchange(second).catalog == second, "and who knows it brings it again"
    assert not library.has("a", "x", 1)
    library.lend("a", "x", Texts(5, {"f": b"new"}))
    library.lend("a", "x", Texts(4, {"f": b"old"}))
    assert library.has("a", "x", 4)
    found = library.texts("a", "x")
    assert found is not None
    assert found.files == {"f": b"new"}
    for i in range(10, 20):
        library.lend("a", f"v{i}", Texts(i, {}))
    assert library.exchange(first).versions == {"a": {f"v{i}": i for i in range(16, 20)}}
    library.decide({"a": Decision(2, Why.RUNNING, "", 1.0)})
    now[0] += 5
    assert library.exchange(first).decisions["a"].age_s == 6.0


def test_two_services_do_not_wait_for_one_port() -> None:
    """What Ray is told by a name of its own, which a later Ray may change."""
    from ray._private import parameter

    from cluster.local import _agent_on_any_port

    usual = parameter.RayParams
    with _agent_on_any_port():
        assert parameter.RayParams().dashboard_agent_listen_port == 0  # type: ignore[no-untyped-call]
    assert parameter.RayParams is usual
    assert usual().dashboard_agent_listen_port == 52365  # type: ignore[no-untyped-call]
