"""Understudy: completions from open-weight models, streamed over gRPC, that go on when an actor falls.

`Client` and `AsyncClient` are loaded when they are first named, so that the error tree alone brings no gRPC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from understudy import errors
from understudy.errors import UnderstudyError

if TYPE_CHECKING:
    from understudy.aio import AsyncClient, AsyncStream
    from understudy.client import Client, Stream
    from understudy.types import Completion, Finish, FinishReason, Piece, PromptInfo, Retry, Tls

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Completion",
    "Finish",
    "FinishReason",
    "Piece",
    "PromptInfo",
    "Retry",
    "Stream",
    "Tls",
    "UnderstudyError",
    "errors",
]

_LAZY = {
    "AsyncClient": "understudy.aio",
    "AsyncStream": "understudy.aio",
    "Client": "understudy.client",
    "Stream": "understudy.client",
} | dict.fromkeys(("Completion", "Finish", "FinishReason", "Piece", "PromptInfo", "Retry", "Tls"), "understudy.types")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'understudy' has no attribute {name!r}")
