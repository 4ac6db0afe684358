"""What can go wrong, as a tree. Imports nothing, so that anybody may catch these without gRPC.

Every class has one `kind`: the same word in the logs, in the metrics' label and in `google.rpc.ErrorInfo.reason`,
and one gRPC status code. `FROM_KIND` finds a class by that word.
"""

from __future__ import annotations

from typing import ClassVar


class UnderstudyError(Exception):
    """Base of everything that this service or its client raises on purpose.

    `message` is for people: it names what was given and the way out.
    """

    kind: ClassVar[str] = "INTERNAL"
    code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class InternalError(UnderstudyError):
    """A fault of the service; the request may be sent again, at the caller's risk."""


class InvalidRequest(UnderstudyError):
    """A field of the request is out of its bounds. `field` is its path, such as `sampling.top_p`."""

    kind = "INVALID_REQUEST"
    code = "INVALID_ARGUMENT"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(f"{field}: {message}" if field and not message.startswith(field) else message)
        self.field = field


class ModelNotFound(UnderstudyError):
    """No model of that name is served."""

    kind = "MODEL_NOT_FOUND"
    code = "NOT_FOUND"


class Overloaded(UnderstudyError):
    """The service is full. Come back after `retry_after_s` seconds."""

    kind = "OVERLOADED"
    code = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(UnderstudyError):
    """The caller's deadline passed; the tokens made until then were sent."""

    kind = "DEADLINE_EXCEEDED"
    code = "DEADLINE_EXCEEDED"


class Cancelled(UnderstudyError):
    """The caller cancelled."""

    kind = "CANCELLED"
    code = "CANCELLED"


class Unavailable(UnderstudyError):
    """Nothing can answer right now. The only error that a client tries again."""

    kind = "UNAVAILABLE"
    code = "UNAVAILABLE"


class Unauthenticated(UnderstudyError):
    """The bearer token or client certificate is missing or unknown."""

    kind = "UNAUTHENTICATED"
    code = "UNAUTHENTICATED"


class PermissionDenied(UnderstudyError):
    """The caller is known and may not do this."""

    kind = "PERMISSION_DENIED"
    code = "PERMISSION_DENIED"


class CannotResume(UnderstudyError):
    """The broken stream cannot go on identically here: other weights or other arithmetic."""

    kind = "CANNOT_RESUME"
    code = "FAILED_PRECONDITION"


class CheckpointError(UnderstudyError):
    """A checkpoint is missing a file or tensor, is damaged, or is of an unknown architecture. Names the file."""

    kind = "CHECKPOINT"
    code = "FAILED_PRECONDITION"


class ConfigError(UnderstudyError):
    """A key of the configuration is unknown, out of bounds, or contradicts another. Names the key."""

    kind = "CONFIG"
    code = "INVALID_ARGUMENT"


FROM_KIND: dict[str, type[UnderstudyError]] = {
    c.kind: c
    for c in (
        InternalError,
        InvalidRequest,
        ModelNotFound,
        Overloaded,
        DeadlineExceeded,
        Cancelled,
        Unavailable,
        Unauthenticated,
        PermissionDenied,
        CannotResume,
        CheckpointError,
        ConfigError,
    )
}
