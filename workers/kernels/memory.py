"""Large pieces of memory."""

from __future__ import annotations

import mmap
from contextlib import suppress


def zeroed(size: int) -> mmap.mmap:
    """`size` bytes that cost nothing until they are written, page-aligned, in large pages where the kernel has them:
    the first touch of ordinary ones takes longer than what is then copied there."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
