"""Pods of a rendered RayService as processes of this machine: the commands that KubeRay and Kubernetes would run."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import psutil
import yaml
from ports import free_port

from workers.kernels.build import cache_dir

BIN = Path(sys.executable).parent
Manifest = dict[str, Any]


def until(predicate: Callable[[], object], seconds: float, what: str) -> None:
    """Waits for what another process does."""
    end = time.monotonic() + seconds
    while not predicate():
        assert time.monotonic() < end, f"{what}: not within {seconds:g} s"
        time.sleep(0.1)


class Pod:
    """One pod of a group: `ray start --block` with the group's resources, until `end`."""

    def __init__(self, cluster: Cluster, name: str, group: Manifest, head: bool = False) -> None:
        self.name, self._cluster = name, cluster
        self.container = group["template"]["spec"]["containers"][0]
        self._grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
        self._agent_port = free_port()
        self.metrics_port = cluster.ports["metrics"]
        resources = dict(group["resources"])
        cpus = resources.pop("CPU", self.container["resources"]["limits"].get("cpu"))
        words = ["--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats", f"--num-cpus={cpus}"]
        words += [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        words += [f"--resources={json.dumps({k: float(v) for k, v in resources.items()})}"]
        words += [f"--dashboard-agent-listen-port={self._agent_port}"]
        if head:
            words += ["--head", f"--port={cluster.gcs_port}", f"--dashboard-port={cluster.dashboard_port}"]
            words += ["--dashboard-host=127.0.0.1", f"--temp-dir={cluster.directory}"]
        else:
            words += [f"--address=127.0.0.1:{cluster.gcs_port}"]
        self.log = cluster.place / f"{name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [BIN / "ray", "start", *words], env=cluster.environment, stdout=output, stderr=output
            )

    def probe(self, kind: str) -> int:
        """The HTTP status that the kubelet would get; 0 where nobody listens."""
        get = self.container[kind]["httpGet"]
        ports = {8265: self._cluster.dashboard_port, 52365: self._agent_port, "metrics": self.metrics_port}
        return status(f"http://127.0.0.1:{ports[get['port']]}{get['path']}")

    def node_id(self) -> str:
        """Of the Ray node that this pod has started."""
        for child in psutil.Process(self.process.pid).children():
            for word in child.cmdline():
                if word.lstrip("-").replace("-", "_").startswith("node_id=") and child.name() == "raylet":
                    return word.split("=", 1)[1]
        raise AssertionError(f"{self.name} has no raylet: {self.log.read_text()[-2000:]}")

    def works(self) -> bool:
        """Whether a Serve replica of ours runs here."""
        from cluster.prestop import Raylet, serve_replicas

        raylets = [c for c in psutil.Process(self.process.pid).children() if c.name() == "raylet"]
        return bool(raylets) and bool(serve_replicas(Raylet(raylets[0].pid, "", "")))

    def pre_stop(self) -> subprocess.CompletedProcess[str]:
        """Its hook, which may take as long as the pod has. All pods are in one container here: so it is told which."""
        command = self.container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[0] == "python"
        return subprocess.run(
            [sys.executable, *command[1:], "--node", self.node_id()],
            env=self._cluster.environment, capture_output=True, text=True, check=False, timeout=self._grace,
        )  # fmt: skip

    def end(self) -> float:
        """preStop, then SIGTERM: seconds until it was gone. Raises where it would have been killed."""
        began = time.monotonic()
        hook = self.pre_stop()
        assert hook.returncode == 0, hook.stderr
        assert not self.works()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(self._grace - (time.monotonic() - began))
        return time.monotonic() - began

    def kill(self) -> None:
        """At the end of a test: everything at once."""
        if self.process.poll() is not None:
            return
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait(10)


class Cluster:
    """The head and the worker groups of a RayService, with `replicas` pods of each group as told."""

    def __init__(self, service: Manifest, place: Path, replicas: dict[str, int], environment: dict[str, str]) -> None:
        self.place = place
        self.directory = tempfile.mkdtemp(prefix="us-", dir="/tmp")  # Ray's sockets need a short path
        self.token = secrets.token_hex(16)
        self.gcs_port, self.dashboard_port = free_port(), free_port()
        self.ports = {name: free_port() for name in ("grpc", "metrics", "admin")}
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        spec = service["spec"]["rayClusterConfig"]
        told = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
        self.environment |= {e["name"]: e["value"] for e in told if e["name"].startswith("RAY_")}
        self.environment["UNDERSTUDY_CACHE"] = str(cache_dir().parent)
        self.environment |= {
            f"UNDERSTUDY_{'' if k == 'grpc' else k.upper() + '_'}PORT": str(v) for k, v in self.ports.items()
        }
        self.environment |= environment
        self.environment["PATH"] = f"{BIN}:{self.environment['PATH']}"
        self._config = service["spec"]["serveConfigV2"]
        self._started: list[Pod] = []
        self.pods: dict[str, list[Pod]] = {}
        try:
            self.head = self._start("head", spec["headGroupSpec"], head=True)
            for group in spec["workerGroupSpecs"]:
                name = group["groupName"]
                self.pods[name] = [self._start(f"{name}-{i}", group) for i in range(replicas[name])]
        except BaseException:
            self.stop()
            raise

    def _start(self, name: str, group: Manifest, head: bool = False) -> Pod:
        """Returns when it has started; one that ends instead is replaced, as Kubernetes would: on a busy machine Ray
        gives up after 30 s. One after the other, or all would starve each other."""
        for life in range(3):
            pod = Pod(self, f"{name}-{life}" if life else name, group, head)
            self._started.append(pod)
            until(lambda pod=pod: pod.process.poll() is not None or pod.probe("startupProbe") == 200, 240, name)
            if pod.process.poll() is None:
                return pod
        raise AssertionError(f"{name} does not start: {pod.log.read_text()[-2000:]}")

    def deploy(self, paths: dict[str, str]) -> None:
        """Hands the application to the head as KubeRay's operator does: the text of the manifest, with paths of pods
        as those of this machine."""
        text = self._config
        for inside, here in paths.items():
            text = text.replace(inside, here)
        body = json.dumps(yaml.safe_load(text)).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        url = f"http://127.0.0.1:{self.dashboard_port}/api/serve/applications/"
        with urlopen(Request(url, body, headers, method="PUT"), timeout=60) as answer:
            assert answer.status == 200

    def applications(self) -> dict[str, Any]:
        """What Serve says of them, as KubeRay's operator asks."""
        url = f"http://127.0.0.1:{self.dashboard_port}/api/serve/applications/"
        with urlopen(Request(url, headers={"Authorization": f"Bearer {self.token}"}), timeout=60) as answer:
            told: dict[str, Any] = json.load(answer)
        return told

    def logs(self) -> str:
        """For a failure's report."""
        session = Path(self.directory) / "session_latest" / "logs"
        files = sorted([*session.rglob("*understudy*"), *session.glob("worker*.err"), *self.place.glob("*.log")])
        return "\n".join(
            f"== {f}\n{f.read_text(errors='replace')[-2000:]}" for f in files if f.is_file() and f.stat().st_size
        )

    def stop(self) -> None:
        for pod in self._started:
            pod.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


def status(url: str) -> int:
    try:
        with urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except HTTPError as error:
        return int(error.code)
    except (URLError, OSError):
        return 0
