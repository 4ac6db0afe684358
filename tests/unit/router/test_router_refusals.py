"""Bad input over the wire: each has a clear error, and the server is unharmed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest
from router_stage import Stage, problem, until

from router.dispatch import Patience
from router.gateway import Gateway
from router.interceptors import Tokens
from router.server import GatewayConfig
from understudy._status import from_status, to_status
from understudy.errors import ConfigError, Overloaded
from understudy.v1 import inference_pb2 as pb

S, T, R = pb.Sampling, pb.Stopping, pb.ResponseOptions

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sampling.temperature", {"sampling": S(temperature=-1)}, r"is -1; it must be in \[0, 100\]"),
    ("sampling.temperature", {"sampling": S(temperature=math.nan)}, "is nan"),
    ("sampling.temperature", {"sampling": S(temperature=math.inf)}, "is inf"),
    ("sampling.top_p", {"sampling": S(top_p=0)}, r"is 0; it must be in \(0, 1\]"),
    ("sampling.top_p", {"sampling": S(top_p=2)}, "is 2"),
    ("sampling.min_p", {"sampling": S(min_p=1.5)}, r"is 1.5; it must be in \[0, 1\]"),
    ("sampling.top_k", {"sampling": S(top_k=2**31)}, "it must be in"),
    ("sampling.n", {"sampling": S(n=0)}, r"must be in \[1, 128\]"),
    ("sampling.n", {"sampling": S(n=129)}, r"is 129; it must be in \[1, 128\]"),
    ("sampling.repetition_penalty", {"sampling": S(repetition_penalty=11)}, r"is 11; it must be in \(0, 10\]"),
    ("sampling.repetition_penalty", {"sampling": S(repetition_penalty=0)}, r"must be in \(0, 10\]"),
    ("sampling.presence_penalty", {"sampling": S(presence_penalty=-2.5)}, r"must be in \[-2, 2\]"),
    ("sampling.presence_penalty", {"sampling": S(presence_penalty=math.nan)}, "is nan"),
    ("sampling.frequency_penalty", {"sampling": S(frequency_penalty=3)}, r"must be in \[-2, 2\]"),
    ("sampling.logit_bias", {"sampling": S(logit_bias={1: 101.0})}, r"of token 1 is 101; it must be in \[-100, 100\]"),
    ("sampling.logit_bias", {"sampling": S(logit_bias={7: math.nan})}, "of token 7 is nan"),
    ("sampling.logit_bias", {"sampling": S(logit_bias={300: 1.0})}, "names token 300; .* vocabulary size of 300"),
    (
        "sampling.logit_bias",
        {"sampling": S(logit_bias=dict.fromkeys(range(1025), 1.0))},
        "has 1025 entries; at most 1024",
    ),
    ("sampling.bad_words", {"sampling": S(bad_words=["x"] * 65)}, "has 65 strings; at most 64"),
    ("sampling.bad_words", {"sampling": S(bad_words=["a", ""])}, r"\[1\] has 0 bytes; .* between 1 and 1024"),
    ("sampling.bad_words", {"sampling": S(bad_words=["é" * 513])}, r"\[0\] has 1026 bytes"),
    ("sampling.bad_words", {"sampling": S(bad_words=["x" * 16])}, r"\[0\] is 'x+', which takes 17 tokens; at most 16"),
    ("stopping.max_tokens", {"stopping": T(max_tokens=0)}, "at least 1"),
    ("stopping.max_tokens", {"stopping": T(max_tokens=255)}, "is 255; with 2 prompt tokens .* 256 leaves room for 254"),
    ("stopping.min_tokens", {"stopping": T(max_tokens=3, min_tokens=4)}, "is 4; it must be at most max_tokens, .* 3"),
    ("stopping.stop", {"stopping": T(stop=["x"] * 10_000)}, "has 10000 strings; at most 64"),
    ("stopping.stop", {"stopping": T(stop=["a", ""])}, r"\[1\] has 0 bytes"),
    ("stopping.stop", {"stopping": T(stop=["é" * 513])}, r"\[0\] has 1026 bytes"),
    ("stopping.stop_token_ids", {"stopping": T(stop_token_ids=[5, 300])}, r"\[1\] is 300; .* vocabulary size of 300"),
    ("stopping.stop_token_ids", {"stopping": T(stop_token_ids=[1] * 1025)}, "has 1025 ids"),
    ("format.regex", {"format": pb.Format(regex="a(")}, "cannot be held: .* unclosed group"),
    ("format.json_schema", {"format": pb.Format(json_schema='{"not": {}}')}, "cannot be held: .*not"),
    ("format.json_object", {"format": pb.Format(json_object=False)}, "only true is allowed"),
    ("response.logprobs", {"response": R(logprobs=21)}, r"is 21; it must be in \[0, 20\]"),
    ("response.prompt_logprobs", {"response": R(prompt_logprobs=21)}, r"is 21; it must be in \[0, 20\]"),
    (
        "response.trace_options",
        {"response": R(trace_options=pb.TraceOptions(candidates=3))},
        "is given, but response.trace is not set",
    ),
    (
        "response.trace_options.candidates",
        {"response": R(trace=True, trace_options=pb.TraceOptions(candidates=21))},
        r"is 21; it must be in \[0, 20\]",
    ),
    (
        "response.trace_options.attention_layers",
        {"response": R(trace=True, trace_options=pb.TraceOptions(attention_layers=range(9)))},
        "has 9 layers; at most 8",
    ),
    ("format.json_object", {"format": pb.Format(json_object=False)}, "is false; only true is allowed"),
    ("format.json_schema", {"format": pb.Format(json_schema="{")}, "JSON"),
    ("format.json_schema", {"format": pb.Format(json_schema='{"type": "nothing"}')}, "type|nothing"),
    (
        "format.json_schema",
        {"format": pb.Format(json_schema=" " * (256 << 10) + "{}")},
        "262,146 bytes; at most 262,144",
    ),
    ("format.regex", {"format": pb.Format(regex="(a")}, "regex|unclosed|parse"),
    ("format.regex", {"format": pb.Format(regex="a" * (1 << 17))}, "131,072 bytes; at most 65,536"),
    ("format.grammar", {"format": pb.Format(grammar="nothing at all")}, "root|start|grammar|expected"),
    ("format.choice", {"format": pb.Format(choice=pb.Choices())}, "at least|1,024|1024|empty"),
    ("kv.cache_salt", {"kv": pb.KvOptions(cache_salt="x" * 257)}, "has 257 bytes"),
    ("priority", {"priority": 101}, r"is 101; it must be in \[-100, 100\]"),
    ("request_id", {"request_id": "x" * 129}, "has 129 characters"),
    ("request_id", {"request_id": "new\nline"}, "printable ASCII"),
    ("token_ids.ids", {"text": None, "token_ids": pb.TokenIds(ids=[1, 2, 4_000_000_000])}, r"\[2\] is 4000000000"),
    ("token_ids.ids", {"text": None, "token_ids": pb.TokenIds()}, "is empty"),
    ("text", {"text": ""}, "is empty"),
    ("prompt", {"text": None}, "is missing"),
    ("prompt", {"text": "x" * 256}, "has 256 tokens; .* context of 256"),
    ("prompt", {"text": "x" * 100_000}, "has 100000 tokens; .* context of 256"),
]


@pytest.mark.parametrize(("field", "fields", "message"), BAD, ids=[f"{b[0]}-{i}" for i, b in enumerate(BAD)])
async def test_a_bad_field_is_named_with_its_bound(
    stage: Stage, field: str, fields: dict[str, Any], message: str
) -> None:
    await stage.open()
    code, said, info, (violations,) = await stage.refused(**fields)
    assert (code, info.reason, info.domain) == ("INVALID_ARGUMENT", "INVALID_REQUEST", "understudy")
    assert pytest.importorskip("re").search(message, said), said
    assert [v.field for v in violations.field_violations] == [field]
    assert said.startswith(field)
    assert len(said) < 1000
    assert (await stage.generate(stopping=T(max_tokens=1, ignore_eos=True))).reason == "LENGTH"


async def test_an_unknown_model(stage: Stage) -> None:
    await stage.open()
    code, said, info, _ = await stage.refused(model="nope")
    assert (code, info.reason) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    assert "'nope'" in said


async def test_no_model_yet(stage: Stage) -> None:
    await stage.open(serve_models=False)
    assert (await stage.refused())[0] == "NOT_FOUND"


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"model_fingerprint": "other"}, "CANNOT_RESUME"),
        ({"numerics_id": "other"}, "CANNOT_RESUME"),
        ({"prompt_token_ids": []}, "INVALID_REQUEST"),
        ({"prompt_token_ids": [1, 300]}, "INVALID_REQUEST"),
        ({"sequences": [pb.SequenceState(index=3)]}, "INVALID_REQUEST"),
        ({"sequences": [pb.SequenceState(index=1), pb.SequenceState(index=1)]}, "INVALID_REQUEST"),
        ({"sequences": [pb.SequenceState(index=1, token_ids=[3] * 6)]}, "INVALID_REQUEST"),
        ({"sequences": [pb.SequenceState(token_ids=[300])]}, "INVALID_REQUEST"),
        ({"sequences": [pb.SequenceState(token_ids=[3] * 6)]}, "INVALID_REQUEST"),
        ({"seed": 9}, "INVALID_REQUEST"),
    ],
)
async def test_what_cannot_be_resumed(stage: Stage, change: dict[str, Any], kind: str) -> None:
    await stage.open()
    fields: dict[str, Any] = {"model_fingerprint": "fake", "numerics_id": "fake", "prompt_token_ids": b"hi", "seed": 4}
    resume = pb.Resume(**(fields | change))
    code, said, info, _ = await stage.refused(resume=resume, stopping=T(max_tokens=5), sampling=S(seed=4, n=3))
    assert info.reason == kind, said
    assert code == ("FAILED_PRECONDITION" if kind == "CANNOT_RESUME" else "INVALID_ARGUMENT")
    assert "resume." in said


async def raw(stage: Stage, data: bytes) -> Iterable[bytes]:
    """Sends bytes as they are."""
    assert stage.channel is not None
    call = stage.channel.unary_stream("/understudy.v1.Inference/Generate")
    return [m async for m in call(data)]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x1a\x02\xff\xfe", "one of its strings is not UTF-8"),
        (b"\x0a\xff\xff", "cannot be read"),
        (b"\x1a\x80\x80\x80\x01" + b"x" * (1 << 21), "the message has 2097157 bytes; at most 1048576 are allowed"),
    ],
)
async def test_a_message_that_is_none(stage: Stage, data: bytes, message: str) -> None:
    await stage.open(GatewayConfig(port=0, max_message_bytes=1 << 20))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(stage, data)
    code, said, info, _ = problem(caught.value)
    assert (code, info.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert message in said
    assert (await stage.generate(stopping=T(max_tokens=1, ignore_eos=True))).reason == "LENGTH"


async def test_a_message_far_above_the_limit(stage: Stage) -> None:
    await stage.open(GatewayConfig(port=0, max_message_bytes=1 << 20))
    with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as caught:
        await raw(stage, b"x" * (4 << 20))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stage.generate(stopping=T(max_tokens=1, ignore_eos=True))).reason == "LENGTH"


async def test_too_many_streams(stage: Stage) -> None:
    gate = stage.gate()
    stage.add_replica(step_s=1.0, sleep=gate)
    gateway = await stage.open(GatewayConfig(port=0, max_streams=1))
    call = stage.stub.Generate(pb.GenerateRequest(text="hi"))
    await until(lambda: gateway.dispatcher.streams)
    code, _, info, (retry,) = await stage.refused()
    assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
    assert retry.retry_delay.seconds == 1
    call.cancel()


async def test_a_fault_of_ours_leaks_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    await stage.open()

    def explode(*_: Any, **__: Any) -> None:
        raise KeyError("secret/path")

    with monkeypatch.context() as patch:
        patch.setattr("router.gateway.validate", explode)
        code, said, info, _ = await stage.refused(request_id="abc")
    assert (code, info.reason, info.metadata["request_id"]) == ("INTERNAL", "INTERNAL", "abc")
    assert "abc" in said
    assert "secret" not in said
    assert (await stage.generate(stopping=T(max_tokens=1, ignore_eos=True))).reason == "LENGTH"


async def test_an_overflow_says_when_to_come_back() -> None:
    code, message, trailing = to_status(Overloaded("full", 2.5), "id")
    assert (code, message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    assert from_status(code, message, trailing).retry_after_s == 2.5  # type: ignore[attr-defined]
    _, message, trailing = to_status(Overloaded("ü" * 10_000), "id")
    assert len(message.encode()) + sum(len(value) for _, value in trailing) < 4000


# Identity.


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text("# who may\n\nsecret-a  tenant-a\nsecret-b tenant-b\n")
    return path


async def test_tokens(stage: Stage, tokens_file: Path) -> None:
    replica = stage.add_replica()
    await stage.open(GatewayConfig(port=0, tokens=tokens_file))
    request = pb.GenerateRequest(text="hi", stopping=T(max_tokens=1))
    for metadata in (None, (("authorization", "Bearer wrong"),), (("authorization", "Basic secret-a"),)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stage.stub.Generate(request, metadata=metadata):
                pass
        code, said, info, _ = problem(caught.value)
        assert (code, info.reason) == ("UNAUTHENTICATED", "UNAUTHENTICATED")
        assert "fake" not in said
    with pytest.raises(grpc.aio.AioRpcError, match="bearer token"):
        await stage.stub.ListModels(pb.ListModelsRequest())
    metadata = (("authorization", "Bearer secret-b"), ("x-request-id", "from-metadata"))
    messages = [m async for m in stage.stub.Generate(request, metadata=metadata)]
    assert messages[0].prompt_info.request_id == "from-metadata"
    request.kv.cache_salt = "mine"
    messages = [m async for m in stage.stub.Generate(request, metadata=metadata)]
    sent = [m for m in replica.channels[0].sent if hasattr(m, "cache_salt")]
    assert [m.cache_salt for m in sent] == ["tenant-b", "tenant-b\x1fmine"]


@pytest.mark.parametrize("content", ["", "# nobody\n", "one two three four\n", "token\n", "t a\nt b\n"])
def test_a_tokens_file_that_is_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokens"
    path.write_text(content)
    with pytest.raises(ConfigError, match="tokens: "):
        Tokens.read(path)


def test_a_tokens_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Tokens.read(tmp_path / "nowhere")


async def test_a_port_that_is_taken(stage: Stage) -> None:
    gateway = await stage.open()
    second = Gateway(GatewayConfig(port=gateway.port), stage.router, stage.router.connect)
    with pytest.raises(ConfigError, match=f"port: cannot listen on 127.0.0.1:{gateway.port}"):
        await second.start()
    await second.stop()


async def test_gateways_that_share_a_port_on_purpose(stage: Stage) -> None:
    gateway = await stage.open(GatewayConfig(port=0, share_port=True))
    config = GatewayConfig(port=gateway.port, share_port=True)
    second = Gateway(config, stage.router, stage.router.connect, gateway.models.all())
    assert await second.start() == gateway.port
    await second.stop()
    assert (await stage.generate(stopping=T(max_tokens=1, ignore_eos=True))).reason == "LENGTH"


async def test_no_replica_is_ready(stage: Stage) -> None:
    replica = stage.add_replica()
    await stage.open(patience=Patience(first=0.02, retry=0.01))
    replica.kill()
    code, _, info, _ = await stage.refused()
    assert (code, info.reason) == ("UNAVAILABLE", "UNAVAILABLE")
    stage.add_replica(epoch=2)
    assert (await stage.generate(stopping=T(max_tokens=1, ignore_eos=True))).reason == "LENGTH"
