"""A model gets another checkpoint while requests run. A service of its own, which is killed at last."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from service_process import Service, alive, make_tiny_llama, running, until

from understudy.client import Client

LENGTH = 150
WAY_OUT = "give one that holds a Hugging Face checkpoint; nothing was changed"
SEEDS = range(4)


def answer(client: Client, seed: int, tokens: int = LENGTH) -> tuple[int, ...]:
    done = client.complete([1, 2], model="text", seed=seed, temperature=1.0, max_tokens=tokens, ignore_eos=True)
    return done.choices[0].token_ids


class Load:
    """Clients that ask again and again, each with a seed of its own, and what they got."""

    def __init__(self, service: Service) -> None:
        self.answers: list[tuple[int, tuple[int, ...]]] = []
        self.errors: list[Exception] = []
        self._service = service
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in SEEDS]

    def _ask(self, seed: int) -> None:
        with self._service.client(token=None) as client:
            while not self._ended.is_set():
                try:
                    self.answers.append((seed, answer(client, seed)))
                except Exception as error:  # a thread has no caller: the test looks at them
                    self.errors.append(error)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(120)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("upgrade")
    for name, layers in (("old", 2), ("new", 3)):
        (place / name).mkdir()
        make_tiny_llama(place / name, num_hidden_layers=layers)
    shutil.copytree(place / "new", place / "broken")
    weights = place / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return place


def write(place: Path, checkpoint: str) -> Path:
    model = {"path": str(place / checkpoint), "dtype": "float32", "replicas": 2, "threads": 1}
    file = place / "service.yaml"
    file.write_text(json.dumps({"models": {"text": model}, "redis_url": "none", "drain_seconds": 0}))
    return file


@pytest.fixture(scope="module")
def service(place: Path) -> Iterator[Service]:
    with running(place, ["--config", str(write(place, "old"))]) as made:
        made.wait_until_ready()
        yield made
        if made.process.poll() is None:
            assert made.stop()[-1] == "understudy: stopped"


def renew(service: Service, place: Path, checkpoint: str) -> None:
    write(place, checkpoint)
    os.kill(service.process.pid, signal.SIGHUP)


def fingerprints(service: Service) -> set[str]:
    (model,) = service.status().models
    return {model.model_fingerprint} if model.versions == 1 else set()


def test_each_stream_is_answered_by_one_model_and_none_breaks(service: Service, place: Path) -> None:
    with service.client(token=None) as client:
        before = {seed: answer(client, seed) for seed in SEEDS}
        (old,) = fingerprints(service)
        long = client.generate([1, 2], model="text", seed=0, temperature=1.0, max_tokens=500, ignore_eos=True)
        next(long)
        with Load(service) as load:
            until(lambda: len(load.answers) > len(SEEDS))
            renew(service, place, "new")
            service.read_until("understudy: text is renewed")
            for _ in long:
                pass
            until(lambda: fingerprints(service) - {old})
            asked = len(load.answers)
            until(lambda: len(load.answers) > asked + 2 * len(SEEDS) or load.errors)
        after = {seed: answer(client, seed) for seed in SEEDS}
        assert load.errors == []
        assert all(before[seed] != after[seed] for seed in SEEDS)
        for seed, tokens in load.answers:
            assert tokens in (before[seed], after[seed]), "an answer of two models"
        assert {tokens == after[seed] for seed, tokens in load.answers} == {True, False}
        told = long.completion().choices[0].token_ids
        assert (len(told), told[:LENGTH]) == (500, before[0])


def test_what_did_not_change_is_left_alone(service: Service, place: Path) -> None:
    processes = {(p.role, p.pid) for p in service.status().processes}
    os.kill(service.process.pid, signal.SIGHUP)
    service.read_until("understudy: no model has changed")
    assert {(p.role, p.pid) for p in service.status().processes} == processes


def test_a_checkpoint_that_cannot_be_loaded_changes_nothing(service: Service, place: Path) -> None:
    (now,) = fingerprints(service)
    with service.client(token=None) as client:
        expected = answer(client, 3)
        renew(service, place, "broken")
        said = service.read_until("error: .*")
        assert "model.safetensors" in said
        assert said.endswith("the old one stays")
        assert answer(client, 3) == expected
        until(lambda: fingerprints(service) == {now} and service.status().models[0].replicas_ready == 2)
        assert answer(client, 3) == expected
    renew(service, place, "nowhere")
    assert service.read_until("error: .*").endswith("no such directory; " + WAY_OUT)


def test_a_killed_service_leaves_no_process(service: Service) -> None:
    started, directory = service.processes(), service.directory
    assert len(started) > 5
    service.process.kill()
    service.process.wait(10)
    until(lambda: not alive(started))
    until(lambda: not directory.exists())
