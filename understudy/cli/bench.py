"""`understudy bench`: how fast a running service answers, as its clients see it."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from understudy.cli import common
from understudy.cli.common import Address, Connection, Json, Timeout, TlsCa, TlsCert, TlsKey, Token, UseTls

if TYPE_CHECKING:
    from understudy.aio import AsyncClient


@dataclass(frozen=True)
class Load:
    """What is asked: `requests` answers of exactly `tokens` tokens, `streams` at a time."""

    streams: int
    requests: int
    prompt_tokens: int
    tokens: int
    model: str | None
    vocab_size: int
    seed: int


@dataclass(frozen=True)
class Sample:
    """One answer: seconds to its first token and to its end, and tokens received."""

    ttft_s: float
    total_s: float
    tokens: int


def bench(
    streams: Annotated[int, typer.Option(min=1, help="Answers at the same time.")] = 16,
    requests: Annotated[int | None, typer.Option(min=1, help="Answers in all (4 per stream).")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 64,
    model: Annotated[str | None, typer.Option(help="Name of the model, where there are several.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    json: Json = False,
    address: Address = common.ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Timeout = None,
) -> None:
    """Measure a running service: tokens per second, and the time to the first token.

    Prompts are random tokens, each another, so that no cache answers; answers do not end early. What is measured
    includes this client's own work and the way to the service.
    """
    connection = Connection(address, token, tls, tls_ca, tls_cert, tls_key, timeout)
    with connection.open() as client:
        known = {m.name: m for m in client.models()}
        if model is not None and model not in known:
            common.fail(f"no model {model!r} at {address}; there are {', '.join(sorted(known))}")
        chosen = known[model] if model else next(iter(known.values()), None)
    if chosen is None:
        common.fail(f"the service at {address} has no model")
    if prompt_tokens + tokens > chosen.max_context:
        common.fail(
            f"--prompt-tokens {prompt_tokens} and --tokens {tokens} are more than the context of {chosen.name}, "
            f"{chosen.max_context} tokens"
        )
    load = Load(streams, requests or 4 * streams, prompt_tokens, tokens, model, chosen.vocab_size, seed)
    samples, took = asyncio.run(_measure(connection.open_async(), load))
    figures = summary(load, samples, took)
    typer.echo(common.as_json(figures) if json else _lines(figures))


async def _measure(client: AsyncClient, load: Load) -> tuple[list[Sample], float]:
    """(samples, seconds that all of them took), after one answer that warms up connection and service."""
    prompts = _prompts(load)
    samples: list[Sample] = []
    async with client:
        await _one(client, load, next(prompts))
        todo = iter(range(load.requests))

        async def worker() -> None:
            for _ in todo:
                samples.append(await _one(client, load, next(prompts)))

        start = time.monotonic()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(load.streams, load.requests)):
                    group.create_task(worker())
        except ExceptionGroup as failed:  # one error says what is wrong; the others were cancelled by it or alike
            raise failed.exceptions[0] from None
        return samples, time.monotonic() - start


def _prompts(load: Load) -> Iterator[list[int]]:
    chance = random.Random(load.seed)
    while True:
        yield [chance.randrange(load.vocab_size) for _ in range(load.prompt_tokens)]


async def _one(client: AsyncClient, load: Load, prompt: list[int]) -> Sample:
    start = time.monotonic()
    first = None
    async with client.generate(
        prompt, model=load.model, max_tokens=load.tokens, ignore_eos=True, bypass_prefix_cache=True, seed=load.seed
    ) as stream:
        async for _ in stream:
            first = first or time.monotonic()
        end = time.monotonic()
        finish = stream.finish
    made = finish.usage.completion_tokens if finish else len(stream.token_ids)
    return Sample((first or end) - start, end - start, made)


def summary(load: Load, samples: list[Sample], took_s: float) -> dict[str, float]:
    """Figures of a run; `token_ms` is the time between tokens after the first, averaged over each answer."""
    tokens = sum(s.tokens for s in samples)
    ttft = [s.ttft_s * 1000 for s in samples]
    between = [(s.total_s - s.ttft_s) * 1000 / (s.tokens - 1) for s in samples if s.tokens > 1]
    return {
        "streams": load.streams,
        "requests": len(samples),
        "prompt_tokens": load.prompt_tokens,
        "tokens": tokens,
        "seconds": took_s,
        "tokens_per_s": tokens / took_s,
        "requests_per_s": len(samples) / took_s,
        "ttft_ms_p50": percentile(ttft, 0.5),
        "ttft_ms_p95": percentile(ttft, 0.95),
        "token_ms_p50": percentile(between, 0.5),
        "token_ms_p95": percentile(between, 0.95),
    }


def percentile(values: list[float], q: float) -> float:
    """The smallest value that at least the share `q` of all values does not exceed (nearest rank); 0 of none."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)] if values else 0.0


def _lines(f: dict[str, float]) -> str:
    return "\n".join(
        (
            f"{f['requests']} answers, {f['streams']} at a time, {f['prompt_tokens']} prompt tokens each: "
            f"{f['tokens']:,} tokens in {f['seconds']:.1f} s",
            f"output       {f['tokens_per_s']:,.1f} tokens/s, {f['requests_per_s']:,.2f} answers/s",
            f"first token  p50 {f['ttft_ms_p50']:,.0f} ms, p95 {f['ttft_ms_p95']:,.0f} ms",
            f"each further p50 {f['token_ms_p50']:,.1f} ms, p95 {f['token_ms_p95']:,.1f} ms",
        )
    )
