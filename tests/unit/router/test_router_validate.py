"""Whatever a client sends: one valid request, or an error that names the field."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_stage import EOS, VOCAB
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Metaspace

from router import choosing
from router.bounds import BOUNDS, Bound
from router.models import SamplingDefaults, ServedModel
from router.text import ModelText
from router.validate import ValidRequest, valid_request_id, validate
from understudy.errors import CannotResume, InvalidRequest, UnderstudyError
from understudy.v1 import inference_pb2 as pb
from workers.engine import Probe
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
        temperature=floats,
        top_k=counts,
        top_p=floats,
        min_p=floats,
        repetition_penalty=floats,
        presence_penalty=floats,
        frequency_penalty=floats,
        logit_bias=st.dictionaries(small, floats, max_size=3),
        bad_words=st.lists(st.text(max_size=9), max_size=3),
        n=counts,
        seed=counts,
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
        sequences=st.lists(
            st.builds(
                lambda i, t: pb.SequenceState(index=i, token_ids=t), st.integers(0, 2), st.lists(small, max_size=5)
            ),
            max_size=2,
        ),
    ),
    some(request_id=st.text(max_size=130), text=st.text(max_size=70), priority=st.integers(-200, 200))
    | some(token_ids=st.builds(lambda i: pb.TokenIds(ids=i), st.lists(small, max_size=70))),
)


@settings(max_examples=600, deadline=None)
@given(request_=requests)
def test_valid_or_refused_with_a_field(model: ServedModel, request_: pb.GenerateRequest) -> None:
    try:
        valid: ValidRequest | UnderstudyError = validate(request_, model, salt="t")
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
    assert all(index < valid.n and len(ids) <= valid.max_tokens for index, ids in valid.received.items())
    received = [i for ids in valid.received.values() for i in ids]
    biased = [i for i, _ in s.logit_bias]
    banned = [i for ids in s.bad_words for i in ids]
    ids = [*valid.prompt, *valid.stop_ids, *received, *valid.eos_ids, *biased, *banned]
    assert all(0 <= i < VOCAB for i in ids)
    assert all(1 <= len(ids) <= 16 for ids in s.bad_words)
    assert valid.cache_salt.split("\x1f")[0] == "t"
    engine = valid.to_engine("id", valid.n - 1, valid.received_of(0))
    assert (engine.prompt, engine.generated, engine.sampling) == (valid.prompt, valid.received_of(0), s)
    assert (engine.index, engine.prompt_logprobs) == (valid.n - 1, None)


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


def test_how_tokens_are_chosen_reaches_the_engine(model: ServedModel) -> None:
    sampling = pb.Sampling(
        n=3, repetition_penalty=1.5, presence_penalty=-1, frequency_penalty=0.5, logit_bias={9: 2.0, 3: -100.0}
    )
    response = pb.ResponseOptions(
        prompt_logprobs=2, trace=True, trace_options=pb.TraceOptions(candidates=0, attention_layers=[1, 0, 1])
    )
    valid = validate(pb.GenerateRequest(text="hi", sampling=sampling, response=response), model)
    first = valid.to_engine("a", 0, [], "family", True)
    last = valid.to_engine("c", 2, [5], "family")
    s = first.sampling
    assert (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (1.5, -1, 0.5)
    assert s.logit_bias == [(3, -100.0), (9, 2.0)]
    assert (first.index, first.generated, first.family, first.prompt_logprobs) == (0, [], "family", 2)
    assert (last.index, last.generated, last.family, last.prompt_logprobs) == (2, [5], "family", None)
    assert first.probe == last.probe == Probe(0, True, [0, 1])
    plain = validate(pb.GenerateRequest(text="hi", response=pb.ResponseOptions(trace=True)), model)
    assert plain.probe == Probe(10, True, [])
    assert validate(pb.GenerateRequest(text="hi"), model).probe is None


def test_layers_that_the_model_does_not_have(model: ServedModel) -> None:
    known = dataclasses.replace(model, info=msgspec.structs.replace(model.info, layers=4))
    response = pb.ResponseOptions(trace=True, trace_options=pb.TraceOptions(attention_layers=[3, 4]))
    with pytest.raises(InvalidRequest, match=r"attention_layers: names layer 4; the model has 4, counted from 0"):
        validate(pb.GenerateRequest(text="hi", response=response), known)


def test_bad_words_are_spelled_with_and_without_a_space(model: ServedModel) -> None:
    words = choosing.bad_words(["ab", " ab", "ab"], model.text)
    assert words == [[*b"ab"], [*b" ab"], [*b"  ab"]]


def test_bad_words_where_a_tokenizer_puts_a_space_before_a_text() -> None:
    """SentencePiece's way: what is spelled at the beginning is not what is spelled within a line."""
    tokens = ["<unk>", "▁", "a", "b", "▁a", "\n", "▁\n"]
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, [("▁", "a"), ("▁", "\n")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = MetaspaceDecoder()
    text = ModelText(tokenizer.to_str().encode())
    assert choosing.bad_words(["ab"], text) == [[4, 3], [2, 3]]


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
