"""The whole service, from a client's and an operator's side."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from service_process import TOKEN, UNDERSTUDY, Service, idle, until

from understudy import errors
from understudy.client import Client
from understudy.types import FinishReason, Health, Usage
from understudy.v1 import inference_pb2 as pb

GENERATE = "/understudy.v1.Inference/Generate"


@pytest.fixture
def golden(oracles: Path) -> tuple[list[int], list[int]]:
    told = json.loads((oracles / "weights" / "stories260K-hf" / "golden_greedy.json").read_text())
    return told["prompt_ids"], told["greedy_ids"]


def greedy(client: Client, prompt: list[int], tokens: int) -> tuple[int, ...]:
    done = client.complete(prompt, model="text", temperature=0.0, max_tokens=tokens, ignore_eos=True, timeout=120)
    return done.choices[0].token_ids


def test_a_completion_is_streamed(service: Service) -> None:
    with service.client() as client:
        pieces = list(client.generate("Once upon a time", model="text", temperature=0.0, max_tokens=20, timeout=60))
        again = client.complete("Once upon a time", model="text", temperature=0.0, max_tokens=20, timeout=60)
    assert len(pieces) > 1
    assert "".join(p.text for p in pieces) == again.choices[0].text
    assert sum(len(p.token_ids) for p in pieces) == 20
    assert again.choices[0].finish.reason is FinishReason.LENGTH


def test_the_golden_ids_in_one_request(service: Service, golden: tuple[list[int], list[int]]) -> None:
    prompt, ids = golden
    with service.client() as client:
        assert list(greedy(client, prompt, len(ids))) == ids


def test_the_golden_ids_in_sixteen_at_once(service: Service, golden: tuple[list[int], list[int]]) -> None:
    prompt, ids = golden
    with ThreadPoolExecutor(16) as pool, service.client() as client:
        answers = list(pool.map(lambda _: greedy(client, prompt, len(ids)), range(16)))
    assert all(list(a) == ids for a in answers)


def test_models_and_tokens(service: Service) -> None:
    with service.client() as client:
        named = {m.name: m for m in client.models()}
        assert "text" in named
        assert named["text"].dtype == "float32"
        ids = client.tokenize("Once upon", model="text", add_special_tokens=False).token_ids
        assert client.detokenize(ids, model="text").strip() == "Once upon"
        assert client.health() is Health.SERVING


def test_the_bundled_model_answers_too(service: Service) -> None:
    with service.client() as client:
        if "demo" not in {m.name for m in client.models()}:
            pytest.skip("models/demo has no weights here")
        text = client.complete("The cat sat on the", model="demo", max_tokens=8, temperature=0.0, timeout=60)
    assert text.choices[0].text


def test_four_answers_to_one_prompt_with_all_that_can_be_told(service: Service) -> None:
    """Chosen with penalties, without a word that would come first, and the same again."""
    prompt, options = "I eat an apple and a", {
        "model": "demo", "temperature": 0.8, "top_p": 1.0, "seed": 5, "max_tokens": 10, "ignore_eos": True,
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": {34: -2.0},
        "bad_words": ["banana"], "prompt_logprobs": 2, "logprobs": 1, "echo": True, "trace": True,
        "trace_candidates": 3, "trace_attention": [5], "timeout": 60,
    }  # fmt: skip
    with service.client() as client:
        if "demo" not in {m.name for m in client.models()}:
            pytest.skip("models/demo has no weights here")
        done = client.complete(prompt, n=4, **options)
        again = client.complete(prompt, n=4, **options)
        alone = client.complete(prompt, **options)
        free = client.complete(prompt, model="demo", temperature=0.0, max_tokens=1, timeout=60)
    assert free.text == " banana"
    assert len(done.choices) == 4
    assert len({c.token_ids for c in done.choices}) > 1
    for choice in done.choices:
        assert choice.text.startswith(prompt)
        assert "banana" not in choice.text
        assert len(choice.token_ids) == len(choice.logprobs) == len(choice.traces) == 10
        assert choice.finish.usage == Usage(6, 10)
        for place, (id, trace) in enumerate(zip(choice.token_ids, choice.traces, strict=True)):
            assert trace.token_id == id
            assert next(c for c in trace.candidates if c.token_id == id).after > 0
            assert [e.layer for e in trace.experts] == list(range(6))
            assert [len(e.experts) for e in trace.experts] == [2] * 6
            (attention,) = trace.attention
            assert (attention.layer, attention.start, len(attention.weights)) == (5, 0, 6 + place)
            assert sum(attention.weights) == pytest.approx(1, abs=0.02)
    assert again.choices == done.choices
    assert alone.choices == done.choices[:1]
    told = done.prompt.prompt_logprobs
    assert [p.token_id for p in told] == list(done.prompt.prompt_token_ids[1:])
    assert all(p.logprob < 0 and len(p.top) == 2 for p in told)
    assert again.prompt.prompt_logprobs == alone.prompt.prompt_logprobs == told


def test_both_gateways_carry_calls(service: Service) -> None:
    before = service.metric("understudy_requests_total")
    for _ in range(24):  # a new connection each: the kernel shares them out
        with service.client() as client:
            client.models()
    assert service.metric("understudy_requests_total") >= before + 24
    gateways = [p for p in service.status().processes if p.role == "gateway"]
    assert len({p.pid for p in gateways}) == 2


def test_status_tells_operators_what_stands_where(service: Service) -> None:
    said = subprocess.run(
        [UNDERSTUDY, "status", "--json", "--admin", service.admin], capture_output=True, text=True, check=True
    )
    status = json.loads(said.stdout)
    models = {m["name"]: m for m in status["models"]}
    assert (models["text"]["replicas_ready"], models["text"]["replicas_wanted"]) == (2, 2)
    assert models["text"]["model_fingerprint"]
    replicas = {r["id"]: r for r in status["replicas"]}
    assert {"text-0", "text-1"} <= set(replicas)
    assert replicas["text-0"]["state"] == "REPLICA_STATE_READY"
    assert replicas["text-0"]["cache"]["blocks_total"] > 0
    roles = [p["role"] for p in status["processes"]]
    assert roles.count("router") == 1
    assert roles.count("gateway") == 2
    assert roles.count("replica") == len(replicas)
    assert roles.count("shard") == len(replicas) + 1, "`shared` has two ranks"
    ours = {p.pid for p in service.processes()}
    assert {p["pid"] for p in status["processes"]} <= ours


def test_its_processes_yield_to_nobody(service: Service) -> None:
    """Ray makes workers nicer than the rest of the machine unless it is told not to."""
    assert {p.nice() for p in service.processes()} == {psutil.Process(service.process.pid).nice()}


def test_metrics_of_gateways_and_replicas(service: Service) -> None:
    with service.client() as client:
        made = service.metric("understudy_completion_tokens_total")
        greedy(client, [1, 2, 3], 10)
    assert service.metric("understudy_completion_tokens_total") == made + 10
    assert service.metric("understudy_ready_replicas") >= 4, "each gateway has a wire to each replica"
    assert service.metric("understudy_replica_blocks") > 0
    until(lambda: service.metric("understudy_replica_generated_tokens_total") >= 10)


def test_a_client_that_goes_away_before_its_first_token_frees_its_blocks(service: Service) -> None:
    with service.client() as client:
        streams = [client.generate([5 + i] * 200, model="text", max_tokens=300, timeout=60) for i in range(8)]
        for stream in streams:
            stream.cancel()
    until(lambda: idle(service.status()))
    with service.client() as client:
        assert len(greedy(client, [1], 5)) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, ["sampling.temperature", "-0.1"]),
        ({"top_p": 0.0}, ["sampling.top_p"]),
        ({"top_p": 2.0}, ["sampling.top_p", "2"]),
        ({"stop": ["x"] * 10_000}, ["stopping.stop", "10000", "64"]),
        ({"max_tokens": 10_000}, ["stopping.max_tokens", "10000", "512"]),
        ({"prompt": [1] * 513}, ["513", "512"]),
        ({"prompt": [10**6]}, ["1000000"]),
        ({"prompt": []}, ["token_ids"]),
    ],
)
def test_bad_input_is_named_and_harms_nothing(service: Service, options: dict[str, object], words: list[str]) -> None:
    asked: dict[str, object] = {"prompt": [1], "model": "text", "timeout": 30} | options
    with service.client() as client:
        with pytest.raises(errors.InvalidRequest) as caught:
            client.complete(asked.pop("prompt"), **asked)  # type: ignore[arg-type]
        for word in words:
            assert word in str(caught.value)
        assert len(greedy(client, [1], 3)) == 3


def test_an_unknown_model_and_a_wrong_token(service: Service) -> None:
    with service.client() as client, pytest.raises(errors.ModelNotFound, match="nobody"):
        client.complete("x", model="nobody", timeout=30)
    for token in (None, "", TOKEN + "x"):
        with service.client(token) as client, pytest.raises(errors.Unauthenticated):
            client.complete([1], model="text", max_tokens=1, timeout=30)


@pytest.mark.parametrize(
    "data",
    [
        b"\x12\x02\xff\xfe\x1a\x01a",  # a model's name that is not UTF-8
        b"\xff" * 40,  # no message at all
        pb.GenerateRequest(model="text", text="x" * (17 << 20)).SerializeToString(),  # above the limit
    ],
    ids=["utf8", "noise", "large"],
)
def test_messages_that_cannot_be_read(service: Service, data: bytes) -> None:
    with grpc.insecure_channel(service.address) as channel:
        call = channel.unary_stream(GENERATE)(data, metadata=(("authorization", f"Bearer {TOKEN}"),), timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(call))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with service.client() as client:
        assert len(greedy(client, [1], 3)) == 3


def test_a_deadline_ends_a_stream_after_what_was_made(service: Service) -> None:
    with service.client() as client:
        stream = client.generate([1], model="text", max_tokens=400, ignore_eos=True, timeout=0.02)
        with pytest.raises(errors.DeadlineExceeded):
            for _ in stream:
                pass
    until(lambda: idle(service.status()))
