"""Formats of requests: opened beside the steps, asked while the forward runs."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from workers.engine.contract import Grammar
from workers.engine.formats import Formats
from workers.engine.plan import Chunk
from workers.engine.rows import Masks, drafts_of, samples
from workers.engine.sequence import Sequence
from workers.engine.ways import masks_of, opened

_PATIENCE_S = 0.05


class Openings:
    """Sequences whose formats are being compiled, on threads of their own. Its length is their number.

    `vocab_size` is the model's V. Used by the engine's thread.
    """

    def __init__(self, formats: Formats, vocab_size: int) -> None:
        self._formats, self._vocab_size = formats, vocab_size
        self._waiting: list[Sequence] = []
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="format")

    def __len__(self) -> int:
        return len(self._waiting)

    def open(self, sequence: Sequence, grammar: Grammar) -> None:
        sequence.opening = self._threads.submit(opened, self._formats, grammar, sequence.request.generated)
        self._waiting.append(sequence)

    def settle(self, patient: bool) -> list[tuple[Sequence, BaseException | None]]:
        """The sequences whose formats are open by now, and those whose formats cannot be, with the reason. `patient`:
        there is nothing else to do, so that it waits a little until one is open."""
        if patient:
            wait([s.opening for s in self._waiting if s.opening is not None], _PATIENCE_S, FIRST_COMPLETED)
        settled: list[tuple[Sequence, BaseException | None]] = []
        for sequence in [s for s in self._waiting if s.opening is not None and s.opening.done()]:
            future, sequence.opening = sequence.opening, None
            assert future is not None
            self._waiting.remove(sequence)
            error = future.exception()
            if error is None:
                sequence.matcher = future.result()
            settled.append((sequence, error))
        return settled

    def forget(self, sequence: Sequence) -> None:
        """It ended before its format was open."""
        if sequence.opening is not None:
            sequence.opening.cancel()
        self._waiting.remove(sequence)

    def masks(self, planned: Iterable[tuple[Chunk, Sequence]]) -> dict[str, Future[Masks]]:
        """Masks of the sequences that choose a token in this step, computed from now on."""
        futures: dict[str, Future[Masks]] = {}
        for chunk, s in planned:
            if s.matcher is not None and samples(chunk, s):
                drafts, ends = drafts_of(chunk), (*s.request.eos_ids, *s.request.stop_ids)
                futures[s.id] = self._threads.submit(masks_of, s.matcher, drafts, ends, self._vocab_size)
        return futures

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
