"""The gateway: a `grpc.aio` server that takes requests and gives streams.

A call's way: `interceptors` → `validate` → `dispatch` (→ `channels` → leader) → `answer` (→ `text`) → the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from router.answer import Answer
from router.bounds import check_token_ids
from router.channels import ChannelPool, Connect, Timing
from router.chat.service import Chats, Plan
from router.chat.service import Context as ChatContext
from router.clock import Clock, LoopClock, sleep
from router.dispatch import Dispatcher, Patience
from router.health import USABLE, Health, judge
from router.interceptors import CallInterceptor, Tokens, current_call
from router.local import FallbackRouter, LocalRouter
from router.metrics import Metrics
from router.models import ServedModel
from router.port import Assignment, ReplicaView, RouterPort, State
from router.server import GatewayConfig, bind, server_options
from router.stops import StopStrings
from router.stream import Batch, Stream, Superseded
from router.tracing import Tracer, stream_trace
from router.validate import ValidRequest, valid_request_id, validate
from router.versions import Models
from understudy.errors import DeadlineExceeded, Overloaded
from understudy.v1 import inference_pb2 as pb
from understudy.v1 import inference_pb2_grpc
from workers.engine import FinishReason

log = logging.getLogger(__name__)

SERVICE = "understudy.v1.Inference"
_INLINE = 2048  # bytes, characters or ids up to which work on them does not deserve a thread
T = TypeVar("T")


class InferenceService:
    """The methods of `understudy.v1.Inference`."""

    def __init__(
        self,
        models: Models,
        dispatcher: Dispatcher,
        metrics: Metrics,
        config: GatewayConfig,
        chats: Chats,
        tracer: Tracer | None = None,
    ) -> None:
        self._models = models
        self._tracer = tracer
        self._chats = chats
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._config = config
        self._clock = dispatcher.clock

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Streams one completion."""
        while True:
            with contextlib.suppress(Superseded):  # an upgrade: nothing was sent yet
                model = await self._find(request.model, request.resume.model_fingerprint, request.request_id)
                return await self._generate(request, model, context)

    async def Chat(self, request: pb.ChatRequest, context: Any) -> None:
        """Streams one answer in a conversation."""
        while True:
            with contextlib.suppress(Superseded):
                model = await self._find(request.model, request.resume.model_fingerprint, request.request_id)
                plan = await self._chats.plan(request, model)
                return await self._generate(plan.request, plan.model, ChatContext(plan.answer, context), plan)

    async def _find(self, name: str, fingerprint: str = "", request_id: str = "") -> ServedModel:
        """The model that is meant, waiting for its first replica where it never had one. Raises ModelNotFound,
        InvalidRequest, Unavailable."""
        patience, request_id = self._dispatcher.patience, request_id or current_call.get().request_id
        give_up = self._clock.now() + patience.first
        while self._models.missing(name) and self._clock.now() < give_up:
            await self._dispatcher.want(name or self._models.expected_one, request_id)
            await sleep(self._clock, patience.most_retry)
        return self._models.find(name, fingerprint)

    async def _generate(
        self, request: pb.GenerateRequest, model: ServedModel, context: Any, plan: Plan | None = None
    ) -> None:
        call = current_call.get()
        if request.request_id:
            call.request_id = valid_request_id(request.request_id)
        else:
            request.request_id = call.request_id
        started = self._clock.now()
        deadline = None if call.deadline_s is None else started + call.deadline_s - _margin(call.deadline_s)
        call.notes["model"] = model.name
        if len(self._dispatcher.streams) >= self._config.max_streams:
            raise Overloaded(f"this gateway carries {self._config.max_streams} streams, all it may; come back in 1 s")
        valid, answer = await self._prepare(request, model, call.salt, started, plan)
        if not answer.to_make:
            for message in answer.open():
                await context.write(message)
            return
        trace = stream_trace(self._tracer, call.span)
        stream = self._dispatcher.open(valid, deadline, answer.to_make, trace)
        had = answer.completion_tokens
        self._metrics.active.inc()
        try:
            await self._pump(stream, answer, context, started)
        finally:
            stream.close()
            self._metrics.active.dec()
            self._metrics.prompt_tokens.labels(model.name).inc(len(valid.prompt) if stream.info is not None else 0)
            self._metrics.completion_tokens.labels(model.name).inc(answer.completion_tokens - had)
            call.notes.update(prompt_tokens=len(valid.prompt), completion_tokens=answer.completion_tokens)
            if answer.finished:
                call.notes["finish"] = ",".join(reason.name for reason in answer.reasons)

    async def _prepare(
        self,
        request: pb.GenerateRequest,
        model: ServedModel,
        salt: str,
        started: float,
        plan: Plan | None,
    ) -> tuple[ValidRequest, Answer]:
        """Checks, encodes, and gets ready to decode: in a thread, where that may take long."""
        infos = [k.info for k in self._dispatcher.pool.alive() if k.info.model == model.name]

        def prepare() -> tuple[ValidRequest, Answer]:
            valid = validate(request, model, salt=salt, infos=infos)
            if plan is not None:
                valid = plan.added_to(valid)
            stops = StopStrings(valid.stop) if valid.stop else None
            return valid, Answer(valid, model, started, stops)

        hard = request.HasField("format")  # a short grammar may be much work
        return await _off_loop(_INLINE + 1 if hard else request.ByteSize(), prepare)

    async def _pump(self, stream: Stream, answer: Answer, context: Any, started: float) -> None:
        """Passes batches on until the answer is finished. Raises what `Stream.next` raises."""
        clock, metrics = self._clock, self._metrics
        last: dict[int, float] = {}
        while not answer.finished:
            try:
                batch = await stream.next()
            except DeadlineExceeded:
                for message in answer.cut(FinishReason.TIMEOUT, clock.now()):
                    await context.write(message)
                raise
            now = clock.now()
            if stream.info is not None:
                answer.info = stream.info
            messages = await _off_loop(_told(batch), partial(answer.add, batch, now))
            if answer.ended(batch.index):
                stream.finish(batch.index)  # a stop string: the engine may be running on
            if batch.token_ids:
                if not last:
                    metrics.first_token.observe(now - started)
                elif batch.index in last:
                    metrics.between.observe(now - last[batch.index])
                last[batch.index] = now
            for message in messages:
                await context.write(message)

    async def Tokenize(self, request: pb.TokenizeRequest, _context: Any) -> pb.TokenizeResponse:
        """Encodes text."""
        model = await self._find(request.model)
        special = request.add_special_tokens if request.HasField("add_special_tokens") else True

        def encode() -> pb.TokenizeResponse:
            ids = model.text.encode(request.text, special)
            texts = [model.text.token_text(i) for i in ids]
            return pb.TokenizeResponse(token_ids=ids, texts=texts, max_context=model.info.max_context)

        return await _off_loop(len(request.text), encode)

    async def Detokenize(self, request: pb.DetokenizeRequest, _context: Any) -> pb.DetokenizeResponse:
        """Decodes token ids."""
        model = await self._find(request.model)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True

        def decode() -> pb.DetokenizeResponse:
            ids = check_token_ids("token_ids", request.token_ids, model.info.vocab_size)
            return pb.DetokenizeResponse(text=model.text.decode(ids, skip))

        return await _off_loop(len(request.token_ids), decode)

    async def ListModels(self, _request: pb.ListModelsRequest, _context: Any) -> pb.ListModelsResponse:
        """Lists what is served."""
        return pb.ListModelsResponse(
            models=[
                pb.Model(
                    name=m.name,
                    model_fingerprint=m.info.model_fingerprint,
                    numerics_id=m.info.numerics_id,
                    max_context=m.info.max_context,
                    vocab_size=m.info.vocab_size,
                    dtype=m.info.dtype,
                    architecture=m.info.architecture,
                    eos_token_ids=m.defaults.eos_token_ids,
                )
                for m in self._models.all()
            ]
        )


def _margin(deadline_s: float) -> float:
    """How much earlier than the client's deadline the answer is cut, so that its end still arrives: a tenth of what
    there is, at most 200 ms."""
    return min(0.2, max(deadline_s, 0.0) / 10)


async def _off_loop(size: int, work: Callable[[], T]) -> T:
    """Runs what takes long in a thread, so that streams go on; what is small is done at once."""
    return work() if size <= _INLINE else await asyncio.to_thread(work)


def _told(batch: Batch) -> int:
    """How many tokens and likely tokens of the prompt a batch tells."""
    return sum(1 + len(p.top) for p in batch.prompt_logprobs or ())


class Gateway:
    """One gateway: server, wires, health. `start`, then `stop`, from one event loop.

    `router` grants replicas, `connect(replica, address)` opens a wire to a leader. Models are told by `models` and
    later by `put_model`. `tracer` makes spans of calls; whoever made it closes it.
    """

    def __init__(
        self,
        config: GatewayConfig,
        router: RouterPort,
        connect: Connect,
        models: Iterable[ServedModel] = (),
        *,
        clock: Clock | None = None,
        timing: Timing | None = None,
        patience: Patience | None = None,
        metrics: Metrics | None = None,
        name: str = "",
        tracer: Tracer | None = None,
    ) -> None:
        self._tracer = tracer
        self.name = name or f"gateway-{secrets.token_hex(4)}"
        self.metrics = metrics if metrics is not None else Metrics()
        self.models = Models(models)
        self._config = config
        clock = clock if clock is not None else LoopClock()
        self.pool = ChannelPool(connect, self.name, clock, timing)
        self._router = FallbackRouter(router, LocalRouter(self.pool, secrets.SystemRandom(), clock), clock)
        self.dispatcher = Dispatcher(self._router, self.pool, clock, patience, self.models.superseded)
        self.health = Health(SERVICE, self.metrics.serving)
        self.told: dict[str, dict[str, str]] = {}  # by model and replica: the last words of those that are gone
        self.can_start = False  # a replica comes when it is asked for: none is needed to be of use
        self._views: list[ReplicaView] = []
        self._chats = Chats()
        self._server: Any = None
        self._watching: asyncio.Task[None] | None = None
        self._connecting: dict[str, asyncio.Task[None]] = {}
        self._counted_failovers = self._counted_alone = 0
        self.port = 0

    def put_model(self, model: ServedModel, order: int = 0) -> None:
        """Answers for this version of a model from now on. The larger `order` is the newer."""
        self.models.put(model, order)

    async def start(self) -> int:
        """Listens; the port. Raises ConfigError where it cannot: port taken, certificate unreadable."""
        tokens = Tokens.read(self._config.tokens) if self._config.tokens is not None else None
        interceptor = CallInterceptor(self.metrics, tokens, self._config.max_message_bytes, self._tracer)
        server: Any = grpc.aio.server(interceptors=[interceptor], options=server_options(self._config))
        service = InferenceService(self.models, self.dispatcher, self.metrics, self._config, self._chats, self._tracer)
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        self.port = bind(server, self._config)
        await self.refresh()
        await server.start()
        self._server = server
        self._watching = asyncio.create_task(self._watch(), name="watch replicas")
        return self.port

    async def stop(self, grace_s: float = 0.0) -> None:
        """Takes nothing new, gives streams `grace_s` seconds to end, then ends them with Unavailable. Idempotent."""
        server, self._server = self._server, None
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self.health.end()
        if server is not None:
            stopping = asyncio.create_task(server.stop(grace_s + 1.0))
            await asyncio.wait([stopping], timeout=grace_s)
            await self.dispatcher.close()
            await stopping
        connecting = list(self._connecting.values())
        for task in connecting:
            task.cancel()
        await asyncio.gather(*connecting, return_exceptions=True)
        self._chats.close()
        await self.pool.close()

    # Which replicas there are, and whether a token can be had.

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.watch_s)
            try:
                await self.refresh()
            except Exception:  # whatever it is: health must stay truthful, so the watch goes on
                log.exception("the replicas could not be looked at")

    async def refresh(self) -> None:
        """Connects to ready replicas, drops those that are gone, tells health and metrics."""
        views = await self._router.replicas()
        await self.pool.prune()
        self._views = views
        self._connecting = {name: task for name, task in self._connecting.items() if not task.done()}
        linked = {(k.replica, k.epoch) for k in self.pool.alive()}
        for view in views:
            if view.state is State.READY and (view.replica, view.epoch) not in linked:
                self._connect_soon(view)
        await self._tell_health()
        self.metrics.failovers.inc(self.dispatcher.failovers - self._counted_failovers)
        self._counted_failovers = self.dispatcher.failovers
        self.metrics.alone.inc(self._router.alone - self._counted_alone)
        self._counted_alone = self._router.alone

    def _connect_soon(self, view: ReplicaView) -> None:
        """Opens the wire before a stream needs it. A failure is no news: the router will call it lost."""
        if view.replica in self._connecting:
            return

        async def connect() -> None:
            try:
                await self.pool.get(Assignment(view.replica, view.address, view.epoch, 0))
            except ConnectionError as error:
                log.info("replica %s at %s: %s", view.replica, view.address, error)
                return
            await self._tell_health()

        self._connecting[view.replica] = asyncio.create_task(connect(), name=f"connect {view.replica}")

    async def _tell_health(self) -> None:
        links = self.pool.alive()
        ready = {(v.replica, v.epoch) for v in self._views if v.state in USABLE}
        usable = [k.info for k in links if (k.replica, k.epoch) in ready]
        self.models.weigh(Counter((i.model, i.model_fingerprint) for i in usable))
        self.metrics.ready_replicas.set(len(usable))
        names = dict.fromkeys(m.name for m in self.models.all())
        verdicts = {name: judge(name, self._views, links, self.told.get(name)) for name in names}
        await self.health.put(verdicts, self.can_start)
