"""Weights on their way from the disk while something else is done: the kernel is told which files will be read."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

log = logging.getLogger(__name__)

_SHARE = 0.5  # of the memory that is free: what is read must not drive out what is used


def read_ahead(directory: Path) -> threading.Thread | None:
    """Begins to read a checkpoint's weights into the page cache, in a thread of its own; None where that is not
    possible or there is no room. What lies there already costs nothing."""
    files = sorted(directory.glob("*.safetensors"))
    try:
        size = sum(file.stat().st_size for file in files)
    except OSError:  # whoever loads them says it better
        return None
    if not files or not hasattr(os, "posix_fadvise") or size > _SHARE * free_memory():
        return None
    thread = threading.Thread(target=_advise, args=(files,), name="read ahead", daemon=True)
    thread.start()
    return thread


def _advise(files: list[Path]) -> None:
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            return
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError as error:  # some file systems know nothing of it
            log.debug("%s cannot be read ahead: %s", file, error)
        finally:
            os.close(descriptor)


def free_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can be had without swapping; 0 where nobody says it."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
