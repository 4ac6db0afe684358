"""A service without a model, for the tests of programs that use a client.

`FakeServer` speaks the real API on a real port, answers what it is told to, and breaks streams on demand:

    with FakeServer("Hello, world") as server, Client(server.address) as client:
        server.break_after(3)
        assert client.complete("Hi").text == "Hello, world"

Its tokens are Unicode code points. It honours `max_tokens`, `stop`, `n`, `logprobs`, `prompt_logprobs`, `echo`, `trace`
and `resume`, and no other option.
A chat's answer is text alone; its prompt has a line per message, such as `user: Hi`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import grpc
from google.protobuf.wrappers_pb2 import Int64Value, StringValue

from understudy import errors
from understudy._channel import (
    DETOKENIZE,
    GENERATE,
    GET_STATUS,
    HEALTH,
    LIST_MODELS,
    SCALE_EXPERTS,
    TOKENIZE,
    Method,
    Req,
    Res,
)
from understudy._chat import CHAT
from understudy._status import to_status
from understudy.v1 import admin_pb2
from understudy.v1 import inference_pb2 as pb

T = TypeVar("T")
Answer = str | Callable[[pb.GenerateRequest, int], str]


@dataclass(frozen=True)
class Call:
    """A call that the server took: its message, and its metadata without gRPC's own."""

    message: Any
    metadata: dict[str, str | bytes]


class FakeServer:
    """Answers every prompt with `answer`, a text or a function of request and sequence index.

    `piece` is the number of tokens in a delta. `calls` lists the Generate calls in the order in which they came;
    `cancelled` is set when one of them was cancelled by its client.
    """

    def __init__(
        self,
        answer: Answer = "Hello, world",
        *,
        piece: int = 1,
        model: str = "fake",
        model_fingerprint: str = "fake-weights",
        numerics_id: str = "fake-numerics",
        max_context: int = 4096,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.calls: list[Call] = []
        self.cancelled = threading.Event()
        self.serving = True
        self.status = admin_pb2.GetStatusResponse(version="fake")
        self.model = pb.Model(
            name=model,
            model_fingerprint=model_fingerprint,
            numerics_id=numerics_id,
            max_context=max_context,
            vocab_size=0x110000,
            dtype="float32",
            architecture="FakeForCausalLM",
        )
        self._answer = answer
        self._piece = piece
        self._credentials = credentials
        self._breaks: deque[tuple[int, errors.UnderstudyError | None]] = deque()
        self._server: grpc.Server | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """`host:port`; the port is chosen by the first start and kept by later ones."""
        return f"127.0.0.1:{self._port}"

    def break_after(self, messages: int, error: errors.UnderstudyError | None = None) -> None:
        """A Generate call to come, the next one that has no break yet, ends with `error` (UNAVAILABLE unless told
        otherwise) once it has sent that many messages, PromptInfo included."""
        self._breaks.append((messages, error or errors.Unavailable("broken by the test")))

    def hold_after(self, messages: int) -> None:
        """As `break_after`, but it then sends nothing more and waits until the client goes away."""
        self._breaks.append((messages, None))

    def start(self) -> FakeServer:
        """Starts, again after a stop too."""
        self._server = grpc.server(ThreadPoolExecutor(16, "fake-server"))
        self._server.add_generic_rpc_handlers((self._inference(), self._admin(), self._health()))
        address = f"127.0.0.1:{self._port}"
        if self._credentials is None:
            self._port = self._server.add_insecure_port(address)
        else:
            self._port = self._server.add_secure_port(address, self._credentials)
        self._server.start()
        return self

    def stop(self) -> None:
        """Cuts every connection at once and gives up the port. Idempotent."""
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def __enter__(self) -> FakeServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _inference(self) -> grpc.GenericRpcHandler:
        generate = grpc.unary_stream_rpc_method_handler(
            self._generate, request_deserializer=GENERATE.parse_request, response_serializer=GENERATE.serialize_response
        )
        chat = grpc.unary_stream_rpc_method_handler(
            self._chat, request_deserializer=CHAT.parse_request, response_serializer=CHAT.serialize_response
        )
        return grpc.method_handlers_generic_handler(
            GENERATE.service,
            {
                "Generate": generate,
                "Chat": chat,
                "Tokenize": _unary(TOKENIZE, self._tokenize),
                "Detokenize": _unary(DETOKENIZE, self._detokenize),
                "ListModels": _unary(LIST_MODELS, lambda _: pb.ListModelsResponse(models=[self.model])),
            },
        )

    def _admin(self) -> grpc.GenericRpcHandler:
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetStatus": _unary(GET_STATUS, lambda _: self.status),
            "ScaleExperts": _unary(SCALE_EXPERTS, self._scale_experts),
        }
        return grpc.method_handlers_generic_handler(GET_STATUS.service, handlers)

    def _scale_experts(self, request: admin_pb2.ScaleExpertsRequest) -> admin_pb2.ScaleExpertsResponse:
        """Notes the number in the placements of `status` that are of the model."""
        found = [e for e in self.status.experts if request.model in ("", e.model)]
        if not found:
            raise errors.ModelNotFound(f"no replica of {request.model!r} has expert hosts")
        for placement in found:
            placement.hosts_wanted = request.hosts
        return admin_pb2.ScaleExpertsResponse(model=found[0].model, hosts=request.hosts)

    def _health(self) -> grpc.GenericRpcHandler:
        def check(request: StringValue) -> Int64Value:
            if request.value not in ("", GENERATE.service):
                raise errors.ModelNotFound(f"no service {request.value!r}")
            return Int64Value(value=1 if self.serving else 2)

        return grpc.method_handlers_generic_handler(HEALTH.service, {"Check": _unary(HEALTH, check)})

    def _tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse:
        ids = [ord(c) for c in request.text]
        return pb.TokenizeResponse(token_ids=ids, texts=list(request.text), max_context=self.model.max_context)

    def _detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text="".join(map(chr, request.token_ids)))

    def _generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        yield from self._take(request, self._responses(request), context)

    def _chat(self, request: pb.ChatRequest, context: grpc.ServicerContext) -> Iterator[pb.ChatResponse]:
        yield from self._take(request, map(_chat_response, self._responses(_as_generate(request))), context)

    def _take(
        self, request: pb.GenerateRequest | pb.ChatRequest, responses: Iterator[T], context: grpc.ServicerContext
    ) -> Iterator[T]:
        metadata = {key: value for key, value in context.invocation_metadata() if key != "user-agent"}
        self.calls.append(Call(request, metadata))
        limit, error = self._breaks.popleft() if self._breaks else (None, None)
        sent = 0
        try:
            for response in responses:
                if sent == limit:
                    break
                yield response
                sent += 1
            if limit is None:
                return
            if error is None:
                self._hold(context)
                return
        except GeneratorExit:  # the client went away between two messages
            self.cancelled.set()
            raise
        except errors.UnderstudyError as refused:
            error = refused
        _abort(context, error)

    def _hold(self, context: grpc.ServicerContext) -> None:
        gone = threading.Event()
        if context.add_callback(gone.set):
            gone.wait()
        self.cancelled.set()

    def _responses(self, request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        """The whole answer, or the rest of a resumed one; sequences take turns."""
        if request.model not in ("", self.model.name):
            raise errors.ModelNotFound(f"no model {request.model!r}; there is {self.model.name!r}")
        info = self._prompt_info(request)
        received = self._received(request, info)
        yield pb.GenerateResponse(prompt_info=info)
        running = {i: self._sequence(request, i, received.get(i)) for i in range(request.sampling.n or 1)}
        while running:
            for index, sequence in list(running.items()):
                response = next(sequence, None)
                if response is None:
                    del running[index]
                else:
                    yield response

    def _prompt_info(self, request: pb.GenerateRequest) -> pb.PromptInfo:
        ids = list(request.token_ids.ids) or [ord(c) for c in request.text]
        if not ids:
            raise errors.InvalidRequest("is empty; give text or token ids", "prompt")
        told = ids[1:] if request.response.HasField("prompt_logprobs") and not request.HasField("resume") else []
        return pb.PromptInfo(
            request_id=request.request_id or "fake-request",
            model=self.model.name,
            model_fingerprint=self.model.model_fingerprint,
            numerics_id=self.model.numerics_id,
            prompt_token_ids=ids,
            prompt_tokens=len(ids),
            seed=request.sampling.seed,
            prompt_logprobs=[_logprob(chr(id), request.response.prompt_logprobs) for id in told],
        )

    def _received(self, request: pb.GenerateRequest, info: pb.PromptInfo) -> dict[int, int]:
        """How many tokens of each sequence the client has. CannotResume where they are not a start of ours."""
        if not request.HasField("resume"):
            return {}
        for name in ("model_fingerprint", "numerics_id", "prompt_token_ids", "seed"):
            if getattr(request.resume, name) != getattr(info, name):
                raise errors.CannotResume(f"resume.{name} is another")
        for state in request.resume.sequences:
            had = "".join(map(chr, state.token_ids))
            if not self._text(request, state.index).startswith(had):
                raise errors.CannotResume(f"sequence {state.index} did not begin with {had!r} here")
        return {state.index: len(state.token_ids) for state in request.resume.sequences}

    def _text(self, request: pb.GenerateRequest, index: int) -> str:
        return self._answer if isinstance(self._answer, str) else self._answer(request, index)

    def _sequence(self, request: pb.GenerateRequest, index: int, received: int | None) -> Iterator[pb.GenerateResponse]:
        text, finish = self._text(request, index), pb.Finish(index=index, reason=pb.FINISH_REASON_EOS)
        found = [(at, stop) for stop in request.stopping.stop if (at := text.find(stop)) >= 0]
        if found:
            at, finish.stop = min(found)
            finish.reason, text = pb.FINISH_REASON_STOP_SEQUENCE, text[:at]
        if request.stopping.HasField("max_tokens") and len(text) >= request.stopping.max_tokens:
            finish.reason, text = pb.FINISH_REASON_LENGTH, text[: request.stopping.max_tokens]
            finish.ClearField("matched")
        if request.response.echo and received is None:
            prompt = list(request.token_ids.ids) or [ord(c) for c in request.text]
            echo = pb.Delta(index=index, text="".join(map(chr, prompt)), token_ids=prompt, echo=True)
            yield pb.GenerateResponse(delta=echo)
        for at in range(received or 0, len(text), self._piece):
            yield pb.GenerateResponse(delta=_delta(request, index, text[at : at + self._piece], at))
        prompt_tokens = len(request.token_ids.ids) or len(request.text)
        finish.usage.CopyFrom(pb.Usage(prompt_tokens=prompt_tokens, completion_tokens=len(text)))
        yield pb.GenerateResponse(finish=finish)


def _as_generate(request: pb.ChatRequest) -> pb.GenerateRequest:
    """The prompt of a chat: a line per message, with its role."""
    lines = [f"{pb.Role.Name(m.role)[5:].lower()}: {''.join(p.text for p in m.content)}" for m in request.messages]
    out = pb.GenerateRequest(
        request_id=request.request_id, model=request.model, text="\n".join(lines), sampling=request.sampling,
        stopping=request.stopping, response=request.response,
    )  # fmt: skip
    if request.HasField("resume"):
        out.resume.CopyFrom(request.resume)
    return out


def _chat_response(response: pb.GenerateResponse) -> pb.ChatResponse:
    if response.HasField("prompt_info"):
        return pb.ChatResponse(prompt_info=response.prompt_info)
    if response.HasField("finish"):
        return pb.ChatResponse(finish=response.finish)
    delta = response.delta
    out = pb.ChatDelta(
        index=delta.index, text=delta.text, token_ids=delta.token_ids, logprobs=delta.logprobs, position=delta.position
    )
    return pb.ChatResponse(delta=out)


def _delta(request: pb.GenerateRequest, index: int, text: str, at: int) -> pb.Delta:
    """The delta of `text`, which begins at token `at` of the answer."""
    delta = pb.Delta(index=index, text=text, token_ids=[ord(c) for c in text], position=at)
    if request.response.HasField("logprobs"):
        delta.logprobs.extend(_logprob(char, request.response.logprobs) for char in text)
    if request.response.trace:
        delta.trace.server_us, delta.trace.step = 1000 * (at + 1), at + 1
        before = len(request.token_ids.ids) or len(request.text)
        delta.trace.tokens.extend(_token_trace(request, char, before + at + i) for i, char in enumerate(text))
    return delta


def _logprob(char: str, count: int) -> pb.Logprob:
    top = [pb.TopLogprob(token_id=ord(char), text=char, logprob=-0.5)] if count else []
    return pb.Logprob(token_id=ord(char), text=char, logprob=-0.5, rank=1, top=top)


def _token_trace(request: pb.GenerateRequest, char: str, attended: int) -> pb.TokenTrace:
    """The character and those after it, each half as likely; two experts; attention to the first and the last of the
    `attended` positions."""
    options = request.response.trace_options
    count = options.candidates if options.HasField("candidates") else 10
    trace = pb.TokenTrace(token_id=ord(char))
    for i in range(count):
        trace.candidates.add(
            token_id=ord(char) + i, text=chr(ord(char) + i), before=0.5 ** (i + 1), after=float(i == 0)
        )
    trace.experts.add(layer=1, experts=[2, 5], weights=[0.75, 0.25])
    for layer in options.attention_layers:
        weights = [0.25, *[0.0] * (attended - 2), 0.75] if attended > 1 else [1.0]
        trace.attention.add(layer=layer, weights=weights)
    return trace


def _unary(method: Method[Req, Res], behaviour: Callable[[Req], Res]) -> grpc.RpcMethodHandler[Req, Res]:
    def handle(request: Req, context: grpc.ServicerContext) -> Res:
        try:
            return behaviour(request)
        except errors.UnderstudyError as error:
            _abort(context, error)
            raise

    return grpc.unary_unary_rpc_method_handler(handle, method.parse_request, method.serialize_response)


def _abort(context: grpc.ServicerContext, error: errors.UnderstudyError) -> None:
    code, message, metadata = to_status(error)
    context.set_trailing_metadata(metadata)
    context.abort(code, message)
