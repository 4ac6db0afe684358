"""Every overlay renders, is valid, and says what the rest of it and the application understand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_manifests import OVERLAYS, Manifest, one, pods, serve_config
from k8s_schemas import KUBERNETES, RAY_KINDS, RaySchemas, check_core

# Kinds whose schemas are neither Kubernetes' own nor KubeRay's.
OTHERS = ("ServiceMonitor", "PrometheusRule", "Gateway", "GRPCRoute", "BackendTLSPolicy")
RAY_GROUPS = ("head", "gateways", "shards", "expert-hosts")


@pytest.fixture(scope="module")
def ray_schemas(oracles: Path) -> RaySchemas:
    return RaySchemas(oracles / "kuberay" / "crds")


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_would_take_it(manifests: list[Manifest], version: str) -> None:
    own = [m for m in manifests if m["kind"] not in (*RAY_KINDS, *OTHERS)]
    assert len(own) >= 14
    for manifest in own:
        check_core(manifest, version)


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_would_take_the_pods_of_ray(manifests: list[Manifest], version: str) -> None:
    """KubeRay's CRD knows less of a pod than Kubernetes does."""
    for name, template in pods(manifests):
        check_core({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": template["spec"]}, version)


def test_a_wrong_document_is_refused(manifests: list[Manifest]) -> None:
    budget = next(m for m in manifests if m["kind"] == "PodDisruptionBudget")
    wrong = budget | {"spec": budget["spec"] | {"maxUnavailabel": 1}}
    with pytest.raises(ValueError, match="maxUnavailabel"):
        check_core(wrong, KUBERNETES[-1])


def test_kuberay_would_take_it(manifests: list[Manifest], ray_schemas: RaySchemas) -> None:
    assert list(ray_schemas.errors(one(manifests, "RayService"))) == []


def test_kuberays_samples_are_taken_but_for_two(oracles: Path, ray_schemas: RaySchemas) -> None:
    """Which shows that the check refuses what has to be refused."""
    wrong: dict[str, list[str]] = {}
    for file in sorted((oracles / "kuberay" / "samples").glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            if document and document["kind"] in RAY_KINDS:
                wrong.setdefault(file.name, []).extend(ray_schemas.errors(document))
    assert len(wrong) == 30
    refused = {name: errors for name, errors in wrong.items() if errors}
    assert set(refused) == {"ray-service.high-throughput-gemma4.yaml", "ray-service.high-throughput-llm.yaml"}
    assert all("'maxReplicas' is a required property" in " ".join(errors) for errors in refused.values())


def test_a_field_that_kuberay_does_not_know_is_refused(render: Any, ray_schemas: RaySchemas) -> None:
    service = one(render("base"), "RayService")
    wrong = service | {"spec": service["spec"] | {"serveConfig": ""}}
    assert any("serveConfig" in error for error in ray_schemas.errors(wrong))


def test_kuberays_other_rules_are_kept(manifests: list[Manifest]) -> None:
    """Those that its operator checks and its CRD does not say."""
    cluster = one(manifests, "RayService")["spec"]["rayClusterConfig"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        # What stands in `resources` and `labels` of a group may not stand in its parameters.
        assert not {"num-cpus", "num-gpus", "memory", "resources", "labels"} & set(group["rayStartParams"])
        assert "restartPolicy" not in group["template"]["spec"], "the autoscaler replaces pods itself"
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert ("autoscalerOptions" in cluster) == cluster.get("enableInTreeAutoscaling", False)


def test_what_a_pod_mounts_or_reads_is_there(manifests: list[Manifest]) -> None:
    held = {(m["kind"], m["metadata"]["name"]): set(m.get("data", {})) for m in manifests}
    for name, template in pods(manifests):
        spec = template["spec"]
        volumes = {v["name"]: v for v in spec.get("volumes", [])}
        for volume in volumes.values():
            if "secret" in volume:
                assert ("Secret", volume["secret"]["secretName"]) in held, name
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in held, name
        for container in spec["containers"]:
            for variable in container.get("env", []):
                if "valueFrom" in variable:
                    key = variable["valueFrom"]["secretKeyRef"]
                    assert key["key"] in held["Secret", key["name"]], name
            claims = {"data"} if name == "gcs-redis" else set()
            assert {m["name"] for m in container["volumeMounts"]} <= set(volumes) | claims, name


def test_every_selector_selects_a_pod(manifests: list[Manifest]) -> None:
    labels = [template["metadata"]["labels"] for _, template in pods(manifests)]
    selectors = []
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Service":
            selectors.append({"matchLabels": spec["selector"]})
        elif manifest["kind"] == "PodDisruptionBudget":
            selectors.append(spec["selector"])
        elif manifest["kind"] == "NetworkPolicy":
            selectors.append(spec["podSelector"])
    for _, template in pods(manifests):
        selectors += [t["labelSelector"] for t in template["spec"].get("topologySpreadConstraints", [])]
    experts = any(name == "expert-hosts" for name, _ in pods(manifests))
    for selector in selectors:
        if "expert-host" in str(selector) and not experts:
            continue
        assert any(_selects(selector, each) for each in labels), selector


def _selects(selector: Manifest, labels: dict[str, str]) -> bool:
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(labels.get(e["key"]) in e["values"] for e in selector.get("matchExpressions", []))


def test_ports_are_those_of_the_pods(manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if manifest["kind"] != "Service":
            continue
        selector = {"matchLabels": manifest["spec"]["selector"]}
        (template,) = [t for _, t in pods(manifests) if _selects(selector, t["metadata"]["labels"])]
        named = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
        for port in manifest["spec"]["ports"]:
            assert named[port["targetPort"]] == port["port"]


def test_pods_of_ray_are_probed_and_leave_in_time(manifests: list[Manifest]) -> None:
    """KubeRay would add probes that ask Serve's proxy, which is off, where there are none."""
    drain = serve_config(manifests)["applications"][0]["args"]["drain_seconds"]
    for name, template in pods(manifests):
        if name not in RAY_GROUPS:
            continue
        container = template["spec"]["containers"][0]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        seconds = float(command[-1])
        # Serve gives a replica `drain_seconds` and 15 more; then the next one needs some time to stand.
        assert seconds >= drain + 15 + 30, name
        assert template["spec"]["terminationGracePeriodSeconds"] >= seconds + 15, name
        if name != "head":
            assert command[:3] == ["python", "-m", "cluster.prestop"]
    service = one(manifests, "RayService")["spec"]
    assert service["rayClusterDeletionDelaySeconds"] > 90


def test_gateways_are_ready_when_they_say_so(manifests: list[Manifest]) -> None:
    probe = dict(pods(manifests))["gateways"]["spec"]["containers"][0]["readinessProbe"]
    assert probe["httpGet"] == {"path": "/readyz", "port": "metrics"}


def test_the_two_redis_keep_what_they_are_for(render: Any) -> None:
    for overlay in ("base", "overlays/gpu", "overlays/production"):
        manifests = render(overlay)
        fault_tolerance = one(manifests, "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
        assert fault_tolerance["redisAddress"] == "redis://gcs-redis:6379"
    for overlay in OVERLAYS:
        for name, policy in (("prefix-redis", "allkeys-lru"), ("gcs-redis", "noeviction")):
            for redis in [m for m in render(overlay) if m["kind"] == "StatefulSet" and m["metadata"]["name"] == name]:
                container = redis["spec"]["template"]["spec"]["containers"][0]
                arguments = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
                assert arguments["--maxmemory-policy"] == policy
                kept = _bytes(arguments["--maxmemory"])
                assert kept <= 0.85 * _bytes(container["resources"]["limits"]["memory"])


def _bytes(size: str) -> int:
    units = {"mb": 1 << 20, "gb": 1 << 30, "Mi": 1 << 20, "Gi": 1 << 30}  # Redis' gb are 2^30
    return int(size[:-2]) * units[size[-2:]]


def test_pods_may_do_no_more_than_they_need(manifests: list[Manifest]) -> None:
    for name, template in pods(manifests):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["enableServiceLinks"] is False, "variables of Services would look like keys of ours"
        assert name == "head" or spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_nothing_secret_is_in_the_repository(k8s: Path) -> None:
    root = Path(__file__).parents[3] / "k8s"
    kept = [p for p in root.rglob("*") if p.is_file() and p.parent.name != "secrets"]
    assert not any("PRIVATE KEY" in p.read_text() for p in kept)
    made = (k8s / "base" / "secrets" / "wire_key").read_text()
    assert re.fullmatch(r"[0-9a-f]{64}", made)
