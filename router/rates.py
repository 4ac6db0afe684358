"""How fast a replica computes and loads, from what it reports: work done over time taken, the latest counting most."""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.engine import EngineStats

HALF_LIFE_S = 10.0  # of busy seconds
PRIOR_S = 1.0


@dataclass(slots=True)
class Rate:
    """Tokens per second; 0 until something was done."""

    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float) -> None:
        if tokens > 0 and seconds > 0:
            kept = 0.5 ** (seconds / HALF_LIFE_S)
            self.tokens, self.seconds = kept * self.tokens + tokens, kept * self.seconds + seconds

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def among(self, usual: float) -> float:
        """The value, as far as it is known: `PRIOR_S` of what is usual weigh as much as seconds of its own.

        Rows a second of a few short prompts are far below those of long ones. Taken alone they would keep long ones
        away, and so never be corrected.
        """
        return (self.tokens + PRIOR_S * usual) / (self.seconds + PRIOR_S) if usual else self.value


@dataclass(slots=True)
class Rates:
    """Rows per second of steps that compute prompts; tokens per second from the host's memory, and from the store."""

    prefill: Rate = field(default_factory=Rate)
    host: Rate = field(default_factory=Rate)
    store: Rate = field(default_factory=Rate)

    def measure(self, before: EngineStats, after: EngineStats) -> bool:
        """Takes in what was done between two reports of one engine; False where nothing was."""
        if after.prefill_seconds == before.prefill_seconds:
            return False  # loading ends with computing, if only the last row
        self.prefill.add(after.prefill_rows - before.prefill_rows, after.prefill_seconds - before.prefill_seconds)
        self.host.add(
            after.host_hit_tokens - before.host_hit_tokens, after.host_load_seconds - before.host_load_seconds
        )
        self.store.add(
            after.store_hit_tokens - before.store_hit_tokens, after.store_load_seconds - before.store_load_seconds
        )
        return True
