"""The client for ordinary code. `understudy.aio` is its twin for asyncio; what both decide is decided elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
from google.protobuf.wrappers_pb2 import StringValue

from understudy import _channel, _request, errors, types
from understudy._attempts import Attempts
from understudy._channel import Endpoint, Method, Req, Res, readable
from understudy._chat import CHAT, ChatOptions, ChatPiece, ChatState, Messages, chat_request
from understudy._request import GenerateOptions, Metadata, Prompt
from understudy._shell import StreamShell
from understudy._status import from_rpc
from understudy._stream import StreamState
from understudy.v1 import admin_pb2
from understudy.v1 import inference_pb2 as pb


class Client(Endpoint[grpc.Channel]):
    """Asks an Understudy service; threads may share one.

    Every method raises `understudy.UnderstudyError` and nothing else when a call fails. Close it, or use it in a
    `with` statement.
    """

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Sends the request at once and gives its answer piece by piece. See `GenerateOptions` for the options."""
        return Stream(self, *self._start(prompt, options))

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> ChatStream:
        """Answers a conversation piece by piece; a text alone is a message of the user's. See `ChatOptions`."""
        request = chat_request(messages, options)
        metadata = _request.call_metadata(self._token, request.request_id, options.get("traceparent"))
        return ChatStream(self, ChatState(request, self._attempts(options.get("timeout"))), metadata)

    def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> types.Completion:
        """The whole answer at once."""
        with self.generate(prompt, **options) as stream:
            for _ in stream:
                pass
            return stream.completion()

    def tokenize(
        self,
        text: str,
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> types.Tokens:
        """Token ids of a text, with the special tokens of a prompt unless `add_special_tokens` is False."""
        request = _request.tokenize_request(text, model, add_special_tokens)
        return _request.tokens(self._call(_channel.TOKENIZE, request, self._attempts(timeout)))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """The text of token ids, without special tokens unless `skip_special_tokens` is False."""
        request = _request.detokenize_request(token_ids, model, skip_special_tokens)
        return self._call(_channel.DETOKENIZE, request, self._attempts(timeout)).text

    def models(self, *, timeout: float | None = None) -> list[types.Model]:
        """The models that the service answers for."""
        return _request.models(self._call(_channel.LIST_MODELS, pb.ListModelsRequest(), self._attempts(timeout)))

    def health(self, service: str = _channel.INFERENCE, *, timeout: float | None = None) -> types.Health:
        """Whether the service can make a token now. Asks each address once at most; Unavailable if none is there."""
        try:
            request = StringValue(value=service)
            return _channel.health(self._call(_channel.HEALTH, request, self._once_each(timeout)))
        except errors.ModelNotFound:  # NOT_FOUND: that is how the health service says that it knows no such name
            return types.Health.SERVICE_UNKNOWN

    def status(self, *, timeout: float | None = None) -> admin_pb2.GetStatusResponse:
        """What operators see; ask the service's admin address for it."""
        return self._call(_channel.GET_STATUS, admin_pb2.GetStatusRequest(), self._attempts(timeout))

    def scale_experts(
        self, hosts: int, *, model: str = "", timeout: float | None = None
    ) -> admin_pb2.ScaleExpertsResponse:
        """How many expert hosts each replica of a model has from now on; ask the service's admin address. Returns at
        once: `status` tells how far it is. Raises InvalidRequest, ModelNotFound."""
        request = admin_pb2.ScaleExpertsRequest(model=model, hosts=max(0, hosts))
        return self._call(_channel.SCALE_EXPERTS, request, self._attempts(timeout))

    def close(self) -> None:
        """Closes the connections and cancels what still runs over them. Idempotent."""
        for channel in self._take_channels():
            channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Method[Req, Res], request: Req, attempts: Attempts) -> Res:
        metadata = _request.call_metadata(self._token)
        while True:
            address = attempts.address
            call = self._channel_to(address).unary_unary(method.path, method.serialize, method.parse)
            try:
                return readable(call(request, timeout=attempts.remaining(time.monotonic()), metadata=metadata))
            except grpc.RpcError as error:
                again = attempts.failed(from_rpc(error, self.addresses[address]), time.monotonic())
            time.sleep(again.delay_s)

    def _connect(self, address: str, options: list[tuple[str, Any]]) -> grpc.Channel:
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, credentials, options)


class Stream(StreamShell[threading.Event]):
    """One answer, piece by piece: iterate over it, or leave it by `with`, which cancels what is not read.

    A broken stream goes on at the next address by itself, with no gap and nothing twice. Iterating raises an
    `UnderstudyError`; what had come until then stays readable. `cancel` may be called from any thread.
    """

    def __init__(self, client: Client, state: StreamState, metadata: Metadata) -> None:
        super().__init__(client, state, metadata, wake=threading.Event())

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> types.Piece:
        while not self._over:
            try:
                response = next(self._call)
            except StopIteration:
                self._go_on(None)
            except grpc.RpcError as error:
                self._go_on(error)
            except BaseException:  # Ctrl-C while waiting: the service must not go on for nobody
                self.cancel()
                raise
            else:
                try:
                    piece = self._receive(response)
                except errors.UnderstudyError as error:
                    self._go_on(error)
                    continue
                if piece is not None:
                    return piece
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def _go_on(self, error: grpc.RpcError | errors.UnderstudyError | None) -> None:
        again = self._after(error)
        if again is not None:
            self._wake.wait(again.delay_s)
            self._open()


class ChatStream(Stream):
    """As `Stream`, of an answer in a conversation: its pieces are `ChatPiece`s."""

    _method = CHAT
    _state: ChatState

    def __next__(self) -> ChatPiece:
        piece = super().__next__()
        assert isinstance(piece, ChatPiece)
        return piece

    @property
    def message(self) -> types.Message:
        """What the first sequence has said so far: the conversation's next message."""
        return self._state.message(0)

    def messages(self) -> tuple[types.Message, ...]:
        """What each sequence has said, once the stream was read to its end; RuntimeError before."""
        return tuple(self._state.message(choice.index) for choice in self._state.completion().choices)
