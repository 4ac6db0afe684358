"""`understudy complete`: one answer, streamed to the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from understudy.cli import common
from understudy.cli.common import Address, Connection, Json, Timeout, TlsCa, TlsCert, TlsKey, Token, UseTls
from understudy.errors import UnderstudyError

if TYPE_CHECKING:
    from understudy._request import GenerateOptions
    from understudy.client import Stream
    from understudy.types import Finish, Piece

_SAMPLING, _STOPPING, _REQUEST = "Sampling", "Stopping", "Request"


def _option(help: str, panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **settings)


def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
    model: Annotated[str | None, _option("Name of the model, where there are several.", _REQUEST)] = None,
    max_tokens: Annotated[int | None, _option("Tokens to make at most (the rest of the context).", _STOPPING)] = None,
    min_tokens: Annotated[int | None, _option("Tokens to make before it may end (0).", _STOPPING)] = None,
    stop: Annotated[list[str] | None, _option("End before this text; may be repeated.", _STOPPING)] = None,
    stop_token_id: Annotated[list[int] | None, _option("End with this token; may be repeated.", _STOPPING)] = None,
    ignore_eos: Annotated[bool, _option("Go on past the model's end of text.", _STOPPING, "--ignore-eos")] = False,
    include_stop: Annotated[bool, _option("Print the stop text too.", _STOPPING, "--include-stop")] = False,
    temperature: Annotated[float | None, _option("0 is greedy (the model's own, else 1).", _SAMPLING)] = None,
    top_k: Annotated[int | None, _option("Choose among the k likeliest; 0: all.", _SAMPLING)] = None,
    top_p: Annotated[float | None, _option("Choose among the likeliest that reach p together.", _SAMPLING)] = None,
    min_p: Annotated[float | None, _option("Leave out what is less likely than p times the best.", _SAMPLING)] = None,
    seed: Annotated[int | None, _option("Equal seeds, equal answers (drawn).", _SAMPLING)] = None,
    logprobs: Annotated[int | None, _option("With --json: logprobs, and those of the N likeliest.", _REQUEST)] = None,
    cache_salt: Annotated[str | None, _option("Share cached prefixes only where this is equal.", _REQUEST)] = None,
    no_cache: Annotated[bool, _option("Compute the whole prompt.", _REQUEST, "--bypass-prefix-cache")] = False,
    priority: Annotated[int | None, _option("Larger goes first when the service is full (0).", _REQUEST)] = None,
    request_id: Annotated[str | None, _option("Name of the request in logs and traces (drawn).", _REQUEST)] = None,
    json: Json = False,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print it while it is made.")] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Print times and counts to stderr.")] = False,
    address: Address = common.ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Timeout = None,
) -> None:
    """Continue a text.

    The answer goes to stdout while it is made, without the prompt. With --json one object per line: `prompt_info`
    first, then each `delta`, then `finish`.
    """
    options: GenerateOptions = {
        "model": model,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop,
        "stop_token_ids": stop_token_id,
        "ignore_eos": ignore_eos or None,
        "include_stop": include_stop or None,
        "logprobs": logprobs,
        "cache_salt": cache_salt,
        "bypass_prefix_cache": no_cache or None,
        "priority": priority,
        "request_id": request_id,
    }
    text = sys.stdin.read() if prompt == "-" else prompt
    with Connection(address, token, tls, tls_ca, tls_cert, tls_key, timeout).open() as client:
        clock = _Clock(time.monotonic)
        with client.generate(text, **options) as answer:
            pieces = clock.watch(answer)
            if json:
                _print_json(answer, pieces)
            elif stream:
                _print_stream(pieces)
            else:
                typer.echo("".join([piece.text for piece in pieces]))
        if stats:
            typer.echo(clock.report(answer.finish), err=True)


def _print_stream(pieces: Iterator[Piece]) -> None:
    """Whatever ends the answer, what follows on the terminal begins on a line of its own."""
    last = ""
    try:
        for piece in pieces:
            print(piece.text, end="", flush=True)
            last = piece.text or last
    except (UnderstudyError, KeyboardInterrupt):
        if last:
            print(flush=True)
        raise
    if not last.endswith("\n"):
        print(flush=True)


def _print_json(answer: Stream, pieces: Iterator[Piece]) -> None:
    told = False
    for piece in pieces:
        if not told:
            print(common.as_json({"prompt_info": answer.prompt}), flush=True)
            told = True
        print(common.as_json({"delta": piece}), flush=True)
    if not told:
        print(common.as_json({"prompt_info": answer.prompt}), flush=True)
    for finish in answer.finishes:
        print(common.as_json({"finish": finish}), flush=True)


class _Clock:
    """When the first and the last piece of an answer came. `now` gives seconds."""

    def __init__(self, now: Any) -> None:
        self._now = now
        self._start = self._first = self._last = now()
        self._tokens = 0
        self._first_tokens = 0

    def watch(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self._last = self._now()
            if not self._tokens:
                self._first, self._first_tokens = self._last, len(piece.token_ids)
            self._tokens += len(piece.token_ids)
            yield piece

    def report(self, finish: Finish | None) -> str:
        """Time to first token, tokens after the first piece per second, and what was counted."""
        took = self._last - self._first
        rate = f"{(self._tokens - self._first_tokens) / took:.1f} tok/s" if took > 0 else "too short for tok/s"
        parts = [f"ttft {(self._first - self._start) * 1000:.0f} ms", rate]
        if finish is not None:
            parts += [f"{finish.usage.prompt_tokens} prompt tokens", f"{finish.usage.completion_tokens} made"]
            parts.append(finish.reason.removeprefix("FINISH_REASON_").lower())
        return ", ".join(parts)
