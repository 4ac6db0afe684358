"""A request that real replicas die of: it is found and refused, and its batch mates have the answers that they always
have."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from service_process import idle, running, until
from streams import RETRY, Answer

from understudy.client import Client
from understudy.errors import InternalError
from understudy.v1 import admin_pb2

POISON = [7, 11, 13]
MATES = 6
# Read by every Python process of the service as it starts. Stands for a fault of the machine or of a kernel.
FATE = f"""
import importlib.abc, importlib.util, os, signal, sys


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "workers.engine.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def load_and_doom(module):
            load(module)
            doom(module.EngineCore)

        spec.loader.exec_module = load_and_doom
        return spec


def doom(engine):
    add, step, doomed = engine.add, engine.step, []

    def add_and_see(self, request):
        add(self, request)
        if list(request.prompt) == {POISON}:
            doomed.append(0)

    def step_or_die(self):
        if doomed:
            doomed.append(0)
        if len(doomed) > 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    engine.add, engine.step = add_and_see, step_or_die


sys.meta_path.insert(0, Finder())
"""


def ask(client: Client, seed: int) -> Answer:
    with client.generate([1, 2, seed], seed=seed, temperature=1.0, max_tokens=250, ignore_eos=True) as stream:
        for _ in stream:
            pass
        return Answer.of(stream.completion())


@pytest.mark.timeout(600)
def test_only_the_killer_is_refused(tmp_path: Path, text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fate").mkdir()
    (tmp_path / "fate" / "sitecustomize.py").write_text(FATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fate"))
    flags = ["--model", str(text_model), "--replicas", "2", "--threads", "1", "--dtype", "float32"]
    with running(tmp_path, [*flags, "--gateways", "2", "--redis-url", "none"]) as service:
        service.wait_until_ready()
        leaders = {p.pid for p in service.status().processes if p.role == "shard"}
        with Client(service.address, retry=RETRY) as client:
            expected = [ask(client, seed) for seed in range(MATES)]
            answers: list[Answer | None] = [None] * MATES
            stop = threading.Event()

            def play(seed: int) -> None:
                while not stop.is_set():
                    answers[seed] = ask(client, seed)
                    if answers[seed] != expected[seed]:
                        return

            mates = [threading.Thread(target=play, args=(seed,), daemon=True) for seed in range(MATES)]
            for mate in mates:
                mate.start()
            try:
                with pytest.raises(InternalError, match="is not tried again: 2 times its replica failed"):
                    for _ in client.generate(POISON, max_tokens=50):
                        pass
            finally:
                stop.set()
                for mate in mates:
                    mate.join(300)
            assert answers == expected
        until(lambda: sum(r.state == admin_pb2.REPLICA_STATE_READY for r in service.status().replicas) == 2)
        now = {p.pid for p in service.status().processes if p.role == "shard"}
        assert not leaders & now, "each of the first two had to die"
        assert service.metric("understudy_router_suspects") == 0
        until(lambda: idle(service.status()))
        assert service.stop()[-1] == "understudy: stopped"
