"""Other models for a service that runs: what is handed to Serve, what is said, and what holds afterwards."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

from cluster.catalog import Catalog, Known
from cluster.config import ServiceConfig, load
from cluster.console import Console
from cluster.directory import Directory
from cluster.plan import Plan, ReplicaPlan, make_plan
from cluster.renewal import Renewal
from cluster.roster import Member
from cluster.signals import Signals, Stopped


class Serve:
    """What Serve was told. Models in `broken` cannot be started."""

    def __init__(self) -> None:
        self.told: list[tuple[list[str], list[str]]] = []
        self.plans: list[ReplicaPlan] = []
        self.broken: set[str] = set()

    def redeploy(self, plans: Sequence[ReplicaPlan], gone: Iterable[str] = ()) -> None:
        self.told.append(([p.model for p in plans], sorted(gone)))
        self.plans += plans

    def settled(self, models: Iterable[str]) -> dict[str, bool]:
        return {m: m not in self.broken for m in models}


class Stage:
    def __init__(self, place: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.place, self.serve, self.said = place, Serve(), list[str]()
        for name in ("one", "two"):
            shutil.copytree(checkpoint, place / name)
        monkeypatch.setattr("cluster.renewal.app", self.serve)
        monkeypatch.setattr("cluster.renewal.read_spec", lambda _path: None)
        self.catalogs: list[Catalog] = []
        self.directory = create_autospec(Directory, instance=True)
        self.directory.exchange_now.side_effect = lambda c: (self.catalogs.append(c), Known(c))[1]
        self.directory.members_now.return_value = [Member("h", "replica", "failed", (), model="a", error="no weights")]
        console = create_autospec(Console, instance=True)
        console.say.side_effect = self.said.append
        self.config = self.of(a="one", b="one")
        self.plan = make_plan(self.config, 2)
        self.signals = Signals()
        self.renewal = Renewal(self.config, lambda: self.config, console, self.signals)

    def of(self, **models: str) -> ServiceConfig:
        return load({"model": [f"{name}={self.place / directory}" for name, directory in models.items()]})

    def renew(self, **models: str) -> Plan:
        self.config = self.of(**models)
        self.plan = self.renewal.run(self.plan, self.directory)
        return self.plan

    def models(self) -> dict[str, str]:
        """The checkpoint of each model by the present plan."""
        return {p.model: Path(p.engine.model_dir).name for p in self.plan.replicas}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (checkpoint / name).write_text("{}")
    return Stage(tmp_path, checkpoint, monkeypatch)


def test_what_changed_is_handed_over_and_said(stage: Stage) -> None:
    stage.renew(a="two", c="one")
    assert stage.serve.told == [(["a", "c"], ["b"])]
    assert [p.upgrade for p in stage.serve.plans] == [True, False]
    assert stage.said == [
        "understudy: a is renewed", "understudy: c is renewed", "understudy: b is no longer served",
    ]  # fmt: skip
    assert [list(c.models) for c in stage.catalogs] == [["a", "c"]]
    stage.renew(a="two", c="one")
    assert len(stage.serve.told) == 1
    assert stage.said[-1] == "understudy: no model has changed"


def test_what_cannot_be_started_goes_back(stage: Stage) -> None:
    stage.serve.broken = {"a"}
    stage.renew(a="two", b="two")
    assert stage.serve.told == [(["a", "b"], []), (["a"], [])]
    assert stage.said == ["understudy: b is renewed", "error: a: no weights; the old one stays"]
    assert stage.models() == {"a": "one", "b": "two"}
    assert {m.name: m.path.name for m in stage.plan.gateway.config.models} == {"a": "one", "b": "two"}
    stage.serve.broken = set()
    stage.renew(a="two", b="two")  # once it was mended
    assert stage.serve.told[-1] == (["a"], [])
    assert stage.models() == {"a": "two", "b": "two"}


def test_a_new_model_that_cannot_be_started_is_not_served(stage: Stage) -> None:
    stage.serve.broken = {"c"}
    stage.renew(a="one", b="one", c="two")
    assert stage.serve.told == [(["c"], []), ([], ["c"])]
    assert stage.said[-1] == "error: c: its replicas do not start; it is not served"
    assert stage.models() == {"a": "one", "b": "one"}
    assert list(stage.catalogs[-1].models) == ["a", "b"]


def test_a_wrong_configuration_changes_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stage.plan
    (stage.place / "two" / "tokenizer.json").unlink()
    assert stage.renew(a="two", b="one") is before
    assert stage.serve.told == []
    (said,) = stage.said
    assert said.startswith("error: ")
    assert said.endswith("; nothing was changed")


def test_what_has_to_wait_is_named(stage: Stage) -> None:
    stage.config = stage.config.model_copy(update={"port": 7})
    stage.renewal.run(stage.plan, stage.directory)
    assert stage.said == ["warning: port will be taken at the next start", "understudy: no model has changed"]


def test_a_stop_while_it_rolls_is_a_stop(stage: Stage) -> None:
    def ask_to_stop(_models: Any) -> dict[str, bool]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    stage.serve.settled = ask_to_stop  # type: ignore[method-assign]
    with stage.signals, pytest.raises(Stopped):
        stage.renew(a="two", b="one")


def test_signals_ask_for_different_things() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with Signals(reloads=True) as signals:
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.wait()
        signals.check()
        os.kill(os.getpid(), signal.SIGINT)
        assert not signals.wait()
        with pytest.raises(Stopped):
            signals.check()
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGHUP) is before
    with Signals():
        assert signal.getsignal(signal.SIGHUP) is before, "without a file it means what it always means"
