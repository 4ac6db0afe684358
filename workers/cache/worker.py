"""A thread with a queue of tasks, and the box in which threads leave what the engine's thread picks up."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)


class Worker(Generic[T]):
    """Hands `handle` the tasks one by one, on a thread of its own, after `begin`. Both deal with their failures."""

    def __init__(self, name: str, handle: Callable[[T], None], begin: Callable[[], None] = lambda: None) -> None:
        self._handle, self._begin = handle, begin
        self._tasks: deque[T] = deque()
        self._wake = threading.Condition()
        self._closing = self._working = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, task: T) -> None:
        with self._wake:
            self._tasks.append(task)
            self._wake.notify()

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being handled."""
        with self._wake:
            return not self._tasks and not self._working

    def take(self, most: int) -> list[T]:
        """For `handle`: up to `most` tasks that wait behind the one it has, taken off the queue."""
        with self._wake:
            return [self._tasks.popleft() for _ in range(min(most, len(self._tasks)))]

    def clear(self) -> list[T]:
        """Takes all tasks off the queue."""
        with self._wake:
            tasks, self._tasks = list(self._tasks), deque()
        return tasks

    def close(self, timeout_s: float) -> bool:
        """Ends the thread once the queue is empty; False where that takes longer than `timeout_s`."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        self._begin()
        while True:
            with self._wake:
                self._working = False
                while not self._tasks:
                    if self._closing:
                        return
                    self._wake.wait()
                task = self._tasks.popleft()
                self._working = True
            try:
                self._handle(task)
            except Exception:  # a fault of ours: the store is a help that answers do not depend on
                log.exception("a task of the prefix store failed")


class Box(Generic[T]):
    """What threads leave, in order."""

    def __init__(self) -> None:
        self._things: deque[T] = deque()
        self._there = threading.Condition()

    def put(self, thing: T) -> None:
        with self._there:
            self._things.append(thing)
            self._there.notify()

    def put_all(self, things: Iterable[T]) -> None:
        """Whoever waits is woken once."""
        with self._there:
            self._things.extend(things)
            self._there.notify()

    def take(self) -> list[T]:
        """All that is there. For one thread."""
        if not self._things:
            return []
        with self._there:
            return [self._things.popleft() for _ in range(len(self._things))]

    def wait(self, timeout_s: float) -> None:
        """Until something is there."""
        with self._there:
            if not self._things:
                self._there.wait(timeout_s)
