"""How soon what is wrong shows: seconds from a process's death or standstill until health names it.

    python bench/health.py

A real service: a small model over two ranks, the bundled mixture with its experts on two hosts. Each kind of process is
killed, or stopped for good, `--times` times; an answer streams meanwhile. Measured until the gateway's `grpc.health.v1`
has the trouble in its words. Writes bench/results/health.md.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "chaos"), str(ROOT / "tests")]

from faults import Target, missing, targets  # noqa: E402
from service_process import Service, running  # noqa: E402
from streams import RETRY  # noqa: E402

from understudy.client import Client  # noqa: E402

CASES = (
    ("leader", signal.SIGKILL), ("shard", signal.SIGKILL), ("supervisor", signal.SIGKILL),
    ("expert host", signal.SIGKILL), ("leader", signal.SIGSTOP), ("shard", signal.SIGSTOP),
)  # fmt: skip
WANTED = {"shared": 1, "demo": 1}


def trouble(service: Service) -> str:
    with grpc.insecure_channel(service.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)  # type: ignore[no-untyped-call]
        _, call = stub.Check.with_call(health_pb2.HealthCheckRequest(service=""), timeout=10)
    return dict(call.trailing_metadata() or ()).get("understudy-trouble", "")


def whole(service: Service, killed: set[int]) -> bool:
    return not missing(service, WANTED, killed, gateways=1, hosts=2) and not trouble(service)


def wait(condition, seconds: float = 180.0) -> None:  # type: ignore[no-untyped-def]
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"not within {seconds:g} s")
        time.sleep(0.02)


def struck(service: Service, target: Target, number: signal.Signals) -> tuple[float, str]:
    """Seconds until it shows, and the words."""
    begun, said = time.monotonic(), ""
    os.kill(target.pid, number)
    while not said:
        said = trouble(service)
    took = time.monotonic() - begun
    if number == signal.SIGSTOP:
        os.kill(target.pid, signal.SIGCONT)
    wait(lambda: whole(service, {target.pid} if number == signal.SIGKILL else set()))
    return took, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument(
        "--text", type=Path, default=ROOT / "models/demo", help="checkpoint of the model over two ranks"
    )
    args = parser.parse_args()
    models = {
        "shared": {"path": str(args.text), "dtype": "float32", "tensor_parallel": 2, "threads": 1},
        "demo": {"path": str(ROOT / "models/demo"), "expert_hosts": 2, "threads": 1},
    }
    lines = ["| what happens | shows after, median | longest | in these words |", "|---|--:|--:|---|"]
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "service.yaml"
        config.write_text(json.dumps({"models": models}))
        with running(Path(place), ["--config", str(config)]) as service:
            service.wait_until_ready()
            stopping = threading.Event()
            readers = [threading.Thread(target=read, args=(service, model, stopping)) for model in models]
            for reader in readers:
                reader.start()
            for kind, number in CASES:
                found = []
                for _ in range(args.times):
                    wait(lambda: whole(service, set()))
                    candidates = [t for t in targets(service) if t.kind == kind]
                    of_group = [t for t in candidates if t.place.startswith("shared")]
                    found.append(struck(service, (of_group or candidates)[0], number))
                    print(f"{kind} {number.name}: {found[-1][0]:.2f} s: {found[-1][1]}", flush=True)
                times = [took for took, _ in found]
                verb = "is killed" if number == signal.SIGKILL else "stands still"
                lines.append(
                    f"| a {kind} {verb} | {statistics.median(times):.2f} s | {max(times):.2f} s | {found[0][1]} |"
                )
            stopping.set()
            for reader in readers:
                reader.join()
            service.stop()
    text = f"# bench/health.py\n\nMade by `python bench/health.py --times {args.times}`.\n\n" + "\n".join(lines) + "\n"
    (ROOT / "bench/results/health.md").write_text(text)
    print(text)


def read(service: Service, model: str, stopping: threading.Event) -> None:
    with Client(service.address, retry=RETRY) as client:
        while not stopping.is_set():
            client.complete([1, 2, 3], model=model, temperature=0.0, max_tokens=200, ignore_eos=True)


if __name__ == "__main__":
    main()
