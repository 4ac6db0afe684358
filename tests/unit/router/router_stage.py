"""A gateway with replicas in memory, and the proof that nothing of it is left at the end; helpers of these tests."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from router.channels import Timing
from router.clock import LoopClock
from router.dispatch import Patience
from router.fakes import FakeReplica, MemoryRouter
from router.gateway import Gateway
from router.models import SamplingDefaults, ServedModel
from router.server import GatewayConfig
from router.state import Router
from router.text import ModelText
from router.tracing import Tracer
from understudy.v1 import inference_pb2 as pb
from understudy.v1 import inference_pb2_grpc
from workers.engine import Request
from workers.engine.fake import FakeEngine
from workers.grammar.vocabulary import byte_of_char

VOCAB = 300  # the model's; its tokenizer has fewer
EOS, BOS = 256, 257


def tokenizer_json() -> bytes:
    """A byte-level tokenizer: id b is the byte b; 256 ends, 257 begins; 258 is a whole word."""
    vocab = byte_of_char() | {"<eos>": EOS, "<bos>": BOS, "Ġhello": 258}
    added = [
        {"id": i, "content": c, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for c, i in (("<eos>", EOS), ("<bos>", BOS))
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    return json.dumps(tree).encode()


def problem(error: grpc.aio.AioRpcError) -> tuple[str, str, error_details_pb2.ErrorInfo, list[Any]]:
    """Code, message, ErrorInfo and the other details of a refused call."""
    raw = dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(raw)
    info, others = error_details_pb2.ErrorInfo(), []
    kinds = (error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    for detail in status.details:
        if not detail.Unpack(info):
            others += [m for kind in kinds if detail.Unpack(m := kind())]
    return error.code().name, error.details() or "", info, others


class Answer:
    """A stream's messages, put together."""

    def __init__(self, messages: Sequence[pb.GenerateResponse]) -> None:
        self.messages = list(messages)
        deltas = [m.delta for m in messages if m.HasField("delta")]
        self.infos = [m.prompt_info for m in messages if m.HasField("prompt_info")]
        self.deltas = deltas
        self.text = "".join(d.text for d in deltas)
        self.ids = [i for d in deltas for i in d.token_ids]
        self.finishes = [m.finish for m in messages if m.HasField("finish")]

    @property
    def finish(self) -> pb.Finish:
        assert len(self.finishes) == 1
        assert self.messages[-1].HasField("finish")
        assert self.messages[0].HasField("prompt_info")
        assert len(self.infos) == 1
        return self.finishes[0]

    @property
    def reason(self) -> str:
        return pb.FinishReason.Name(self.finish.reason).removeprefix("FINISH_REASON_")


class Stage:
    """Replicas, router and gateway of one test."""

    def __init__(self, text: ModelText) -> None:
        self.text = text
        self.router = MemoryRouter(Router(LoopClock(), heartbeat_timeout=1.0))
        self.replicas: dict[str, FakeReplica] = {}
        self.gateway: Gateway | None = None
        self.channel: grpc.aio.Channel | None = None
        self.stub: Any = None
        self.gates: list[Gate] = []

    def add_replica(self, name: str = "r0", *, epoch: int = 1, **engine: Any) -> FakeReplica:
        engine = {"vocab_size": VOCAB, "max_context": 256} | engine
        replica = FakeReplica(name, FakeEngine(**engine), epoch=epoch)
        old = self.replicas.get(name)
        if old is not None:
            old.stop()
        self.replicas[name] = replica
        self.router.add(replica)
        return replica

    async def open(
        self,
        config: GatewayConfig | None = None,
        timing: Timing | None = None,
        patience: Patience | None = None,
        defaults: SamplingDefaults | None = None,
        serve_models: bool = True,
        tracer: Tracer | None = None,
    ) -> Gateway:
        """Starts the gateway, with a client."""
        if not self.replicas:
            self.add_replica()
        info = next(iter(self.replicas.values())).loop.info
        model = ServedModel(info, self.text, defaults or SamplingDefaults(eos_token_ids=(EOS,)))
        config = config or GatewayConfig(port=0)
        self.gateway = Gateway(
            config,
            self.router,
            self.router.connect,
            [model] if serve_models else [],
            timing=timing or Timing(ping_s=0.05, heartbeat_timeout=30.0),
            patience=patience or Patience(retry=0.01),
            tracer=tracer,
        )
        port = await self.gateway.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.stub = inference_pb2_grpc.InferenceStub(self.channel)  # type: ignore[no-untyped-call]
        return self.gateway

    async def generate(self, request: pb.GenerateRequest | None = None, **fields: Any) -> Answer:
        """Sends a request and takes the whole answer."""
        request = request if request is not None else pb.GenerateRequest(**({"text": "hi"} | fields))
        return Answer([m async for m in self.stub.Generate(request)])

    async def refused(self, **fields: Any) -> tuple[str, str, Any, list[Any]]:
        """Sends a request that must be refused; how it was."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.generate(**fields)
        return problem(caught.value)

    def gate(self) -> Gate:
        gate = Gate()
        self.gates.append(gate)
        return gate

    async def close(self) -> None:
        """Ends everything and asserts that nothing is left."""
        for gate in self.gates:
            gate.open()
        if self.channel is not None:
            await self.channel.close()
        if self.gateway is not None:
            await until(lambda: not self.gateway.dispatcher.streams)
            assert sum(link.attempts for link in self.gateway.pool.alive()) == 0
            await self.gateway.stop()
            assert self.gateway.metrics.active._value.get() == 0
        for replica in self.replicas.values():
            assert not replica.channels
            replica.stop()
            assert replica.engine.closed  # type: ignore[attr-defined]
            replica.engine.check_idle()
        if self.router.reachable:
            assert self.router.router.leases == 0


class Gate:
    """Lets an engine make steps one by one: its `sleep`."""

    def __init__(self) -> None:
        self._permits = threading.Semaphore(0)
        self._free = False

    def __call__(self, _seconds: float) -> None:
        while not self._free and not self._permits.acquire(timeout=0.05):
            pass

    def let(self, steps: int) -> None:
        """Permits this many more steps."""
        for _ in range(steps):
            self._permits.release()

    def open(self) -> None:
        """No more waiting."""
        self._free = True


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Waits for a condition that must come true."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # what is waited for belongs to others
            await asyncio.sleep(0.002)


def says(*answers: str | Sequence[int]) -> Callable[[Request], Sequence[int]]:
    """An engine's script: the same answer always, from text or from ids."""
    ids = [b for a in answers for b in (a.encode() if isinstance(a, str) else a)]
    return lambda _request: ids


def left(before: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Tasks that were not there before."""
    return {t for t in asyncio.all_tasks() - before if t is not asyncio.current_task()}
