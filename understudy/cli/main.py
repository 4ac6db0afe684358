"""The command line `understudy`: commands of a client, and those that other rooms add."""

from __future__ import annotations

import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from understudy import __version__
from understudy.cli import bench, chat, complete, experts, inspect
from understudy.cli.common import errors_as_one_line, fail

GROUP = "understudy.commands"
INSTALL = "pip install '.[serve]'"
_OPERATORS = ("status", "experts")  # commands that ask the admin address


class Commands(TyperGroup):
    """Our own commands, and those of the entry-point group, imported only when they are needed.

    Whatever a command raises on purpose becomes one line on stderr.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *sorted(_added())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        added = _added()
        return _load(added[cmd_name]) if cmd_name in added else super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            with errors_as_one_line(lambda: "--admin" if ctx.invoked_subcommand in _OPERATORS else "--address"):
                return super().invoke(ctx)
        except ModuleNotFoundError as error:  # such a command may import what it needs only when it runs
            if ctx.invoked_subcommand not in _added():
                raise
            fail(_way_out(ctx.invoked_subcommand, error.name))


def _added() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _load(point: EntryPoint) -> Any:
    """The command behind an entry point: a function with Typer's annotations, or a Typer application."""
    try:
        target = point.load()
    except ModuleNotFoundError as error:
        return _missing(point.name, error.name)
    if isinstance(target, typer.Typer):
        return typer.main.get_command(target)
    app = typer.Typer(add_completion=False)
    app.command(point.name)(target)
    return typer.main.get_command(app)


def _way_out(name: str, module: str | None) -> str:
    return f"`understudy {name}` needs the package {module!r}, which a client does without; {INSTALL}"


def _missing(name: str, module: str | None) -> Any:
    """Stands for a command whose packages are not installed, and says how to get them."""
    app = typer.Typer(add_completion=False)

    @app.command(
        name,
        help="Not installed here: needs the extra `serve` of the package.",
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )
    def _say(ctx: typer.Context) -> None:
        fail(_way_out(name, module))

    return typer.main.get_command(app)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"understudy {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Completions from open-weight language models, as streams that do not break."""


app.command("complete")(complete.complete)
app.command("chat")(chat.chat)
app.command("models")(inspect.models)
app.command("status")(inspect.status)
app.command("experts")(experts.experts)
app.command("bench")(bench.bench)


def main() -> None:
    """The entry point of the console script."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # what it tells of lost connections we tell in our words
    for stream in (sys.stdout, sys.stderr):
        # A model's text may hold characters that the terminal's encoding lacks.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app()
