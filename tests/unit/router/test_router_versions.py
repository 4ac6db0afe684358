"""Versions of a model while an upgrade rolls, and models that have no replica yet."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import grpc
import pytest
from router_stage import VOCAB, Stage, until

from router.dispatch import Patience
from router.models import SamplingDefaults, ServedModel
from router.text import ModelText
from router.versions import Models
from understudy.errors import InvalidRequest, ModelNotFound
from understudy.v1 import inference_pb2 as pb
from workers.engine.fake import FakeEngine


def version(text: ModelText, fingerprint: str, name: str = "fake") -> ServedModel:
    engine = FakeEngine(vocab_size=VOCAB, max_context=256, fingerprint=fingerprint, model=name)
    return ServedModel(engine.info, text, SamplingDefaults())


def waiting(stage: Stage) -> int:
    """Requests that the router has no replica for."""
    return sum(d.unserved for d in stage.router.router.demand().values())


def test_new_requests_are_spread_as_replicas_are(text: ModelText) -> None:
    models = Models([version(text, "old")], random.Random(1))
    models.put(version(text, "new"), order=2)
    models.weigh({("fake", "old"): 3, ("fake", "new"): 1})
    found = [models.find("fake").info.model_fingerprint for _ in range(1000)]
    assert 650 < found.count("old") < 850
    assert models.all()[0].info.model_fingerprint == "new"
    assert models.find("fake", "old").info.model_fingerprint == "old", "a stream that goes on keeps its version"
    assert not models.superseded("fake", "old")
    models.weigh({("fake", "new"): 4})
    assert {models.find("fake").info.model_fingerprint for _ in range(20)} == {"new"}
    assert models.superseded("fake", "old")
    models.weigh({})
    assert models.find("").info.model_fingerprint == "new"
    assert not models.superseded("fake", "old"), "nobody is there: it may come back"
    models.keep("fake", set())
    assert not models.has("fake", "old")
    assert models.has("fake", "new")


def test_names_are_those_that_are_expected(text: ModelText) -> None:
    models = Models()
    models.expect({"fake"})
    assert models.missing("fake")
    assert models.missing("")
    assert not models.missing("else")
    models.put(version(text, "x"))
    assert not models.missing("fake")
    models.put(version(text, "y", "other"))
    with pytest.raises(InvalidRequest, match="2 models are served"):
        models.find("")
    models.expect({"other"})
    with pytest.raises(ModelNotFound):
        models.find("fake")


async def test_a_request_whose_version_is_gone_is_taken_for_another(stage: Stage) -> None:
    """It was checked for the old version, and before it found a place the last old replica went."""
    stage.add_replica("old", fingerprint="old")
    gateway = await stage.open(patience=Patience(first=30.0, retry=0.01))
    stage.router.router.drain("old", 1)
    call = asyncio.create_task(stage.generate(text="hi"))
    await until(lambda: waiting(stage) == 1)
    new = stage.add_replica("new", fingerprint="new")
    gateway.put_model(replace(gateway.models.all()[0], info=new.loop.info), order=1)
    await gateway.refresh()
    answer = await call
    assert answer.infos[0].model_fingerprint == "new"
    assert answer.reason in ("LENGTH", "EOS")


async def test_a_new_replica_gets_nothing_that_was_checked_for_the_old(stage: Stage) -> None:
    stage.add_replica("old", fingerprint="old")
    await stage.open()
    stage.add_replica("new", fingerprint="new")  # its texts are not known yet
    for _ in range(8):
        assert (await stage.generate(text="hi")).infos[0].model_fingerprint == "old"


async def test_a_model_without_a_replica_is_waited_for(stage: Stage) -> None:
    gateway = await stage.open(serve_models=False, patience=Patience(first=30.0, retry=0.01, most_retry=0.01))
    stage.router.lose("r0")
    gateway.models.expect({"fake"})
    gateway.can_start = True
    await gateway.refresh()
    calls = [asyncio.create_task(stage.generate(text="hi", model=name)) for name in ("", "fake")]
    await until(lambda: waiting(stage) == 2)
    replica = stage.add_replica("r1")
    gateway.put_model(ServedModel(replica.loop.info, stage.text, SamplingDefaults()))
    for call in calls:
        assert (await call).finishes
    assert waiting(stage) == 0
    with pytest.raises(grpc.aio.AioRpcError, match="no model named"):
        await stage.generate(pb.GenerateRequest(text="hi", model="else"))
