"""`understudy complete`: one answer, streamed to the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from understudy.cli import common
from understudy.cli.common import Address, Connection, Json, Timeout, TlsCa, TlsCert, TlsKey, Token, UseTls
from understudy.errors import UnderstudyError

if TYPE_CHECKING:
    from understudy._request import GenerateOptions
    from understudy.client import Client, Stream
    from understudy.types import Finish, Piece

_SAMPLING, _STOPPING, _FORMAT = "Sampling", "Stopping", "Format of the answer (one of them)"
_TELLING, _REQUEST = "What is told", "Request"


def _option(help: str, panel: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **settings)


def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from stdin.")],
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
    repetition_penalty: Annotated[
        float | None, _option("Above 1: less of what prompt and answer hold (the model's own, else 1).", _SAMPLING)
    ] = None,
    presence_penalty: Annotated[
        float | None, _option("Taken off the logits of what the answer holds (0).", _SAMPLING)
    ] = None,
    frequency_penalty: Annotated[
        float | None, _option("The same, once per time that it holds it (0).", _SAMPLING)
    ] = None,
    logit_bias: Annotated[
        list[str] | None, _option("Added to a token's logit; may be repeated.", _SAMPLING, metavar="ID=BIAS")
    ] = None,
    bad_word: Annotated[list[str] | None, _option("Never make this; may be repeated.", _SAMPLING)] = None,
    seed: Annotated[int | None, _option("Equal seeds, equal answers (drawn).", _SAMPLING)] = None,
    n: Annotated[int | None, _option("Answers to make of one prompt (1).", _SAMPLING, "--n")] = None,
    json_schema: Annotated[
        str | None, _option("A JSON Schema; @FILE reads it from a file.", _FORMAT, metavar="SCHEMA")
    ] = None,
    regex: Annotated[str | None, _option("A regular expression; @FILE as well.", _FORMAT)] = None,
    grammar: Annotated[str | None, _option("An EBNF grammar; @FILE as well.", _FORMAT)] = None,
    choice: Annotated[list[str] | None, _option("One of these texts; may be repeated.", _FORMAT)] = None,
    json_object: Annotated[bool, _option("Any JSON object.", _FORMAT, "--json-object")] = False,
    explain: Annotated[
        bool, _option("Draw how each token was picked; with --json, tell it.", _TELLING, "--explain")
    ] = False,
    candidates: Annotated[int | None, _option("With --explain: this many candidates (5).", _TELLING)] = None,
    attention: Annotated[
        list[int] | None,
        _option("With --explain: what this layer attended to; may be repeated.", _TELLING, metavar="LAYER"),
    ] = None,
    logprobs: Annotated[int | None, _option("With --json: logprobs, and those of the N likeliest.", _TELLING)] = None,
    prompt_logprobs: Annotated[int | None, _option("The same of the prompt's tokens.", _TELLING)] = None,
    echo: Annotated[bool, _option("Begin with the prompt.", _TELLING, "--echo")] = False,
    model: Annotated[str | None, _option("Name of the model, where there are several.", _REQUEST)] = None,
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

    The answer goes to stdout while it is made, without the prompt; of several answers one after another. With --json
    one object per line: `prompt_info` first, then each `delta`, then `finish`.
    """
    options: GenerateOptions = {
        "model": model,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": _biases(logit_bias),
        "bad_words": bad_word,
        "seed": seed,
        "n": n,
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "stop": stop,
        "stop_token_ids": stop_token_id,
        "ignore_eos": ignore_eos or None,
        "include_stop": include_stop or None,
        "json_schema": _text_or_file(json_schema),
        "regex": _text_or_file(regex),
        "grammar": _text_or_file(grammar),
        "choice": choice,
        "json_object": json_object or None,
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "echo": echo or None,
        "trace": explain or None,
        "trace_candidates": (5 if candidates is None else candidates) if explain else candidates,
        "trace_attention": attention,
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
            elif explain:
                _print_explained(in_order(answer, pieces), n or 1, _texts(client, text, model) if attention else [])
            elif stream:
                _print_stream(in_order(answer, pieces), n or 1)
            else:
                _print_stream(iter([*in_order(answer, pieces)]), n or 1)
        if stats:
            typer.echo(clock.report(answer.finishes), err=True)


def _biases(given: list[str] | None) -> dict[int, float] | None:
    biases: dict[int, float] = {}
    for entry in given or ():
        id, _, bias = entry.partition("=")
        try:
            biases[int(id)] = float(bias)
        except ValueError:
            raise typer.BadParameter(f"{entry!r}: write ID=BIAS, such as 42=-1.5", param_hint="--logit-bias") from None
    return biases or None


def _text_or_file(given: str | None) -> str | None:
    """What was given, or what the file after the @ holds."""
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{given}: cannot be read: {error}") from None


def in_order(answer: Stream, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces of the first sequence as they come, those of the next ones when its turn has come."""
    waiting: dict[int, list[Piece]] = {}
    current = 0
    for piece in pieces:
        ended = {finish.index for finish in answer.finishes}
        while current in ended and piece.index != current:
            current += 1
            yield from waiting.pop(current, [])
        if piece.index == current:
            yield piece
        else:
            waiting.setdefault(piece.index, []).append(piece)
    for _, left in sorted(waiting.items()):
        yield from left


def _headed(pieces: Iterator[Piece], n: int) -> Iterator[tuple[str, Piece]]:
    """Each piece, with a heading where a sequence begins and there are several."""
    index = -1
    for piece in pieces:
        yield (f"--- {piece.index + 1} of {n} ---" if n > 1 and piece.index != index else ""), piece
        index = piece.index


def _print_stream(pieces: Iterator[Piece], n: int) -> None:
    """Whatever ends the answer, what follows on the terminal begins on a line of its own."""
    last = ""
    try:
        for heading, piece in _headed(pieces, n):
            if heading:
                print(heading if not last or last.endswith("\n") else f"\n{heading}")
            print(piece.text, end="", flush=True)
            last = piece.text or last
    except (UnderstudyError, KeyboardInterrupt):
        if last:
            print(flush=True)
        raise
    if not last.endswith("\n"):
        print(flush=True)


def _texts(client: Client, prompt: str, model: str | None) -> list[str]:
    """The texts of the prompt's tokens."""
    return list(client.tokenize(prompt, model=model).texts)


def _print_explained(pieces: Iterator[Piece], n: int, prompt: list[str]) -> None:
    from rich.console import Console

    from understudy.cli.explain import WIDTH, Explainer

    console = Console(highlight=False, emoji=False, markup=False, soft_wrap=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    explainer, text = Explainer(console, prompt), ""
    for heading, piece in _headed(pieces, n):
        if heading:
            explainer.heading(heading)
        explainer.piece(piece)
        text += f"\n{heading}\n{piece.text}" if heading else piece.text
    explainer.heading("the answer")
    console.print(text.removeprefix("\n"), soft_wrap=True)


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
            made = 0 if piece.echo else len(piece.token_ids)
            if not self._tokens:
                self._first, self._first_tokens = self._last, made
            self._tokens += made
            yield piece

    def report(self, finishes: Sequence[Finish]) -> str:
        """Time to first token, tokens after the first piece per second, and what was counted."""
        took = self._last - self._first
        rate = f"{(self._tokens - self._first_tokens) / took:.1f} tok/s" if took > 0 else "too short for tok/s"
        parts = [f"ttft {(self._first - self._start) * 1000:.0f} ms", rate]
        if finishes:
            made = sum(finish.usage.completion_tokens for finish in finishes)
            parts += [f"{finishes[0].usage.prompt_tokens} prompt tokens", f"{made} made"]
            parts += [finish.reason.removeprefix("FINISH_REASON_").lower() for finish in finishes]
        return ", ".join(parts)
