"""gRPC status codes with `google.rpc.Status` details, to and from the error tree: the one place that maps them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from understudy import errors
from understudy.errors import UnderstudyError

DETAILS_KEY = "grpc-status-details-bin"
DOMAIN = "understudy"
MAX_MESSAGE = 1000  # bytes: statuses travel in headers, and 8 KiB is all that those may have

# A status that carries no word of ours came from gRPC itself, from a proxy, or from another server.
_FROM_CODE: dict[grpc.StatusCode, type[UnderstudyError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequest,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Overloaded,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.FAILED_PRECONDITION: errors.CannotResume,
}

# How gRPC words a connection or stream that a proxy or a dying peer cut.
_RESET = "rst_stream"
_CUT = (_RESET, "stream removed", "connection reset", "socket closed", "transport closed")
_OF_A_CUT: dict[grpc.StatusCode, tuple[str, ...]] = {
    grpc.StatusCode.INTERNAL: _CUT,
    grpc.StatusCode.UNKNOWN: _CUT,
    grpc.StatusCode.CANCELLED: (_RESET,),  # the others are said of a call that we cancelled ourselves, too
    grpc.StatusCode.RESOURCE_EXHAUSTED: (_RESET,),  # "calm down": of a proxy, not of a service that is full
}
_LATE = ("deadline exceeded", "stream removed (deadline exceeded)")


class ConnectionLost(errors.Unavailable):
    """Nobody listens at the address, or the connection to it broke. `address` is the one that was tried."""

    def __init__(self, message: str, address: str = "") -> None:
        super().__init__(message)
        self.address = address


def from_rpc(error: grpc.RpcError, address: str = "") -> UnderstudyError:
    """The error that a failed call means: by `ErrorInfo.reason`, else by its code."""
    meant = from_status(error.code(), error.details() or "", error.trailing_metadata() or (), address)
    meant.__cause__ = error
    return meant


def from_status(code: grpc.StatusCode, message: str, metadata: Iterable[Any], address: str = "") -> UnderstudyError:
    """The error that a code, its message and the trailing metadata (pairs) mean. Unreadable details count as none."""
    info, field, retry_after_s = _details(metadata)
    cls = errors.FROM_KIND.get(info) if info else None
    if cls is None:
        return _foreign(code, message, field, retry_after_s, address)
    return _make(cls, message, field, retry_after_s)


def _foreign(
    code: grpc.StatusCode, message: str, field: str, retry_after_s: float | None, address: str
) -> UnderstudyError:
    """The error of a status without a word of ours."""
    lower = message.lower()
    if code is grpc.StatusCode.UNAVAILABLE or (code in _OF_A_CUT and any(word in lower for word in _OF_A_CUT[code])):
        return ConnectionLost(f"{address}: {message}" if address else message, address)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in lower:
        return errors.InvalidRequest(f"the message is above the size limit: {message}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.InternalError(f"{address or 'the server'} does not serve this API: {message}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded("the deadline passed" if lower in _LATE else message)
    cls = _FROM_CODE.get(code, errors.InternalError)
    return _make(cls, message or f"the server said {code.name} and nothing else", field, retry_after_s)


def _make(cls: type[UnderstudyError], message: str, field: str, retry_after_s: float | None) -> UnderstudyError:
    if issubclass(cls, errors.InvalidRequest):
        return cls(message, field)
    if issubclass(cls, errors.Overloaded) and retry_after_s is not None:
        return cls(message, retry_after_s)
    return cls(message)


def _details(metadata: Iterable[Any]) -> tuple[str, str, float | None]:
    """(reason of ErrorInfo, first field of BadRequest, seconds of RetryInfo); empty where not there."""
    raw = next((value for key, value in metadata if key == DETAILS_KEY), None)
    status = status_pb2.Status()
    try:
        status.ParseFromString(raw if isinstance(raw, bytes) else b"")
        return _unpack(status)
    except DecodeError:  # the code and the message still stand
        return "", "", None


def _unpack(status: status_pb2.Status) -> tuple[str, str, float | None]:
    reason, field, retry_after_s = "", "", None
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    return reason, field, retry_after_s


def to_status(
    error: UnderstudyError, request_id: str = ""
) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """(code, message, trailing metadata) with which a server ends a call, so that `from_status` gives the error.

    A message of more than `MAX_MESSAGE` bytes is cut. `request_id` finds the call in the server's log.
    """
    code: grpc.StatusCode = getattr(grpc.StatusCode, error.code)
    message = clipped(error.message)
    status = status_pb2.Status(code=code.value[0], message=message)
    about = {"request_id": request_id} if request_id else {}
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.kind, domain=DOMAIN, metadata=about))
    if isinstance(error, errors.InvalidRequest) and error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        status.details.add().Pack(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, errors.Overloaded):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(math.ceil(round(error.retry_after_s * 1000, 6)))  # 4.049 s are not 4,050 ms
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return code, message, ((DETAILS_KEY, status.SerializeToString()),)


def clipped(message: str) -> str:
    """The message's first `MAX_MESSAGE` bytes of UTF-8."""
    data = message.encode("utf-8", "replace")
    return message if len(data) <= MAX_MESSAGE else data[:MAX_MESSAGE].decode("utf-8", "ignore") + "..."
