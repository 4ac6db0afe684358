"""The laptop's manifests as processes of this machine, from the first command to the last stream of a pod that leaves.

Everything is done by what Kubernetes and KubeRay would run: `ray start`, the PUT of the application's text, probes,
preStop hooks, SIGTERM. What is missing is the kubelet.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import yaml
from kube_nodes import Cluster, until

from understudy.client import Client

ROOT = Path(__file__).parents[2]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The directory of the Secrets' files, and the laptop's documents."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl here to render the manifests")
    place = tmp_path_factory.mktemp("manifests") / "k8s"
    shutil.copytree(ROOT / "k8s", place, ignore=shutil.ignore_patterns("secrets"))
    subprocess.run([place / "make-secrets.sh"], check=True, capture_output=True, timeout=60)
    text = subprocess.run(
        [kubectl, "kustomize", place / "overlays" / "laptop"], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    return place / "base" / "secrets", list(yaml.safe_load_all(text))


@pytest.fixture(scope="module")
def cluster(
    manifests: tuple[Path, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """Two gateways on three pods, one replica on two pods. Gateways share one port here, for all pods have one address:
    which is why there are two by the environment where the text says one."""
    secrets, documents = manifests
    (service,) = [d for d in documents if d["kind"] == "RayService"]
    made = Cluster(
        service,
        tmp_path_factory.mktemp("pods"),
        {"gateways": 3, "shards": 2},
        {"UNDERSTUDY_GATEWAYS": "2", "UNDERSTUDY_REDIS_URL": "none"},
    )
    try:
        assert {pod.probe("readinessProbe") for pod in made.pods["gateways"]} == {0}, "not before there is a gateway"
        made.deploy({"/etc/understudy/keys": str(secrets)})
        try:
            until(lambda: ready(made), 240, "a gateway that is ready")
        except AssertionError:
            print(made.logs())
            raise
        yield made
    finally:
        made.stop()


def ready(cluster: Cluster) -> bool:
    """Both gateways say so to the kubelet, and the application runs, as KubeRay sees it."""
    app = cluster.applications()["applications"].get("understudy", {})
    assert app.get("status") != "DEPLOY_FAILED", app.get("message")
    pod = cluster.pods["gateways"][0]
    return app.get("status") == "RUNNING" and pod.probe("readinessProbe") == 200


def client(cluster: Cluster) -> Client:
    return Client(f"127.0.0.1:{cluster.ports['grpc']}")


def complete(cluster: Cluster, tokens: int = 300) -> tuple[int, ...]:
    with client(cluster) as asking:
        stream = asking.generate(PROMPT, temperature=0.0, max_tokens=tokens, ignore_eos=True, timeout=120)
        for _ in stream:
            pass
        return stream.completion().choices[0].token_ids


def test_the_text_of_the_manifest_starts_the_service(cluster: Cluster) -> None:
    with client(cluster) as asking:
        pieces = list(asking.generate(PROMPT, temperature=0.0, max_tokens=8, timeout=60))
    assert "".join(p.text for p in pieces).startswith(" Paris")


def test_processes_are_where_their_role_is(cluster: Cluster) -> None:
    assert sum(pod.works() for pod in cluster.pods["gateways"]) == 2
    assert sum(pod.works() for pod in cluster.pods["shards"]) == 1
    assert not cluster.head.works()
    with Client(f"127.0.0.1:{cluster.ports['admin']}") as asking:
        roles = [p.role for p in asking.status(timeout=10).processes]
    assert sorted(roles) == ["gateway", "gateway", "replica", "router", "shard"]


def test_every_probe_is_answered(cluster: Cluster) -> None:
    for pod in [cluster.head, *cluster.pods["shards"], *cluster.pods["gateways"]]:
        assert pod.probe("livenessProbe") == 200, pod.name
        assert pod.probe("readinessProbe") == 200, pod.name


def test_alerts_and_dashboard_name_what_is_told(cluster: Cluster) -> None:
    complete(cluster, 8)
    with urlopen(f"http://127.0.0.1:{cluster.ports['metrics']}/metrics", timeout=10) as page:
        text = page.read().decode()
    told = set(re.findall(r"^# TYPE (understudy_\w+) ", text, re.MULTILINE))
    told |= set(re.findall(r"^(understudy_\w+)", text, re.MULTILINE))
    monitoring = ROOT / "k8s" / "components" / "monitoring"
    asked: set[str] = set()
    for name in ("alerts.yaml", "dashboard.json"):
        asked |= set(re.findall(r"understudy_\w+", (monitoring / name).read_text()))
    assert len(asked) > 30
    # A histogram with a label has series once it is used, which may be at the other gateway; its type is always told.
    assert {re.sub(r"_bucket$", "", name) for name in asked - told} - told == set()


@contextmanager
def streams(cluster: Cluster, count: int) -> Iterator[list[tuple[int, ...]]]:
    """Clients that ask again and again; what they were answered. Raises what any of them did not get."""
    answers: list[tuple[int, ...]] = []
    failures: list[BaseException] = []
    enough = threading.Event()

    def ask() -> None:
        try:
            while not enough.is_set():
                answers.append(complete(cluster))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(answers) >= count or failures, 60, "the first answers")
        yield answers
    finally:
        enough.set()
        for thread in threads:
            thread.join(120)
    if failures:
        raise failures[0]


@pytest.mark.parametrize("group", ["shards", "gateways"])
def test_a_pod_leaves_without_a_broken_stream(cluster: Cluster, group: str) -> None:
    expected = complete(cluster)
    pod = next(p for p in cluster.pods[group] if p.works())
    spare = [p for p in cluster.pods[group] if not p.works()]
    with streams(cluster, 4) as answers:
        took = pod.end()
        gone = len(answers)
        until(lambda: any(p.works() for p in spare), 60, "what left has gone to the spare pod")
        until(lambda: len(answers) > gone + 4, 60, "answers after the pod has gone")
    print(f"{pod.name} was gone after {took:.1f} s; {len(answers)} streams")
    assert set(answers) == {expected}
    cluster.pods[group].remove(pod)
