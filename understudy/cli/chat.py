"""`understudy chat`: a conversation in the terminal, or one answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from understudy.cli import common
from understudy.cli.common import Address, Connection, Timeout, TlsCa, TlsCert, TlsKey, Token, UseTls
from understudy.errors import Cancelled, UnderstudyError

if TYPE_CHECKING:
    from understudy.client import Client
    from understudy.types import Message

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_HELP = "/system TEXT sets the instructions, /reset forgets the conversation, Ctrl-C stops an answer, Ctrl-D leaves."


def chat(
    message: Annotated[str | None, typer.Argument(help="What to say; without it a conversation begins.")] = None,
    system: Annotated[str | None, typer.Option(help="Instructions for the whole conversation.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, where there are several.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to make at most (the rest of the context).")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy (the model's own, else 1).")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds, equal answers (drawn).")] = None,
    effort: Annotated[str | None, typer.Option(help="Thought: none, low, medium or high.")] = None,
    budget: Annotated[int | None, typer.Option(help="Tokens of thought at most.")] = None,
    hide_thought: Annotated[bool, typer.Option("--hide-thought", help="Print the answer alone.")] = False,
    address: Address = common.ADDRESS,
    token: Token = None,
    tls: UseTls = False,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    timeout: Timeout = None,
) -> None:
    """Talk with a model.

    In a conversation, /system TEXT sets the instructions, /reset forgets what was said, Ctrl-C stops an answer and
    Ctrl-D leaves. What the model thinks is dimmed.
    """
    options: dict[str, Any] = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "effort": effort,
        "budget": budget,
        "hide_thought": hide_thought,
    }
    with Connection(address, token, tls, tls_ca, tls_cert, tls_key, timeout).open() as client:
        talk = _Talk(client, options, system)
        if message is not None:
            talk.say(message)
        else:
            talk.go_on(input)


class _Talk:
    """A conversation: what was said, and how to go on."""

    def __init__(self, client: Client, options: dict[str, Any], system: str | None) -> None:
        self._client = client
        self._options = options
        self._system = system
        self._said: list[Message] = []
        self._dim = sys.stdout.isatty()

    def go_on(self, ask: Callable[[str], str]) -> None:
        """Until the end of input."""
        typer.echo(_HELP, err=True)
        while True:
            try:
                line = ask("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print()
                continue
            if line.startswith("/"):
                self._command(line)
            elif line:
                try:
                    self.say(line)
                except KeyboardInterrupt:
                    typer.echo("(stopped)", err=True)
                except UnderstudyError as error:
                    typer.echo(f"error: {error}", err=True)

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self._said = []
        elif name == "/system":
            self._system = rest.strip() or None
        else:
            typer.echo(_HELP, err=True)

    def say(self, text: str) -> None:
        """One message and its answer, which joins the conversation, stopped or not; one that failed does not."""
        from understudy.types import Message

        first = [Message("system", self._system)] if self._system else []
        question = Message("user", text)
        with self._client.chat([*first, *self._said, question], **self._options) as stream:
            try:
                self._print(stream)
            except (KeyboardInterrupt, Cancelled):
                self._said += [question, stream.message] if stream.message.content else []
                raise
            self._said += [question, stream.message]

    def _print(self, stream: Any) -> None:
        thinking, last = False, ""
        try:
            for piece in stream:
                if piece.reasoning:
                    last = self._show(piece.reasoning, _DIM if self._dim else "")
                    thinking = True
                if piece.text:
                    if thinking:
                        print("\n")
                    last, thinking = self._show(piece.text, ""), False
                for part in piece.tool_calls:
                    if part.call is not None:
                        last = self._show(f"{part.call.name}({common.as_json(dict(part.call.arguments))})\n", "")
        finally:
            if last and not last.endswith("\n"):
                print(flush=True)

    @staticmethod
    def _show(text: str, style: str) -> str:
        print(f"{style}{text}{_PLAIN}" if style else text, end="", flush=True)
        return text
