"""The process that renders templates: started when first needed, kept warm, ended and replaced when it misbehaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from understudy.errors import Unavailable

_SCRIPT = Path(__file__).with_name("sandbox.py")


class TemplateFailed(Exception):
    """A template did not render. `reason` is refused (it said so itself), forbidden, syntax, failed, time, size or
    memory."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


@dataclass(frozen=True)
class Limits:
    """Of one rendering: seconds, bytes of the process's address space, characters that come out."""

    seconds: float = 2.0
    memory_bytes: int = 1 << 30
    chars: int = 16 << 20


class Renderer:
    """Renders one template at a time. Use from one event loop; `close` ends the process."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits if limits is not None else Limits()
        self.started = 0  # processes so far
        self._process: subprocess.Popen[bytes] | None = None
        self._turn: asyncio.Lock | None = None
        self._closed = False

    async def render(self, template: str, variables: Mapping[str, Any], now: datetime | None = None) -> str:
        """The text. `variables` are of JSON's types; `now` is what the template takes for the time.

        Raises TemplateFailed, and Unavailable once closed.
        """
        at = now if now is not None else datetime.now()
        body = json.dumps({"template": template, "variables": variables, "now": at.isoformat()}).encode()
        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            work = asyncio.create_task(asyncio.to_thread(self._ask, body))
            try:
                answer = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])  # the pipe must not be left between question and answer
                raise
        if "text" in answer:
            return str(answer["text"])
        if answer["error"] == "memory":
            self._end()  # what it holds is not given back for sure
        raise TemplateFailed(answer["error"], answer["message"])

    def close(self) -> None:
        """Ends the process at once. Idempotent."""
        self._closed = True
        self._end()

    def _ask(self, body: bytes) -> dict[str, Any]:
        """In a thread: one question, one answer."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(len(body).to_bytes(4, "big") + body)
            process.stdin.flush()
            head = process.stdout.read(4)
            data = process.stdout.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
        except (BrokenPipeError, ValueError):
            data = b""
        if data:
            found: dict[str, Any] = json.loads(data)
            return found
        code = process.wait()
        self._end()
        if code == -signal.SIGALRM:
            return {"error": "time", "message": f"more than {self.limits.seconds:g} s"}
        if self._closed:
            return {"error": "failed", "message": "the gateway is stopping"}
        return {"error": "memory", "message": f"the process that renders ended with {code}"}

    def _running(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise Unavailable("this gateway is stopping; go on at another")
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        limits = self.limits
        arguments = [str(limits.seconds), str(limits.memory_bytes), str(limits.chars)]
        # -P: the script's folder is no place to import from. No shell, no fork of ours: gRPC has threads here.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_SCRIPT), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONUTF8": "1"},
        )
        self.started += 1
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
