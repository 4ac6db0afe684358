"""Every error survives the way over the wire, and foreign statuses become the nearest error."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from understudy import errors
from understudy._status import DETAILS_KEY, ConnectionLost, from_status, to_status

Code = grpc.StatusCode


def make(cls: type[errors.UnderstudyError], message: str, field: str, seconds: float) -> errors.UnderstudyError:
    if issubclass(cls, errors.InvalidRequest):
        return cls(message, field)
    if issubclass(cls, errors.Overloaded):
        return cls(message, seconds)
    return cls(message)


@given(
    st.sampled_from(sorted(errors.FROM_KIND)),
    st.text(max_size=50),
    st.sampled_from(["", "sampling.top_p"]),
    st.integers(0, 10**7).map(lambda ms: ms / 1000),
)
@example("OVERLOADED", "", "", 4.049)
def test_there_and_back(kind: str, message: str, field: str, seconds: float) -> None:
    error = make(errors.FROM_KIND[kind], message, field, seconds)
    back = from_status(*to_status(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


def test_every_kind_has_a_code_of_grpc() -> None:
    for cls in errors.FROM_KIND.values():
        assert to_status(cls("x"))[0] is getattr(Code, cls.code)


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK], ids=lambda c: c.name)
@pytest.mark.parametrize("junk", [b"", b"\xff\xff\xff", "text"], ids=["empty", "damaged", "text"])
def test_every_foreign_code_is_an_error_of_ours(code: grpc.StatusCode, junk: object) -> None:
    error = from_status(code, "what happened", [("x", "y"), (DETAILS_KEY, junk)], "host:1")
    assert "what happened" in str(error)
    if code.name in {cls.code for cls in errors.FROM_KIND.values()}:
        assert error.code == code.name


def test_damaged_detail_inside_a_whole_status() -> None:
    broken = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff")
    raw = status_pb2.Status(code=3, details=[broken]).SerializeToString()
    assert type(from_status(Code.INVALID_ARGUMENT, "m", [(DETAILS_KEY, raw)])) is errors.InvalidRequest


def test_a_word_of_somebody_else_counts_as_none() -> None:
    status = status_pb2.Status(code=16)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="API_KEY_EXPIRED", domain="elsewhere"))
    error = from_status(Code.UNAUTHENTICATED, "expired", [(DETAILS_KEY, status.SerializeToString())])
    assert type(error) is errors.Unauthenticated


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [
        (Code.UNAVAILABLE, "failed to connect to all addresses", ConnectionLost),
        (Code.INTERNAL, "Received RST_STREAM with error code 2", ConnectionLost),
        (Code.UNKNOWN, "Stream removed", ConnectionLost),
        (Code.UNKNOWN, "Exception calling application: 'x'", errors.InternalError),
        (Code.INTERNAL, "a fault", errors.InternalError),
        (Code.DATA_LOSS, "", errors.InternalError),
        (Code.UNIMPLEMENTED, "Method not found!", errors.InternalError),
        (Code.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (9 vs. 4)", errors.InvalidRequest),
        (Code.RESOURCE_EXHAUSTED, "too many pings", errors.Overloaded),
        (Code.OUT_OF_RANGE, "x", errors.InvalidRequest),
        (Code.DEADLINE_EXCEEDED, "Deadline Exceeded", errors.DeadlineExceeded),
    ],
)
def test_how_grpc_words_its_own_failures(code: grpc.StatusCode, message: str, expected: type) -> None:
    error = from_status(code, message, [], "host:1")
    assert type(error) is expected
    assert str(error)


def test_unavailable_from_the_service_is_no_lost_connection() -> None:
    assert type(from_status(*to_status(errors.Unavailable("no replica is ready")))) is errors.Unavailable
