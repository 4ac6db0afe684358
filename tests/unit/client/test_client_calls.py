"""Both clients against a real gRPC server: answers, errors, resume, cancelling, deadlines."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from understudy import Finish, FinishReason, Retry, errors
from understudy.testing import FakeServer
from understudy.types import Health, Usage
from understudy.v1 import inference_pb2 as pb

TEXT = "Hello, world"
MESSAGES = len(TEXT) + 2  # PromptInfo, one delta per character, Finish


def test_a_stream_gives_pieces_and_then_everything_else(connect: Any, server: FakeServer) -> None:
    client = connect(server.address)
    stream = client.open("Hi", seed=2**64 - 1)
    pieces = client.read(stream)
    assert [piece.text for piece in pieces] == list(TEXT)
    assert [piece.token_ids for piece in pieces] == [(ord(c),) for c in TEXT]
    assert stream.text == TEXT
    assert stream.token_ids == tuple(map(ord, TEXT))
    assert stream.finish == Finish(0, FinishReason.EOS, None, Usage(2, len(TEXT)))
    assert stream.prompt.prompt_token_ids == (ord("H"), ord("i"))
    assert stream.prompt.seed == 2**64 - 1
    assert client.read(stream) == []


def test_the_prompt_is_known_with_the_first_piece_and_the_finish_is_not(connect: Any, server: FakeServer) -> None:
    client = connect(server.address)
    stream = client.open([72, 105])
    assert stream.prompt is None
    assert client.next(stream).text == "H"
    assert stream.prompt.prompt_tokens == 2
    assert stream.finish is None
    with pytest.raises(RuntimeError, match="not whole"):
        stream.completion()
    client.leave(stream)


def test_complete_gathers_every_sequence(connect: Any) -> None:
    with FakeServer(lambda request, index: f"answer {index}") as server:
        done = connect(server.address).call("complete", "Hi", n=3, logprobs=1)
    assert [choice.text for choice in done.choices] == ["answer 0", "answer 1", "answer 2"]
    assert done.text == "answer 0"
    assert [p.token_id for p in done.logprobs] == list(done.token_ids)
    assert done.logprobs[0].top[0].token_id == ord("a")
    assert done.finish.reason is FinishReason.EOS


def test_every_option_has_its_field(connect: Any, server: FakeServer) -> None:
    options = {
        "repetition_penalty": 1.5,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.25,
        "logit_bias": {5: 1.5, 2**32 - 1: -100},
        "bad_words": ["x", "y"],
        "n": 2,
        "prompt_logprobs": 3,
        "echo": True,
        "trace": True,
        "trace_candidates": 0,
        "trace_attention": [0, 2],
        "json_schema": {"type": "object"},
    }
    connect(server.address).call("complete", "Hi", **options)
    message = server.calls[0].message
    assert message.sampling == pb.Sampling(
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={5: 1.5, 2**32 - 1: -100},
        bad_words=["x", "y"],
        n=2,
    )
    trace = pb.TraceOptions(candidates=0, attention_layers=[0, 2])
    wanted = pb.ResponseOptions(token_ids=True, prompt_logprobs=3, echo=True, trace=True, trace_options=trace)
    assert message.response == wanted
    assert message.response.trace_options.HasField("candidates")
    assert message.format == pb.Format(json_schema='{"type": "object"}')


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"json_schema": "{}"}, pb.Format(json_schema="{}")),
        ({"regex": "a+"}, pb.Format(regex="a+")),
        ({"grammar": 'root ::= "a"'}, pb.Format(grammar='root ::= "a"')),
        ({"choice": ["a", "b"]}, pb.Format(choice=pb.Choices(choices=["a", "b"]))),
        ({"choice": []}, pb.Format(choice=pb.Choices())),
        ({"json_object": True}, pb.Format(json_object=True)),
        ({"json_object": False}, None),
    ],
)
def test_formats(connect: Any, server: FakeServer, options: dict[str, Any], wanted: pb.Format | None) -> None:
    connect(server.address).call("complete", "Hi", **options)
    message = server.calls[0].message
    assert (message.format if message.HasField("format") else None) == wanted


def test_two_formats_contradict_each_other(connect: Any, server: FakeServer) -> None:
    with pytest.raises(errors.InvalidRequest, match="format: regex and choice are given"):
        connect(server.address).open("Hi", regex="a", choice=["b"])
    with pytest.raises(errors.InvalidRequest, match=r"logit_bias: .* does not fit|logit_bias"):
        connect(server.address).open("Hi", logit_bias={-1: 1.0})
    assert not server.calls


def test_what_is_told_of_prompt_and_choices(connect: Any, server: FakeServer) -> None:
    client = connect(server.address)
    options: dict[str, Any] = {"prompt_logprobs": 1, "echo": True, "trace": True, "trace_attention": [3], "n": 2}
    done = client.call("complete", "Hey", **options)
    assert [(p.token_id, p.top[0].text) for p in done.prompt.prompt_logprobs] == [(ord("e"), "e"), (ord("y"), "y")]
    assert [c.text for c in done.choices] == ["Hey" + TEXT] * 2
    assert done.token_ids == tuple(map(ord, TEXT))
    assert done.finish.usage == Usage(3, len(TEXT))
    traces = done.choices[1].traces
    assert [t.token_id for t in traces] == list(done.token_ids)
    assert (traces[0].candidates[1].text, traces[0].candidates[1].before, traces[0].candidates[1].after) == (
        "I",
        0.25,
        0,
    )
    assert (traces[0].experts[0].experts, traces[0].attention[0].weights) == ((2, 5), (0.25, 0.0, 0.75))
    pieces = client.read(client.open("Hey", echo=True))
    assert [p.echo for p in pieces] == [True] + [False] * len(TEXT)
    assert (pieces[0].text, pieces[0].token_ids) == ("Hey", (72, 101, 121))


def test_breaks_while_several_sequences_with_echoes_come(connect: Any) -> None:
    with FakeServer(lambda request, index: f"<{index}>" * (index + 1), piece=2) as server:
        for at in (1, 3, 4, 2, 7, 1, 5):
            server.break_after(at)
        done = connect(server.address).call("complete", "Hi", n=4, echo=True, trace=True, prompt_logprobs=0)
        assert [c.text for c in done.choices] == ["Hi" + f"<{i}>" * (i + 1) for i in range(4)]
        assert [[t.token_id for t in c.traces] for c in done.choices] == [list(c.token_ids) for c in done.choices]
        assert len(done.prompt.prompt_logprobs) == 1  # of the first attempt: no other tells them
        assert len(server.calls) == 8


def test_stop_and_length_are_told(connect: Any, server: FakeServer) -> None:
    client = connect(server.address)
    stopped = client.call("complete", "Hi", stop=", ")
    assert (stopped.text, stopped.finish.reason, stopped.finish.matched) == ("Hello", FinishReason.STOP_SEQUENCE, ", ")
    cut = client.call("complete", "Hi", max_tokens=3)
    assert (cut.text, cut.finish.reason, cut.finish.matched) == ("Hel", FinishReason.LENGTH, None)


def test_the_other_calls(connect: Any, server: FakeServer) -> None:
    client = connect(server.address)
    tokens = client.call("tokenize", "añ")
    assert (tokens.token_ids, tokens.texts, tokens.max_context) == ((97, 241), ("a", "ñ"), 4096)
    assert client.call("detokenize", [97, 241]) == "añ"
    assert [m.name for m in client.call("models")] == ["fake"]
    assert client.call("health") is Health.SERVING
    server.serving = False
    assert client.call("health") is Health.NOT_SERVING
    assert client.call("health", "nobody") is Health.SERVICE_UNKNOWN
    server.status.uptime_s = 3
    assert client.call("status").uptime_s == 3


def test_metadata_carry_identity_name_and_trace(connect: Any, server: FakeServer) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    client = connect(server.address, token="secret")
    client.call("complete", "Hi", request_id="mine", traceparent=trace)
    call = server.calls[0]
    assert call.message.request_id == "mine"
    assert call.metadata["authorization"] == "Bearer secret"
    assert call.metadata["x-request-id"] == "mine"
    assert call.metadata["traceparent"] == trace


def test_the_span_that_is_open_in_the_caller_is_passed_on(connect: Any, server: FakeServer) -> None:
    from opentelemetry import trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    of = SpanContext(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, False, TraceFlags(1))
    connect(server.address).call("complete", "Hi")
    with trace.use_span(NonRecordingSpan(of)):
        client = connect(server.address)
        client.call("complete", "Hi")
        client.call("complete", "Hi", traceparent="00-1-2-01")
    sent = [call.metadata.get("traceparent") for call in server.calls]
    assert sent == [None, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "00-1-2-01"]


def test_a_request_without_a_name_gets_one_and_keeps_it(connect: Any, server: FakeServer) -> None:
    server.break_after(0)
    server.break_after(4)
    connect(server.address).call("complete", "Hi")
    names = {call.message.request_id for call in server.calls}
    assert len(server.calls) == 3
    assert len(names) == 1
    assert "" not in names


@pytest.mark.parametrize("at", range(MESSAGES + 1))
def test_a_break_at_any_message_is_not_seen(connect: Any, server: FakeServer, at: int) -> None:
    server.break_after(at)
    client = connect(server.address)
    stream = client.open("Hi", max_tokens=50)
    assert [piece.text for piece in client.read(stream)] == list(TEXT)
    assert stream.finish.usage.completion_tokens == len(TEXT)
    # After the Finish nothing is missing, so that nothing is asked for again.
    assert len(server.calls) == (1 if at == MESSAGES else 2)
    if 0 < at < MESSAGES:
        resume = server.calls[1].message.resume
        assert (resume.model_fingerprint, resume.numerics_id) == ("fake-weights", "fake-numerics")
        assert list(resume.prompt_token_ids) == [ord("H"), ord("i")]
        received = [list(state.token_ids) for state in resume.sequences]
        assert received == ([[ord(c) for c in TEXT[: at - 1]]] if at > 1 else [])
        assert server.calls[1].message.stopping.max_tokens == 50
    if at == 0:
        assert server.calls[1].message == server.calls[0].message
        assert not server.calls[1].message.HasField("resume")


def test_many_breaks_over_two_addresses_and_three_sequences(connect: Any) -> None:
    def answer(request: pb.GenerateRequest, index: int) -> str:
        return f"sequence {index} " * (index + 1)

    with FakeServer(answer, piece=2) as one, FakeServer(answer, piece=3) as other:
        for server in (one, other):
            for at in (7, 0, 1, 5, 1, 9):
                server.break_after(at)
        client = connect([one.address, other.address])
        stream = client.open("Hi", n=3)
        texts = ["", "", ""]
        for piece in client.read(stream):
            texts[piece.index] += piece.text
        assert texts == [f"sequence {i} " * (i + 1) for i in range(3)]
        assert [choice.text for choice in stream.completion().choices] == texts
        assert len(one.calls) > 2
        assert len(other.calls) > 2


def test_a_stream_survives_the_death_of_its_server(connect: Any) -> None:
    with FakeServer(TEXT) as dying, FakeServer(TEXT) as other:
        dying.hold_after(5)
        other.hold_after(5)
        client = connect([dying.address, other.address])
        stream = client.open("Hi")
        head = "".join(client.next(stream).text for _ in range(4))
        first = dying if dying.calls else other
        first.stop()
        # The other one holds after five messages of its own; its death brings a third attempt, at nobody.
        middle = "".join(client.next(stream).text for _ in range(4))
        second = other if first is dying else dying
        assert len(second.calls) == 1
        first.start()
        second.stop()
        tail = "".join(piece.text for piece in client.read(stream))
        assert head + middle + tail == TEXT
        assert len(first.calls) == 2


def test_a_server_that_comes_back_is_waited_for(connect: Any, server: FakeServer) -> None:
    server.hold_after(3)
    client = connect(server.address, retry=Retry(first_delay_s=0.01, max_delay_s=0.05, resume_attempts=10_000))
    stream = client.open("Hi")
    head = client.next(stream).text
    server.stop()
    back = threading.Timer(0.2, server.start)
    back.start()
    assert head + "".join(piece.text for piece in client.read(stream)) == TEXT
    back.join()


def test_resume_is_refused_by_one_address_and_taken_by_another(connect: Any) -> None:
    with FakeServer(TEXT) as one, FakeServer(TEXT, numerics_id="other") as other, FakeServer(TEXT) as third:
        for server in (one, other, third):
            server.break_after(4)
        client = connect([one.address, other.address, third.address])
        assert client.call("complete", "Hi").text == TEXT


def test_resume_that_everybody_refuses_is_an_error(connect: Any) -> None:
    with FakeServer(TEXT) as one, FakeServer(TEXT) as other:
        one.break_after(4)
        other.break_after(4)
        stream = (client := connect([one.address, other.address])).open("Hi")
        assert client.next(stream).text == "H"
        # From here on nobody computes as the one did that began.
        one.model.numerics_id = other.model.numerics_id = "other"
        with pytest.raises(errors.CannotResume, match="numerics_id"):
            client.read(stream)
        assert stream.text == "Hel"
        assert (len(one.calls), len(other.calls)) in ((2, 1), (1, 2))


def test_attempts_end_and_the_text_so_far_stays(connect: Any, server: FakeServer) -> None:
    server.break_after(4)
    for _ in range(3):
        server.break_after(1, errors.Unavailable("still broken"))
    retry = Retry(first_delay_s=0.001, resume_attempts=3)
    client = connect(server.address, retry=retry)
    stream = client.open("Hi")
    with pytest.raises(errors.Unavailable, match="still broken"):
        client.read(stream)
    assert stream.text == "Hel"
    assert len(server.calls) == 4
    assert client.read(stream) == []


def test_never_again_means_never(connect: Any, server: FakeServer) -> None:
    server.break_after(2)
    client = connect(server.address, retry=Retry(attempts=1, resume_attempts=0))
    with pytest.raises(errors.Unavailable):
        client.call("complete", "Hi")
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidRequest("is 7; it must be in (0, 1]", "sampling.top_p"),
        errors.Overloaded("full", 2.5),
        errors.Unauthenticated("the bearer token is unknown"),
        errors.PermissionDenied("no"),
        errors.InternalError("a fault"),
        errors.CheckpointError("model.safetensors is damaged"),
    ],
    ids=lambda e: e.kind,
)
def test_errors_arrive_as_what_they_are_and_are_not_tried_again(
    connect: Any, server: FakeServer, error: errors.UnderstudyError
) -> None:
    server.break_after(0, error)
    with pytest.raises(type(error)) as caught:
        connect(server.address).call("complete", "Hi")
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)
    assert isinstance(caught.value.__cause__, grpc.RpcError)
    assert len(server.calls) == 1


def test_an_unknown_model_is_an_error_of_its_kind(connect: Any, server: FakeServer) -> None:
    with pytest.raises(errors.ModelNotFound, match="no model 'x'"):
        connect(server.address).call("complete", "Hi", model="x")


def test_an_overloaded_service_does_not_end_a_stream_that_has_begun(connect: Any, server: FakeServer) -> None:
    server.break_after(3)
    server.break_after(0, errors.Overloaded("full", 0.001))
    assert connect(server.address).call("complete", "Hi").text == TEXT


def test_nobody_there_names_the_address(connect: Any, server: FakeServer) -> None:
    server.stop()
    client = connect(server.address)
    for call, argument in (("complete", "Hi"), ("tokenize", "Hi")):
        with pytest.raises(errors.Unavailable, match=server.address):
            client.call(call, argument)
    with pytest.raises(errors.Unavailable):
        client.call("health")


def test_a_call_goes_to_the_address_that_is_there(connect: Any, server: FakeServer) -> None:
    with FakeServer() as gone:
        pass
    client = connect([gone.address, server.address])
    for _ in range(3):
        assert client.call("detokenize", [97]) == "a"
        assert client.call("health") is Health.SERVING
        assert client.call("complete", "Hi").text == TEXT


def test_cancel_reaches_the_server_and_the_reader(connect: Any, server: FakeServer) -> None:
    server.hold_after(4)
    client = connect(server.address)
    stream = client.open("Hi")
    client.next(stream)
    stream.cancel()
    with pytest.raises(errors.Cancelled):
        client.read(stream)
    client.call("health")  # lets the event loop send it
    assert server.cancelled.wait(10)
    assert client.read(stream) == []


def test_leaving_the_with_statement_cancels(connect: Any, server: FakeServer) -> None:
    server.hold_after(4)
    client = connect(server.address)
    stream = client.open("Hi")
    client.next(stream)
    client.leave(stream)
    client.call("health")
    assert server.cancelled.wait(10)


def test_a_forgotten_stream_cancels(connect: Any, server: FakeServer) -> None:
    server.hold_after(4)
    client = connect(server.address)
    stream = client.open("Hi")
    client.next(stream)
    del stream
    gc.collect()
    client.call("health")
    assert server.cancelled.wait(10)


def test_cancel_after_the_end_changes_nothing(connect: Any, server: FakeServer) -> None:
    client = connect(server.address)
    stream = client.open("Hi")
    client.read(stream)
    stream.cancel()
    assert client.read(stream) == []
    assert stream.completion().text == TEXT


def test_a_deadline_ends_a_stream_and_keeps_what_came(connect: Any, server: FakeServer) -> None:
    server.hold_after(4)
    client = connect(server.address)
    stream = client.open("Hi", timeout=0.3)
    with pytest.raises(errors.DeadlineExceeded):
        client.read(stream)
    assert stream.text == "Hel"
    assert server.cancelled.wait(10)


def test_a_deadline_is_total_over_attempts(connect: Any, server: FakeServer) -> None:
    server.stop()
    patient = Retry(attempts=10_000, first_delay_s=0.02, max_delay_s=0.05)
    client = connect(server.address, retry=patient, timeout=0.2)
    with pytest.raises(errors.DeadlineExceeded, match="next try"):
        client.call("complete", "Hi")
    with pytest.raises(errors.DeadlineExceeded):
        client.call("tokenize", "Hi")


def test_unknown_and_ill_typed_options(connect: Any, server: FakeServer) -> None:
    client = connect(server.address)
    with pytest.raises(TypeError, match="temprature"):
        client.call("complete", "Hi", temprature=1)
    with pytest.raises(TypeError, match=r"sampling\.temperature"):
        client.call("complete", "Hi", temperature="hot")
    with pytest.raises(errors.InvalidRequest, match=r"sampling\.top_k: -1 does not fit: 0 to 4294967295"):
        client.call("complete", "Hi", top_k=-1)
    with pytest.raises(errors.InvalidRequest, match="x-request-id"):
        client.call("complete", "Hi", request_id="ü")
    assert server.calls == []


def test_a_closed_client_says_so(connect: Any, server: FakeServer) -> None:
    client = connect(server.address)
    client.call("complete", "Hi")
    client.call("close")
    with pytest.raises(RuntimeError, match="closed"):
        client.call("tokenize", "Hi")
    client.call("close")


def test_a_server_without_this_api_is_named(connect: Any) -> None:
    bare = grpc.server(ThreadPoolExecutor(1))
    port = bare.add_insecure_port("127.0.0.1:0")
    bare.start()
    try:
        with pytest.raises(errors.InternalError, match="does not serve this API"):
            connect(f"127.0.0.1:{port}").call("complete", "Hi")
    finally:
        bare.stop(None).wait()


def test_addresses_are_needed(connect: Any) -> None:
    for nothing in ("", [], ["a:1", ""]):
        with pytest.raises(errors.ConfigError, match="host:port"):
            connect(nothing)
