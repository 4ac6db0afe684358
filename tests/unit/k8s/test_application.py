"""What the manifests tell the application is what it understands, and what they give it is what it asks for."""

from __future__ import annotations

import importlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from k8s_manifests import OVERLAYS, Manifest, one, pods, serve_config

from cluster import application
from cluster.config import ENV_PREFIX, ServiceConfig, load
from cluster.plan import EXPERT_HOST_PLACE, GATEWAY_PLACE, RANK_PLACE, REPLICA_PLACE
from understudy.errors import ConfigError

ELSEWHERE = ("UNDERSTUDY_CACHE",)  # read from the environment alone: docs/configuration.md


@pytest.fixture(scope="module")
def mounts(k8s: Path, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where what is mounted into pods lies here."""
    volume = tmp_path_factory.mktemp("volume")
    shutil.copytree(demo_model, volume / "model", ignore=shutil.ignore_patterns("*.py"))
    secrets = k8s / "base" / "secrets"
    places = {f"/etc/understudy/{name}": secrets for name in ("tls", "access", "keys")}
    return places | {"/models": volume}


def here(value: Any, mounts: dict[str, Path]) -> Any:
    """The same with paths of pods as those of this machine."""
    if isinstance(value, dict):
        return {key: here(each, mounts) for key, each in value.items()}
    if isinstance(value, str):
        for mount, place in mounts.items():
            if value.startswith(mount + "/"):
                return str(place / value.removeprefix(mount + "/"))
    return value


def environment(template: Manifest) -> dict[str, str]:
    """A pod's variables, Secrets' values left as words."""
    said: dict[str, str] = {}
    for variable in template["spec"]["containers"][0].get("env", []):
        value = variable.get("value", "secret")
        said[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda m, said=said: said[m.group(1)], value)
    return said


def read(manifests: list[Manifest], mounts: dict[str, Path]) -> ServiceConfig:
    args = here(serve_config(manifests)["applications"][0]["args"], mounts)
    return application.read(args, environment(dict(pods(manifests))["head"]))


def test_the_application_takes_its_keys(manifests: list[Manifest], mounts: dict[str, Path]) -> None:
    config = read(manifests, mounts)
    assert config.notes == ()
    assert (config.host, config.metrics_host, config.ray_address) == ("0.0.0.0", "0.0.0.0", "auto")
    assert config.redis_url == "redis://:secret@prefix-redis:6379/0"
    assert config.place_by_role
    made = application.plan(here(serve_config(manifests)["applications"][0]["args"], mounts), {})
    assert made.gateway.secret == (mounts["/etc/understudy/keys"] / "wire_key").read_bytes().hex()
    assert all(replicas.by_role and not replicas.loopback for replicas in made.replicas)


def test_serve_starts_it_without_proxies(manifests: list[Manifest]) -> None:
    config = serve_config(manifests)
    assert config["proxy_location"] == "Disabled"
    (app,) = config["applications"]
    module, _, name = app["import_path"].partition(":")
    assert getattr(importlib.import_module(module), name) is application.build
    assert app["name"] == "understudy"
    assert app["route_prefix"] is None


def test_every_variable_is_one_that_is_read(manifests: list[Manifest]) -> None:
    for name, template in pods(manifests):
        variables = environment(template)
        ours = {k: v for k, v in variables.items() if k.startswith(ENV_PREFIX)}
        assert name.endswith("redis") or len(ours) == 2
        found = load(environ={k: v for k, v in ours.items() if k not in ELSEWHERE})
        assert found.notes == ()


def test_an_unknown_key_ends_the_build() -> None:
    with pytest.raises(ConfigError, match=r"gateway \(in the arguments\).*did you mean gateways"):
        application.read({"gateway": 2}, {})


def test_what_a_cluster_decides_cannot_be_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="wire_key: is not given"):
        application.read({}, {})
    (tmp_path / "key").write_text("0" * 32)
    with pytest.raises(ConfigError, match="ray_address = 'auto'"):
        application.read({"wire_key": str(tmp_path / "key"), "ray_address": "auto"}, {})
    short = tmp_path / "short"
    short.write_text("0")
    with pytest.raises(ConfigError, match=r"wire_key: .* holds 1 bytes"):
        application.plan({"wire_key": str(short)}, {})


def test_all_interfaces_without_tls_have_to_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("0" * 32)
    args = {"wire_key": str(tmp_path / "key"), "host": "0.0.0.0"}
    with pytest.raises(ConfigError, match="others can reach it"):
        application.read(args, {})
    assert application.read(args | {"insecure": True}, {}).host == "0.0.0.0"


def test_only_the_laptop_does_without_tls(render: Any, mounts: dict[str, Path]) -> None:
    insecure = {overlay: read(render(overlay), mounts).insecure for overlay in OVERLAYS}
    assert insecure == {overlay: overlay == "overlays/laptop" for overlay in OVERLAYS}


def test_groups_have_the_resources_that_processes_ask_for(manifests: list[Manifest], mounts: dict[str, Path]) -> None:
    config = read(manifests, mounts)
    (model,) = config.models
    cluster = one(manifests, "RayService")["spec"]["rayClusterConfig"]
    groups = {g["groupName"]: g for g in cluster["workerGroupSpecs"]}
    wanted = {
        "gateways": (config.gateways, GATEWAY_PLACE),
        "shards": (model.replicas.least, REPLICA_PLACE | RANK_PLACE),
    }
    if model.expert_hosts:
        wanted["expert-hosts"] = (model.replicas.least * model.expert_hosts, EXPERT_HOST_PLACE)
    assert set(groups) == set(wanted)
    for name, (count, places) in wanted.items():
        group = groups[name]
        assert group["replicas"] == group["minReplicas"] == count
        # One more than there are, so that what has to leave can go somewhere first.
        assert group["maxReplicas"] > count
        assert {k for k in group["resources"] if k != "CPU"} == set(places)
    needs = groups["shards"]["template"]["spec"]["containers"][0]["resources"]["requests"]
    ranks = model.tensor_parallel
    assert int(needs["cpu"]) >= (model.threads or 0) * ranks > 0
    assert needs.get("nvidia.com/gpu", 0) == (ranks if model.device == "cuda" else 0)
    assert float(groups["shards"]["resources"]["understudy_shard"]) >= ranks
    if model.expert_hosts:
        needs = groups["expert-hosts"]["template"]["spec"]["containers"][0]["resources"]["requests"]
        assert int(needs["cpu"]) >= (model.threads or 0)
        assert needs["nvidia.com/gpu"] == 1
    # Nothing that computes is placed on a head or beside a gateway.
    assert cluster["headGroupSpec"]["resources"] == {"CPU": "0"}
    assert groups["gateways"]["resources"]["CPU"] == "0"


def test_pods_listen_where_the_configuration_says(manifests: list[Manifest], mounts: dict[str, Path]) -> None:
    config = read(manifests, mounts)
    ports = dict(pods(manifests))["gateways"]["spec"]["containers"][0]["ports"]
    assert {p["name"]: p["containerPort"] for p in ports} == {"grpc": config.port, "metrics": config.metrics_port}


def test_everybody_runs_the_same_ray(manifests: list[Manifest]) -> None:
    import ray

    assert one(manifests, "RayService")["spec"]["rayClusterConfig"]["rayVersion"] == ray.__version__
