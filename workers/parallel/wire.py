"""A step's plan as bytes, from the leader to the other ranks: what they need to compute its rows, and no more."""

from __future__ import annotations

from array import array

import msgspec

from workers.cache.orders import Load, Save
from workers.engine.contract import Probe
from workers.engine.plan import Chunk, StepPlan


class _Chunk(msgspec.Struct, array_like=True):
    id: str
    start: int
    tokens: list[int]
    tables: list[bytes]
    wanted: int
    drafts: int
    probe: Probe | None
    long: bool
    whole: bool


class _Plan(msgspec.Struct, array_like=True):
    step: int
    chunks: list[_Chunk]
    floors: list[tuple[int, int]]
    saves: list[Save]
    loads: list[Load]
    gather: bool
    experts: int
    halves: bool


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Plan).decode


def encode_plan(plan: StepPlan) -> bytes:
    """What `decode_plan` reads. Never empty."""
    return _encode(
        _Plan(
            plan.step,
            [
                _Chunk(
                    c.id, c.start, c.tokens, [t.tobytes() for t in c.tables], c.wanted, c.drafts, c.probe, c.long,
                    c.whole,
                )
                for c in plan.chunks
            ],
            plan.floors, plan.saves, plan.loads, plan.gather, plan.experts, plan.halves,
        )
    )  # fmt: skip


def decode_plan(message: bytes) -> StepPlan:
    """The plan, with tables of its own."""
    plan = _decode(message)
    return StepPlan(
        plan.step,
        [
            Chunk(
                c.id, c.start, c.tokens, tuple(array("i", t) for t in c.tables), c.wanted, c.drafts, c.probe,
                long=c.long, whole=c.whole,
            )
            for c in plan.chunks
        ],
        plan.floors, plan.saves, plan.loads, plan.gather, plan.experts, plan.halves,
    )  # fmt: skip
