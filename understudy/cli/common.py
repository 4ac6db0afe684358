"""What the commands share: options of a connection, errors as one line, JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from understudy.errors import UnderstudyError

if TYPE_CHECKING:
    from understudy.aio import AsyncClient
    from understudy.client import Client

ADDRESS = "127.0.0.1:50051"
ADMIN = "127.0.0.1:50052"
# What a shell reports of a program that Ctrl-C, or a reader that went away, has ended: 128 + the signal's number.
EXIT_INTERRUPTED, EXIT_PIPE = 130, 141

_SERVICE = "Service"

Address = Annotated[
    str,
    typer.Option(
        envvar="UNDERSTUDY_ADDRESS",
        metavar="HOST:PORT",
        help="Where the service listens; several with commas between them.",
        rich_help_panel=_SERVICE,
    ),
]
Admin = Annotated[
    str,
    typer.Option(
        envvar="UNDERSTUDY_ADMIN",
        metavar="HOST:PORT",
        help="Where the service listens for operators.",
        rich_help_panel=_SERVICE,
    ),
]
Token = Annotated[
    str | None,
    typer.Option(envvar="UNDERSTUDY_TOKEN", show_envvar=True, help="Bearer token.", rich_help_panel=_SERVICE),
]
UseTls = Annotated[bool, typer.Option("--tls", help="TLS with the system's roots.", rich_help_panel=_SERVICE)]
TlsCa = Annotated[
    Path | None, typer.Option(metavar="FILE", help="TLS with these roots (PEM).", rich_help_panel=_SERVICE)
]
TlsCert = Annotated[
    Path | None, typer.Option(metavar="FILE", help="The client's certificate (PEM).", rich_help_panel=_SERVICE)
]
TlsKey = Annotated[Path | None, typer.Option(metavar="FILE", help="The client's key (PEM).", rich_help_panel=_SERVICE)]
Timeout = Annotated[
    float | None,
    typer.Option(min=0.001, metavar="SECONDS", help="Give up after so long.", rich_help_panel=_SERVICE),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@dataclasses.dataclass(frozen=True)
class Connection:
    """The options of the command line that say where the service is and who asks."""

    address: str
    token: str | None = None
    use_tls: bool = False
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    timeout: float | None = None

    def open(self) -> Client:
        from understudy.client import Client

        return Client(**self._options())

    def open_async(self) -> AsyncClient:
        from understudy.aio import AsyncClient

        return AsyncClient(**self._options())

    def _options(self) -> dict[str, Any]:
        from understudy.types import Tls

        return {
            "address": [part.strip() for part in self.address.split(",")],
            "token": self.token,
            "tls": Tls(self.ca, self.cert, self.key) if self.ca or self.cert or self.key else self.use_tls,
            "timeout": self.timeout,
        }


@contextmanager
def errors_as_one_line(address_flag: Callable[[], str]) -> Iterator[None]:
    """What a command raises becomes one line on stderr and an exit code; a fault of ours keeps its traceback.

    `address_flag` names the command's flag that says where the service is.
    """
    try:
        yield
    except UnderstudyError as error:
        fail(_explain(error, address_flag()))
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError:
        # Python flushes stdout once more at exit; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(EXIT_PIPE) from None


def fail(message: str, code: int = 1) -> NoReturn:
    """Says why on stderr and exits."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def _explain(error: UnderstudyError, address_flag: str) -> str:
    """The error's message, with the way out where only the command line knows it."""
    from understudy import errors
    from understudy._status import ConnectionLost

    if isinstance(error, ConnectionLost) and "failed to connect" in error.message.lower():
        if "refused" in error.message.lower():
            where = f"no service at {error.address}"
            return f"{where}; start one with `make serve` or `understudy serve`, or give {address_flag}"
        tls = "if it wants TLS, give --tls-ca FILE (and --tls-cert and --tls-key where it asks who you are)"
        return f"cannot connect to {error.address}: {error.message}; {tls}"
    if isinstance(error, ConnectionLost):
        return f"the connection broke: {error.message}; is it an Understudy service, and TLS on both sides or none?"
    if isinstance(error, errors.Unauthenticated):
        return f"{error}; give --token or UNDERSTUDY_TOKEN"
    if isinstance(error, errors.Overloaded):
        return f"{error}; try again in {error.retry_after_s:g} s"
    return str(error) or error.kind


def as_json(value: Any) -> str:
    """One line of JSON; dataclasses become objects, protobuf messages too (see `message_dict`)."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if hasattr(value, "DESCRIPTOR"):
        return message_dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON")


def message_dict(message: Any) -> dict[str, Any]:
    """A protobuf message as a dictionary: its own field names, enums by name, and every field, set or not.

    Unlike protobuf's JSON mapping 64-bit integers stay numbers, as JSON parsers of programs expect them.
    """
    return {field.name: _field(message, field) for field in message.DESCRIPTOR.fields}


def _field(message: Any, field: Any) -> Any:
    value = getattr(message, field.name)
    repeated = hasattr(value, "extend")  # protobuf has renamed the property of the descriptor that tells this
    if hasattr(value, "items"):  # a map of scalars
        return dict(sorted(value.items()))
    if field.message_type is not None:
        return [message_dict(v) for v in value] if repeated else message_dict(value)
    if field.enum_type is not None:
        named = field.enum_type.values_by_number
        return named[value].name if value in named else value
    return list(value) if repeated else value


def table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Prints a table; names that come from a server are shown as they are, not read as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table: Any = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
