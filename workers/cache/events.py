"""What a cache tells of itself: which block it has, on which tier, from now on or no longer."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum


class Tier(IntEnum):
    """Where a block lies, fastest first: the engine's own cache, the host's memory, the shared store."""

    DEVICE = 0
    HOST = 1
    STORE = 2


Observer = Callable[[Tier, bool, bytes], None]
"""Called in the order of events, on the engine's thread, with (tier, present, block key). Quick, and never raises."""
