"""What the person at the terminal sees: stages, a bar, the ready line; everything else goes to a file."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import rich.console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)

READY = "understudy: ready on "


class Console:
    """Writes to the stdout and stderr that the process began with, whatever happens to file descriptors 1 and 2.

    Progress goes to stderr: a live line in a terminal, else one line per stage. `ready` and `say` go to stdout.
    """

    def __init__(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._out: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
        self._err: IO[str] = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace")
        self._rich = rich.console.Console(file=self._err)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._began = time.monotonic()

    @contextmanager
    def quiet(self, log: Path, verbose: bool) -> Iterator[None]:
        """Sends what this process and its children write to `log`, unless `verbose`."""
        if verbose:
            yield
            return
        saved = os.dup(1), os.dup(2)
        with log.open("ab") as file:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            self.done()
            sys.stdout.flush()
            sys.stderr.flush()
            for target, old in zip((1, 2), saved, strict=True):
                os.dup2(old, target)
                os.close(old)

    def stage(self, name: str, done: float | None = None) -> None:
        """What is being done now, and the share of it that is."""
        if self._rich.is_terminal:
            progress, task = self._live()
            progress.update(task, description=name, total=None if done is None else 1.0, completed=done or 0.0)
        elif name != self._stage:
            self._err.write(f"{name}\n")
            self._err.flush()
        if name != self._stage:
            log.info("%.1f s: %s", time.monotonic() - self._began, name)
        self._stage = name

    def done(self) -> None:
        """Nothing is being done any more. Idempotent."""
        progress, self._progress, self._task = self._progress, None, None
        if progress is not None:
            progress.stop()
        self._stage = ""

    def say(self, line: str) -> None:
        """A line on stdout."""
        self._out.write(f"{line}\n")
        self._out.flush()

    def ready(self, where: str) -> None:
        """The line that scripts wait for."""
        self.say(f"{READY}{where}")
        log.info("%.1f s: ready on %s", time.monotonic() - self._began, where)

    def _live(self) -> tuple[Progress, TaskID]:
        if self._progress is None or self._task is None:
            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn()
            self._progress = Progress(*columns, console=self._rich, transient=True)
            self._task = self._progress.add_task("")
            self._progress.start()
        return self._progress, self._task
