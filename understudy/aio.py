"""The client for asyncio: the twin of `understudy.client`; what both decide is decided elsewhere."""
# ruff: noqa: ASYNC109  a timeout here is the deadline that travels to the service

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio
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


class AsyncClient(Endpoint[grpc.aio.Channel]):
    """Asks an Understudy service from one event loop. Methods, options and errors are those of `Client`."""

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """As `Client.generate`: not awaited, but iterated over with `async for`. Needs a running event loop."""
        return AsyncStream(self, *self._start(prompt, options))

    def chat(self, messages: Messages, **options: Unpack[ChatOptions]) -> AsyncChatStream:
        """As `Client.chat`."""
        request = chat_request(messages, options)
        metadata = _request.call_metadata(self._token, request.request_id, options.get("traceparent"))
        return AsyncChatStream(self, ChatState(request, self._attempts(options.get("timeout"))), metadata)

    async def complete(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> types.Completion:
        """As `Client.complete`."""
        async with self.generate(prompt, **options) as stream:
            async for _ in stream:
                pass
            return stream.completion()

    async def tokenize(
        self,
        text: str,
        *,
        model: str | None = None,
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> types.Tokens:
        """As `Client.tokenize`."""
        request = _request.tokenize_request(text, model, add_special_tokens)
        return _request.tokens(await self._call(_channel.TOKENIZE, request, self._attempts(timeout)))

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str | None = None,
        skip_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> str:
        """As `Client.detokenize`."""
        request = _request.detokenize_request(token_ids, model, skip_special_tokens)
        return (await self._call(_channel.DETOKENIZE, request, self._attempts(timeout))).text

    async def models(self, *, timeout: float | None = None) -> list[types.Model]:
        """As `Client.models`."""
        attempts = self._attempts(timeout)
        return _request.models(await self._call(_channel.LIST_MODELS, pb.ListModelsRequest(), attempts))

    async def health(self, service: str = _channel.INFERENCE, *, timeout: float | None = None) -> types.Health:
        """As `Client.health`."""
        try:
            request = StringValue(value=service)
            return _channel.health(await self._call(_channel.HEALTH, request, self._once_each(timeout)))
        except errors.ModelNotFound:
            return types.Health.SERVICE_UNKNOWN

    async def status(self, *, timeout: float | None = None) -> admin_pb2.GetStatusResponse:
        """As `Client.status`."""
        return await self._call(_channel.GET_STATUS, admin_pb2.GetStatusRequest(), self._attempts(timeout))

    async def scale_experts(
        self, hosts: int, *, model: str = "", timeout: float | None = None
    ) -> admin_pb2.ScaleExpertsResponse:
        """As `Client.scale_experts`."""
        request = admin_pb2.ScaleExpertsRequest(model=model, hosts=max(0, hosts))
        return await self._call(_channel.SCALE_EXPERTS, request, self._attempts(timeout))

    async def close(self) -> None:
        """Closes the connections and cancels what still runs over them. Idempotent."""
        for channel in self._take_channels():
            await channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Method[Req, Res], request: Req, attempts: Attempts) -> Res:
        metadata = _request.call_metadata(self._token)
        while True:
            address = attempts.address
            call = self._channel_to(address).unary_unary(method.path, method.serialize, method.parse)
            try:
                timeout = attempts.remaining(time.monotonic())
                return readable(await call(request, timeout=timeout, metadata=metadata))
            except asyncio.CancelledError:
                if _task_is_cancelled():
                    raise
                raise errors.Cancelled("the client was closed") from None
            except grpc.RpcError as error:
                again = attempts.failed(from_rpc(error, self.addresses[address]), time.monotonic())
            await asyncio.sleep(again.delay_s)

    def _connect(self, address: str, options: list[tuple[str, Any]]) -> grpc.aio.Channel:
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(address, options)
        return grpc.aio.secure_channel(address, credentials, options)


class AsyncStream(StreamShell[asyncio.Event]):
    """As `Stream`, with `async for` and `async with`; `cancel` is called from the same event loop."""

    def __init__(self, client: AsyncClient, state: StreamState, metadata: Metadata) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(client, state, metadata, wake=asyncio.Event())

    def __del__(self) -> None:
        # gRPC cancels a forgotten call by itself, but the one of asyncio is held by its own task.
        if not self._over and not self._loop.is_closed():
            self._call.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> types.Piece:
        while not self._over:
            try:
                response = await self._call.read()
            except grpc.RpcError as error:
                await self._go_on(error)
            except asyncio.CancelledError:
                self.cancel()
                if _task_is_cancelled():
                    raise
                await self._go_on(None)
            else:
                if response is grpc.aio.EOF:
                    await self._go_on(None)
                    continue
                try:
                    piece = self._receive(response)
                except errors.UnderstudyError as error:
                    await self._go_on(error)
                    continue
                if piece is not None:
                    return piece
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    async def _go_on(self, error: grpc.RpcError | errors.UnderstudyError | None) -> None:
        again = self._after(error)
        if again is not None:
            with contextlib.suppress(TimeoutError):  # nobody cancelled meanwhile
                await asyncio.wait_for(self._wake.wait(), again.delay_s)
            self._open()


class AsyncChatStream(AsyncStream):
    """As `AsyncStream`, of an answer in a conversation: its pieces are `ChatPiece`s."""

    _method = CHAT
    _state: ChatState

    async def __anext__(self) -> ChatPiece:
        piece = await super().__anext__()
        assert isinstance(piece, ChatPiece)
        return piece

    @property
    def message(self) -> types.Message:
        """What the first sequence has said so far: the conversation's next message."""
        return self._state.message(0)

    def messages(self) -> tuple[types.Message, ...]:
        """What each sequence has said, once the stream was read to its end; RuntimeError before."""
        return tuple(self._state.message(choice.index) for choice in self._state.completion().choices)


def _task_is_cancelled() -> bool:
    """A call that `cancel` or `close` ended raises CancelledError too; this tells whether the task was meant."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
