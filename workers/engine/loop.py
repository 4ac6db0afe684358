"""The one thread that runs an engine, and the sessions through which others talk to it.

| owns | does not own |
|---|---|
| the thread that calls `engine.add`, `cancel` and `step` | what a step does: the engine |
| which session asked for which sequence | how outputs travel: the session's sink |
| when to sleep, to drain and to stop | whether a wedged engine is killed: its supervisor |

Ids are unique per session only: inside, each carries its session's number.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from understudy.errors import InvalidRequest, Unavailable
from workers.cache.events import Journal
from workers.engine.contract import (
    Engine,
    EngineInfo,
    EngineStats,
    Request,
    SequenceOutput,
    StepOutput,
)
from workers.engine.stall import FLOOR_S, StallBound

log = logging.getLogger(__name__)

Sink = Callable[[StepOutput], None]


class Session:
    """One caller's end of a loop. Its methods may be called from any thread and never block on a step."""

    def __init__(self, loop: EngineLoop, number: int, sink: Sink) -> None:
        self._loop = loop
        self._prefix = f"{number}:"
        self._sink = sink
        self._live: set[str] = set()  # ids not yet finished; guarded by the loop's lock
        self.closed = False

    def submit(self, request: Request) -> None:
        """Queues a sequence; its tokens reach the sink.

        Raises InvalidRequest when this session already has a sequence of that id, Unavailable when the session is
        closed or the loop is draining, stopped or failed.
        """
        self._loop._submit(self, request)

    def cancel(self, id: str) -> None:
        """Ends a sequence; the sink gets CANCELLED for it unless it had finished. Unknown ids are ignored."""
        self._loop._cancel(self, id)

    def close(self) -> None:
        """Cancels all that this session asked for; its sink is not called for later steps. Idempotent."""
        self._loop._close(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(slots=True)
class _Owner:
    """Who waits for a sequence, and under which id."""

    session: Session
    id: str


class EngineLoop:
    """Runs `engine` on a thread of its own from construction until `stop` or a failure of the engine.

    `clock` gives seconds; `wedged_after_s` is how long one step may take before `wedged` says so, and `stall_floor_s`
    the least before `trouble` does (`workers.engine.stall`). `on_error` is called once, on the engine thread, when the
    engine failed. `concern`: what somebody who watches it has found (`workers.engine.pulse`).
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Callable[[], float] = time.monotonic,
        wedged_after_s: float = 60.0,
        stall_floor_s: float = FLOOR_S,
        on_error: Callable[[BaseException], None] | None = None,
        name: str = "engine",
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._wedged_after_s = wedged_after_s
        self._on_error = on_error
        self._bound = StallBound(engine.info.chunk_tokens, stall_floor_s)
        self.concern = ""
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._commands: deque[Request | str] = deque()  # in order: a request to add, or an inner id to cancel
        self._owners: dict[str, _Owner] = {}  # inner id -> owner; guarded by the lock
        self._sessions = 0
        self._draining = False
        self._stopping = False
        self._busy_since: float | None = None  # start of the step under way, or end of the last one while work is left
        self._step = 0
        self._stats = EngineStats()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def journal(self) -> Journal:
        """Which blocks the engine has; read from any thread."""
        return self._engine.journal

    def attach(self, sink: Sink) -> Session:
        """A new session. Per step, `sink` gets one StepOutput with all of this session's tokens, on the engine
        thread: it must be quick and must not block. A sink that raises closes its session."""
        with self._lock:
            self._sessions += 1
            return Session(self, self._sessions, sink)

    def stats(self) -> EngineStats:
        """Counts after the latest step; requests that no step has seen yet count as waiting."""
        with self._lock:
            stats = msgspec.structs.replace(self._stats)
            stats.waiting += sum(1 for c in self._commands if not isinstance(c, str))
        return stats

    def last_step_age(self) -> float:
        """Seconds since the engine last got something done while it had work; 0 when it is idle."""
        since = self._busy_since
        return 0.0 if since is None else max(0.0, self._clock() - since)

    @property
    def wedged(self) -> bool:
        """A step has been running for longer than `wedged_after_s`, or the engine thread is gone unasked."""
        if not self._thread.is_alive() and not self._stopping:
            return True
        return self.last_step_age() > self._wedged_after_s

    def trouble(self) -> str:
        """What keeps it from making tokens, in words; empty where nothing does."""
        if self.error is not None:
            return f"the engine failed: {self.error}"
        if not self._thread.is_alive() and not self._stopping:
            return "the engine's thread is gone"
        age = self.last_step_age()
        if age > self._bound.seconds:
            return f"a step has been running for {age:.1f} s; the slowest before took {self._bound.slowest_s:.2f} s"
        return self.concern

    @property
    def draining(self) -> bool:
        return self._draining

    def drain(self, deadline: float | None = None) -> bool:
        """Refuses new sequences and waits until those under way have ended, or until `clock()` reaches `deadline`.

        True when nothing is left. Blocks the calling thread; sequences go on after the deadline until `stop`.
        """
        with self._lock:
            self._draining = True
            while self._owners:
                left = None if deadline is None else deadline - self._clock()
                if left is not None and left <= 0:
                    return False
                self._idle.wait(left)
            return True

    def stop(self, timeout_s: float | None = None) -> bool:
        """Cancels what is left (sinks get CANCELLED), ends the thread and closes the engine. Idempotent.

        False when the step under way did not end within `timeout_s` seconds; the thread is then left behind. `error`
        is set where the engine then still held something.
        """
        with self._lock:
            self._draining = self._stopping = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def __enter__(self) -> EngineLoop:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    # What sessions do, on their callers' threads.

    def _submit(self, session: Session, request: Request) -> None:
        inner = session._prefix + request.id
        with self._lock:
            if session.closed:
                raise Unavailable("this session is closed; attach a new one")
            if self.error is not None:
                raise Unavailable(f"the engine failed: {self.error}")
            if self._draining:
                raise Unavailable("the engine is draining; send the request to another replica")
            if request.id in session._live:
                raise InvalidRequest(f"id {request.id!r} is in use by a running sequence; choose another", "id")
            session._live.add(request.id)
            self._owners[inner] = _Owner(session, request.id)
            self._commands.append(msgspec.structs.replace(request, id=inner))
            self._wake.notify()

    def _cancel(self, session: Session, id: str) -> None:
        with self._lock:
            if id in session._live:
                self._commands.append(session._prefix + id)
                self._wake.notify()

    def _close(self, session: Session) -> None:
        with self._lock:
            session.closed = True
            for id in sorted(session._live):
                self._commands.append(session._prefix + id)
            self._wake.notify()

    # The engine thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._turn()
            self._finish_all()
        except BaseException as error:  # a thread has no caller: what stopped it is kept, told and logged
            self._fail(error)
        finally:
            self._busy_since = None
            self._engine.close()

    def _wait_for_work(self) -> bool:
        """Sleeps until there is something to do; False when it is time to stop."""
        with self._lock:
            while not (self._stopping or self._commands or self._engine.has_work()):
                self._busy_since = None
                self._wake.wait()
            return not self._stopping

    def _turn(self) -> None:
        """Applies what was asked for and runs one step."""
        self._busy_since = self._clock()
        self._apply()
        self._advance()

    def _advance(self) -> None:
        """Runs one step, where there is work, and hands every session its share."""
        outputs = self._engine.step() if self._engine.has_work() else []
        self._step += 1
        began, self._busy_since = self._busy_since, self._clock()
        self._stats = self._measured(self._busy_since - (began or self._busy_since))
        self._deliver(outputs)

    def _measured(self, seconds: float) -> EngineStats:
        """The engine's counts after a step that took so long, and how fast prompts are computed."""
        stats, before = msgspec.structs.replace(self._engine.stats()), self._stats
        stats.prefill_rows, stats.prefill_seconds = before.prefill_rows, before.prefill_seconds
        prompts = stats.computed_prompt_tokens - before.computed_prompt_tokens
        rows = prompts + stats.generated_tokens - before.generated_tokens
        self._bound.note(seconds, rows)
        if prompts > 0:
            stats.prefill_rows += rows
            stats.prefill_seconds += seconds
        return stats

    def _apply(self) -> None:
        with self._lock:
            commands, self._commands = self._commands, deque()
        for command in commands:
            if isinstance(command, str):
                self._engine.cancel(command)
            else:
                self._engine.add(command)

    def _deliver(self, outputs: list[SequenceOutput]) -> None:
        shares: dict[Session, list[SequenceOutput]] = {}
        with self._lock:
            for output in outputs:
                owner = self._owners[output.id]
                if output.finish is not None:
                    del self._owners[output.id]
                    owner.session._live.discard(owner.id)
                output.id = owner.id
                if not owner.session.closed:
                    shares.setdefault(owner.session, []).append(output)
            if not self._owners:
                self._idle.notify_all()
        for session, share in shares.items():
            self._send(session, StepOutput(self._step, share))

    def _send(self, session: Session, output: StepOutput) -> None:
        try:
            session._sink(output)
        except Exception:
            log.exception("a session's sink failed; the session is closed and its sequences are cancelled")
            session.close()

    def _finish_all(self) -> None:
        """Ends what is left with CANCELLED: one more step frees its blocks and reports it. Nothing may be held then."""
        self._apply()
        for inner in list(self._owners):
            self._engine.cancel(inner)
        while self._engine.has_work():
            self._advance()
        self._engine.check_idle()

    def _fail(self, error: BaseException) -> None:
        log.error("the engine failed: %s", error, exc_info=error)
        with self._lock:
            self.error = error
            self._commands.clear()
            sessions = {owner.session for owner in self._owners.values()}
            for session in sessions:
                session._live.clear()
            self._owners.clear()
            self._idle.notify_all()
        for session in sessions:  # every stream goes on elsewhere
            self._send(session, StepOutput(self._step, [], lost=f"the engine failed: {type(error).__name__}: {error}"))
        if self._on_error is not None:
            self._on_error(error)
