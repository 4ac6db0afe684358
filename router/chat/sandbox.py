"""Renders chat templates; run as a program of its own, by file, so that it loads jinja2 and nothing of ours.

A template comes with a checkpoint from a stranger. It runs in jinja2's immutable sandbox, in a process that has a
bound on its memory and that a timer of the kernel ends. Each message is a length of four bytes (big-endian) and JSON:
in comes {template, variables, now}, out goes {text} or {error, message}. The end of stdin is the end.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Refused(Exception):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}` marks what a model is trained on; here its content is just content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Not jinja2's own, which escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: object) -> None:
    raise _Refused(str(message))


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers sets it up, for that is what templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    return environment


_ENVIRONMENT = _environment()


@lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    return _ENVIRONMENT.from_string(source)


def _render(request: dict[str, Any], max_chars: int) -> dict[str, str]:
    now = datetime.fromisoformat(request["now"])
    parts: list[str] = []
    size = 0
    variables = request["variables"] | {"strftime_now": now.strftime}
    for part in _compiled(request["template"]).generate(variables):
        size += len(part)
        if size > max_chars:
            return {"error": "size", "message": f"more than {max_chars} characters"}
        parts.append(part)
    text = "".join(parts)
    text.encode()  # half a surrogate pair cannot travel
    return {"text": text}


def _answer(request: dict[str, Any], max_chars: int) -> dict[str, str]:
    try:
        return _render(request, max_chars)
    except _Refused as error:
        return {"error": "refused", "message": str(error)}
    except SecurityError as error:
        return {"error": "forbidden", "message": str(error)}
    except TemplateSyntaxError as error:
        return {"error": "syntax", "message": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        return {"error": "memory", "message": "too much memory"}
    except (TemplateError, Exception) as error:  # whatever a stranger's template makes Python raise
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"[:1000]}


def _read(stream: BinaryIO) -> bytes | None:
    head = stream.read(4)
    if len(head) < 4:
        return None
    body = stream.read(int.from_bytes(head, "big"))
    return body


def main(max_seconds: float, max_bytes: int, max_chars: int) -> None:
    """Serves until stdin ends. `max_bytes` is of address space."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which closes our stdin
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends this process, whatever it is doing
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    while (body := _read(sys.stdin.buffer)) is not None:
        signal.setitimer(signal.ITIMER_REAL, max_seconds)
        answer = _answer(json.loads(body), max_chars)
        signal.setitimer(signal.ITIMER_REAL, 0)
        data = json.dumps(answer).encode()
        sys.stdout.buffer.write(len(data).to_bytes(4, "big") + data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
