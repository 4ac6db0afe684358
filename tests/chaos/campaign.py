"""Many faults under steady streams: what was lost, what was different, how long each made a stream wait."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import KINDS, Director, Fault, memory_of, missing
from service_process import Service
from streams import NOTED_S, RETRY, Cast, Gap, Tally, parts

from understudy.client import Client

RECOVERED_S = 180.0
WHOLE_EVERY = 10  # faults; after the others the next one comes as soon as there is one of everything again


def stage(text_model: Path, demo_model: Path | None) -> dict[str, Any]:
    """The configuration of the campaign's service."""
    text = {"path": str(text_model), "dtype": "float32", "threads": 1}
    models: dict[str, Any] = {
        "text": text | {"replicas": 2, "speculate": "ngram"},
        "shared": text | {"replicas": 2, "tensor_parallel": 2},
    }
    if demo_model is not None:
        models["demo"] = {"path": str(demo_model), "replicas": 2, "threads": 1, "expert_hosts": 2}
    if demo_model == text_model:
        models["shared"]["expert_parallel"] = True
    return {"models": models, "gateways": 2, "drain_seconds": 10}


@dataclass
class Outcome:
    """`pauses` in seconds, see there; `memory` in bytes, whenever the service was whole; `recoveries`:
    seconds until the next fault could come."""

    faults: list[Fault] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    pauses: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0


AFTER_S = 3.0  # by then a silent replica counts as lost


def run(
    service: Service, wanted: Mapping[str, int], demo: str, *, faults: int, streams: int, seed: int,
    kinds: Sequence[str] = KINDS, say: Callable[[str], None] = lambda _text: None,
) -> Outcome:  # fmt: skip
    """Learns what is right, then plays with faults until there were enough. Raises AssertionError where the service
    does not get over one."""
    others = [name for name in wanted if name not in ("text", demo)]
    cast = Cast(lambda: Client(service.address, retry=RETRY), parts("text", others, demo), streams, seed)
    cast.learn()
    say(f"{len(cast.expected)} answers learned")
    director, result = Director(service, seed, kinds=kinds), Outcome(tally=cast.tally)
    begun = time.monotonic()
    cast.start()
    for number in range(1, faults + 1):
        time.sleep(director.chance())
        fault = director.strike()
        recovered = _wait(service, wanted, fault, number % WHOLE_EVERY == 0 or number == faults)
        result.faults.append(fault)
        result.recoveries.append(recovered)
        if number % WHOLE_EVERY == 0 or number == faults:
            result.memory.append(memory_of(service))
        done = cast.tally
        say(
            f"{number}/{faults} {fault.kind} at {fault.moment - begun:.0f} s: again after {recovered:.1f} s; "
            f"{done.finished} streams, {len(done.wrong)} wrong, {len(done.lost)} lost"
        )
    cast.stop()
    result.seconds = time.monotonic() - begun
    result.pauses = pauses(result.faults, cast.tally.gaps, streams)
    return result


def _wait(service: Service, wanted: Mapping[str, int], fault: Fault, whole: bool) -> float:
    """Until the service is whole, or has one of everything."""
    begun, some = time.monotonic(), dict.fromkeys(wanted, 1)
    need: dict[str, Any] = (
        {"wanted": wanted, "gateways": 2, "hosts": 2} if whole else {"wanted": some, "gateways": 1, "hosts": 0}
    )
    killed = {t.pid for t in fault.targets if fault.how == "kill"}
    while why := missing(service, killed=killed, **need):
        assert time.monotonic() - begun < RECOVERED_S, f"after {fault.kind}: {why} after {RECOVERED_S:.0f} s"
        time.sleep(0.25)
    return time.monotonic() - begun


def pauses(faults: list[Fault], gaps: list[Gap], streams: int) -> dict[str, list[float]]:
    """By kind, for every fault and each of the streams the longest gap that it may have made; 0 where that is none of
    note."""
    found: dict[str, list[float]] = {}
    for fault in faults:
        until = fault.moment + fault.seconds + AFTER_S
        longest = [0.0] * streams
        for gap in gaps:
            if gap.ended >= fault.moment and gap.begun <= until:
                longest[gap.thread] = max(longest[gap.thread], gap.ended - max(gap.begun, fault.moment))
        found.setdefault(fault.kind, []).extend(longest)
    return found


def table(result: Outcome) -> str:
    """Markdown."""
    lines = [
        "| fault | times | a stream's pause: p50 | p99 | longest |",
        "|---|--:|--:|--:|--:|",
    ]
    for kind in sorted(result.pauses):
        lines.append(_row(kind, sum(f.kind == kind for f in result.faults), result.pauses[kind]))
    lines.append(_row("all", len(result.faults), [p for longest in result.pauses.values() for p in longest]))
    return "\n".join(lines)


def _row(kind: str, times: int, longest: list[float]) -> str:
    figures = [statistics.median(longest), statistics.quantiles(longest, n=100)[98], max(longest)]
    shown = " | ".join(f"{f:.2f} s" if f else f"< {NOTED_S:g} s" for f in figures)
    return f"| {kind} | {times} | {shown} |"
