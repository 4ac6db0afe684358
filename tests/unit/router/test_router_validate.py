"""Whatever a client sends: one valid request, or an error that names the field."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_stage import EOS, VOCAB

from router.models import SamplingDefaults, ServedModel
from router.text import ModelText
from router.validate import BOUNDS, Bound, ValidRequest, valid_request_id, validate
from understudy.errors import CannotResume, InvalidRequest, UnderstudyError
from understudy.v1 import inference_pb2 as pb
from workers.engine.fake import FakeEngine

CONTEXT = 64


@pytest.fixture(scope="module")
def model(text: ModelText) -> ServedModel:
    info = FakeEngine(vocab_size=VOCAB, max_context=CONTEXT).info
    return ServedModel(info, text, SamplingDefaults(temperature=0.5, top_k=7, eos_token_ids=(EOS,)))


floats = st.floats(width=32)
small = st.integers(0, VOCAB + 2)
counts = st.integers(0, 2**32 - 1) | st.integers(0, 30)


def some(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


requests = st.builds(
    lambda sampling, stopping, response, kv, resume, rest: pb.GenerateRequest(
        sampling=pb.Sampling(**sampling),
        stopping=pb.Stopping(**stopping),
        response=pb.ResponseOptions(**response),
        kv=pb.KvOptions(**kv),
        resume=pb.Resume(**resume) if resume is not None else None,
        **rest,
    ),
    some(
        temperature=floats, top_k=counts, top_p=floats, min_p=floats, repetition_penalty=floats, n=counts, seed=counts
    ),
    some(
        max_tokens=counts,
        min_tokens=counts,
        stop=st.lists(st.text(max_size=4), max_size=3),
        stop_token_ids=st.lists(small, max_size=3),
        ignore_eos=st.booleans(),
        include_stop=st.booleans(),
    ),
    some(logprobs=counts, prompt_logprobs=counts, echo=st.booleans(), token_ids=st.booleans(), trace=st.booleans()),
    some(cache_salt=st.text(max_size=300), bypass_prefix_cache=st.booleans()),
    st.none()
    | some(
        model_fingerprint=st.sampled_from(["fake", "other"]),
        numerics_id=st.just("fake"),
        prompt_token_ids=st.lists(small, max_size=5),
        seed=counts,
        sequences=st.lists(st.builds(lambda i: pb.SequenceState(token_ids=i), st.lists(small, max_size=5)), max_size=2),
    ),
    some(request_id=st.text(max_size=130), text=st.text(max_size=70), priority=st.integers(-200, 200))
    | some(token_ids=st.builds(lambda i: pb.TokenIds(ids=i), st.lists(small, max_size=70))),
)


@settings(max_examples=600, deadline=None)
@given(request_=requests)
def test_valid_or_refused_with_a_field(model: ServedModel, request_: pb.GenerateRequest) -> None:
    try:
        valid: ValidRequest | UnderstudyError = validate(request_, model, tenant="t")
    except (InvalidRequest, CannotResume) as error:
        valid = error
    if isinstance(valid, UnderstudyError):
        assert len(str(valid)) < 600
        if isinstance(valid, InvalidRequest):
            assert valid.field
            assert str(valid).startswith(valid.field)
        else:
            assert request_.resume.model_fingerprint != "fake" or request_.resume.numerics_id != "fake"
        return
    s = valid.sampling
    for name, value in (("temperature", s.temperature), ("top_p", s.top_p), ("min_p", s.min_p), ("top_k", s.top_k)):
        assert value in BOUNDS[f"sampling.{name}"]
    assert len(valid.prompt) >= 1
    assert len(valid.prompt) + valid.max_tokens <= CONTEXT
    assert 1 <= valid.max_tokens >= valid.min_tokens
    assert len(valid.received) <= valid.max_tokens
    assert all(0 <= i < VOCAB for i in [*valid.prompt, *valid.stop_ids, *valid.received, *valid.eos_ids])
    assert valid.cache_salt.split("\x1f")[0] == "t"
    engine = valid.to_engine("id", valid.received)
    assert (engine.prompt, engine.generated, engine.sampling) == (valid.prompt, valid.received, s)


def test_defaults_are_filled_in(model: ServedModel) -> None:
    valid = validate(pb.GenerateRequest(text="hi"), model, draw=lambda: 42)
    assert (valid.sampling.temperature, valid.sampling.top_k, valid.sampling.seed) == (0.5, 7, 42)
    assert (valid.max_tokens, valid.min_tokens, valid.eos_ids, valid.want_token_ids) == (CONTEXT - 2, 0, [EOS], True)
    assert (valid.logprobs, valid.cache_salt, valid.pinned) == (None, "", None)
    assert len(valid.request_id) == 16
    given_ = validate(pb.GenerateRequest(text="hi", sampling=pb.Sampling(temperature=0, top_k=0, seed=0)), model)
    assert (given_.sampling.temperature, given_.sampling.top_k, given_.sampling.seed) == (0, 0, 0)
    assert validate(pb.GenerateRequest(text="hi", stopping=pb.Stopping(ignore_eos=True)), model).eos_ids == []
    zero = validate(pb.GenerateRequest(text="hi", response=pb.ResponseOptions(logprobs=0)), model)
    assert zero.logprobs == 0


def test_seeds_are_drawn_apart(model: ServedModel) -> None:
    seeds = {validate(pb.GenerateRequest(text="hi"), model).sampling.seed for _ in range(50)}
    assert len(seeds) == 50
    assert all(0 <= s < 2**63 for s in seeds)


def test_neutral_values_of_what_is_not_served_are_accepted(model: ServedModel) -> None:
    sampling = pb.Sampling(n=1, repetition_penalty=1, presence_penalty=0, frequency_penalty=0)
    response = pb.ResponseOptions(echo=False)
    assert validate(pb.GenerateRequest(text="hi", sampling=sampling, response=response), model)


def test_a_stream_goes_on_where_any_replica_is_its_own(model: ServedModel) -> None:
    """Replicas of one model may differ in arithmetic: one that matches is enough."""
    infos = [FakeEngine(numerics_id=n).info for n in ("x", "y")]
    resume = pb.Resume(model_fingerprint="fake", numerics_id="y", prompt_token_ids=[1])
    valid = validate(pb.GenerateRequest(text="hi", resume=resume), model, infos=infos)
    assert (valid.pinned, valid.prompt) == (("fake", "y"), [1])
    resume.numerics_id = "z"
    with pytest.raises(CannotResume, match=r"resume\.numerics_id: is 'z', here it is 'x' or 'y'"):
        validate(pb.GenerateRequest(text="hi", resume=resume), model, infos=infos)
    resume.numerics_id = "y"
    with pytest.raises(InvalidRequest, match="differs from token_ids"):
        validate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2]), resume=resume), model, infos=infos)


def test_bounds_and_ids() -> None:
    assert 0 in Bound(0, 1)
    assert 0 not in Bound(0, 1, open_low=True)
    assert math.inf not in Bound(0, math.inf)
    assert valid_request_id("a b~") == "a b~"
    for bad in ("\x7f", "é", "a\tb", "x" * 129):
        with pytest.raises(InvalidRequest, match="request_id"):
            valid_request_id(bad)
