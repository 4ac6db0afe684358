"""Understudy: completions from open-weight models, streamed over gRPC, that go on when an actor falls.

`Client` and `AsyncClient` are loaded when they are first named, so that the error tree alone brings no gRPC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from understudy import errors
from understudy.errors import UnderstudyError

if TYPE_CHECKING:
    from understudy.aio import AsyncChatStream, AsyncClient, AsyncStream
    from understudy.client import ChatStream, Client, Stream
    from understudy.types import Completion, Finish, FinishReason, Message, Piece, PromptInfo, Retry, Tls, ToolCall

__version__ = "0.1.0"
__all__ = [
    "AsyncChatStream",
    "AsyncClient",
    "AsyncStream",
    "ChatStream",
    "Client",
    "Completion",
    "Finish",
    "FinishReason",
    "Message",
    "Piece",
    "PromptInfo",
    "Retry",
    "Stream",
    "Tls",
    "ToolCall",
    "UnderstudyError",
    "errors",
]

_LAZY = {
    "AsyncChatStream": "understudy.aio",
    "AsyncClient": "understudy.aio",
    "ChatStream": "understudy.client",
    "AsyncStream": "understudy.aio",
    "Client": "understudy.client",
    "Stream": "understudy.client",
} | dict.fromkeys(
    ("Completion", "Finish", "FinishReason", "Message", "Piece", "PromptInfo", "Retry", "Tls", "ToolCall"),
    "understudy.types",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'understudy' has no attribute {name!r}")
