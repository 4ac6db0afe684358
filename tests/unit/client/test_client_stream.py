"""The state machine of one answer, without a server: no gap, nothing twice, whatever breaks where."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy import Retry, errors
from understudy._attempts import Attempts
from understudy._request import generate_request
from understudy._stream import OutOfStep, StreamState
from understudy.v1 import inference_pb2 as pb

INFO = pb.PromptInfo(
    request_id="r", model="m", model_fingerprint="f", numerics_id="n", prompt_token_ids=[1, 2], prompt_tokens=2, seed=9
)
GONE = errors.Unavailable("gone")


def state(n: int | None = None, echo: bool = False, **retry: float) -> StreamState:
    attempts = Attempts(Retry(**({"resume_attempts": 10_000} | retry)), 2, 0, None, random.Random(0))  # type: ignore[arg-type]
    return StreamState(generate_request([1, 2], {"n": n, "echo": echo or None}), attempts)


def info(**other: object) -> pb.GenerateResponse:
    message = pb.PromptInfo()
    message.CopyFrom(INFO)
    for name, value in other.items():
        setattr(message, name, value)
    return pb.GenerateResponse(prompt_info=message)


def delta(*ids: int, index: int = 0) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(index=index, text="".join(f"<{i}>" for i in ids), token_ids=ids))


def echo_of(index: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(delta=pb.Delta(index=index, text="<prompt>", token_ids=[1, 2], echo=True))


def finish(index: int = 0, reason: int = pb.FINISH_REASON_EOS) -> pb.GenerateResponse:
    return pb.GenerateResponse(finish=pb.Finish(index=index, reason=reason))  # type: ignore[arg-type]


def rest(answers: list[list[int]], request: pb.GenerateRequest, sizes: st.DataObject) -> list[pb.GenerateResponse]:
    """What a correct server sends for `request`: interleaved, in deltas of any size, finished sequences again."""
    had = {s.index: list(s.token_ids) for s in request.resume.sequences}
    queues = []
    for index, ids in enumerate(answers):
        received = had.get(index, [])
        assert ids[: len(received)] == received, "the client claims tokens that were never sent"
        left, queue = ids[len(received) :], []
        while left:
            size = sizes.draw(st.integers(1, len(left)))
            queue.append(delta(*left[:size], index=index))
            left = left[size:]
        if request.response.echo and index not in had:
            queue.insert(0, echo_of(index))
        queues.append([*queue, finish(index)])
    messages = [info()]
    while any(queues):
        queue = sizes.draw(st.sampled_from([q for q in queues if q]))
        messages.append(queue.pop(0))
    return messages


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=4),
    st.lists(st.integers(0, 12), max_size=8),
    st.booleans(),
    st.data(),
)
def test_whatever_breaks_the_caller_sees_one_whole_answer(
    answers: list[list[int]], breaks: list[int], echo: bool, data: st.DataObject
) -> None:
    s = state(n=len(answers), attempts=100, echo=echo)
    seen: list[list[int]] = [[] for _ in answers]
    texts = ["" for _ in answers]
    for at in [*breaks, None]:
        messages = rest(answers, s.request(), data)
        for message in messages[:at]:
            piece = s.receive(message)
            if piece is not None:
                seen[piece.index] += piece.token_ids if not piece.echo else ()
                texts[piece.index] += piece.text
        broke = at is not None
        again = s.ended(GONE if broke else None, now=0.0)
        if again is None:
            break
        assert broke
    assert seen == answers
    assert texts == [("<prompt>" if echo else "") + "".join(f"<{i}>" for i in ids) for ids in answers]
    completion = s.completion()
    assert [list(c.token_ids) for c in completion.choices] == answers
    assert [c.text for c in completion.choices] == texts


def test_the_request_is_the_callers_until_the_prompt_is_known() -> None:
    s = state()
    plain = s.request()
    s.ended(GONE, 0.0)
    assert s.request() == plain
    assert plain.response.token_ids
    s.receive(info())
    s.ended(GONE, 0.0)
    assert s.request().resume == pb.Resume(model_fingerprint="f", numerics_id="n", prompt_token_ids=[1, 2], seed=9)
    assert not plain.HasField("resume")


def test_a_sequence_is_listed_once_something_of_it_came() -> None:
    s = state(n=3)
    s.request()
    for message in (info(), delta(5, 6, index=2), finish(1), delta(7, index=2)):
        s.receive(message)
    resumed = s.request().resume
    assert [(q.index, list(q.token_ids)) for q in resumed.sequences] == [(1, []), (2, [5, 6, 7])]


@pytest.mark.parametrize("name", ["model_fingerprint", "numerics_id", "seed"])
def test_a_stream_that_goes_on_differently_is_refused(name: str) -> None:
    s = state()
    s.request()
    s.receive(info())
    s.ended(GONE, 0.0)
    s.request()
    with pytest.raises(errors.CannotResume, match=name):
        s.receive(info(**{name: 1 if name == "seed" else "other"}))


def test_the_first_prompt_info_stays() -> None:
    s = state()
    s.request()
    s.receive(info())
    first = s.prompt
    s.ended(GONE, 0.0)
    s.request()
    s.receive(info(request_id="other"))
    assert s.prompt is first


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([delta(1)], "delta before prompt_info"),
        ([finish()], "finish before prompt_info"),
        ([pb.GenerateResponse()], "unknown event before"),
        ([info(), info()], "twice"),
        ([info(), delta(1, index=1)], "sequence 1 of 1"),
        ([info(), finish(reason=77)], "finish reason 77"),
        ([info(), finish(reason=0)], "finish reason 0"),
    ],
    ids=["delta", "finish", "nothing", "twice", "index", "reason", "unspecified"],
)
def test_a_broken_protocol_is_said_loudly(messages: list[pb.GenerateResponse], complaint: str) -> None:
    s = state()
    s.request()
    for message in messages[:-1]:
        s.receive(message)
    with pytest.raises(errors.InternalError, match=complaint):
        s.receive(messages[-1])


def test_an_end_before_the_finish_is_an_error() -> None:
    s = state()
    s.request()
    s.receive(info())
    with pytest.raises(errors.InternalError, match="before the answer was whole"):
        s.ended(None, 0.0)


def test_events_of_a_later_version_are_passed_over() -> None:
    s = state()
    s.request()
    s.receive(info())
    assert s.receive(pb.GenerateResponse()) is None


@pytest.mark.parametrize(
    ("reason", "status", "raised"),
    [
        (pb.FINISH_REASON_EOS, GONE, None),
        (pb.FINISH_REASON_EOS, errors.DeadlineExceeded("late"), None),
        (pb.FINISH_REASON_TIMEOUT, None, None),
        (pb.FINISH_REASON_TIMEOUT, errors.DeadlineExceeded("late"), errors.DeadlineExceeded),
        (pb.FINISH_REASON_CANCELLED, errors.Cancelled("by the service"), errors.Cancelled),
    ],
    ids=["gone", "late", "timeout", "timeout-late", "cancelled"],
)
def test_a_status_after_the_finish(
    reason: int, status: errors.UnderstudyError | None, raised: type[errors.UnderstudyError] | None
) -> None:
    s = state()
    s.request()
    for message in (info(), delta(1), finish(reason=reason)):
        s.receive(message)
    if raised is None:
        assert s.ended(status, 0.0) is None
    else:
        with pytest.raises(raised):
            s.ended(status, 0.0)
    assert s.text(0) == "<1>"


def test_crashes_without_progress_are_bounded() -> None:
    s = state(resume_attempts=3)
    for _ in range(3):
        s.request()
        s.receive(info())  # a repeated prompt_info is no progress
        assert s.ended(GONE, 0.0) is not None
    with pytest.raises(errors.Unavailable):
        s.ended(GONE, 0.0)


def test_progress_counts_the_breaks_anew() -> None:
    s = state(resume_attempts=1)
    for k in range(20):
        s.request()
        s.receive(info())
        s.receive(delta(k))
        assert s.ended(GONE, 0.0) is not None
    assert s.token_ids(0) == tuple(range(20))


def test_what_comes_after_a_finish_is_dropped() -> None:
    s = state(n=2)
    s.request()
    for message in (info(), delta(1), finish()):
        s.receive(message)
    s.ended(GONE, 0.0)
    s.request()
    s.receive(info())
    assert s.receive(delta(2)) is None
    s.receive(finish(reason=pb.FINISH_REASON_LENGTH))
    assert s.token_ids(0) == (1,)
    assert [f.reason for f in s.finishes()] == ["FINISH_REASON_EOS"]
    assert not s.complete


def test_an_echo_is_text_and_no_token_and_comes_once() -> None:
    s = state(n=2, echo=True)
    s.request()
    for message in (info(), echo_of(1), delta(7, index=1)):
        s.receive(message)
    assert (s.text(1), s.token_ids(1)) == ("<prompt><7>", (7,))
    s.ended(GONE, 0.0)
    assert [(q.index, list(q.token_ids)) for q in s.request().resume.sequences] == [(1, [7])]
    s.receive(info())
    assert s.receive(echo_of(1)) is None  # a service that repeats it
    piece = s.receive(echo_of(0))
    assert piece is not None
    assert (piece.echo, piece.token_ids) == (True, (1, 2))
    assert s.token_ids(0) == ()


def numbered(position: int, *ids: int) -> pb.GenerateResponse:
    message = delta(*ids)
    message.delta.position = position
    return message


@given(st.lists(st.integers(0, 9), min_size=1, max_size=12), st.integers(0, 2**32))
def test_numbered_deltas_in_any_order_are_taken_once_or_asked_for_again(ids: list[int], seed: int) -> None:
    """Attempts send the rest in deltas of any size, some twice, some not, in any order; the last one is honest."""
    chance, s = random.Random(seed), state()
    end = pb.GenerateResponse(finish=pb.Finish(reason=1, usage=pb.Usage(completion_tokens=len(ids))))  # type: ignore[arg-type]
    for honest in (False, False, False, False, True):
        s.request()
        start, messages = len(s.token_ids(0)), [end]
        while start < len(ids):
            size = chance.randint(1, len(ids) - start)
            times = 1 if honest else chance.choice([0, 1, 1, 1, 2])
            messages[-1:-1] = [numbered(start, *ids[start : start + size])] * times
            start += size
        if not honest:
            chance.shuffle(messages)
        s.receive(info())
        try:
            for message in messages:
                s.receive(message)
        except OutOfStep as gap:
            s.ended(gap, 0.0)
        assert list(s.token_ids(0)) == ids[: len(s.token_ids(0))]
        if s.complete:
            break
    assert s.complete
    assert list(s.token_ids(0)) == ids


def test_a_delta_that_came_half_is_asked_for_again_and_one_with_other_tokens_is_an_error() -> None:
    s = state()
    s.request()
    for message in (info(), numbered(0, 1, 2, 3)):
        s.receive(message)
    assert s.receive(numbered(1, 2, 3)) is None
    with pytest.raises(OutOfStep, match="from 2 on of sequence 0; 3 had come"):
        s.receive(numbered(2, 3, 4))
    with pytest.raises(errors.InternalError, match="other tokens"):
        s.receive(numbered(1, 9))
    assert s.token_ids(0) == (1, 2, 3)


@pytest.mark.parametrize(("counted", "kind"), [(2, errors.InternalError), (4, OutOfStep)])
def test_a_finish_that_counts_other_tokens_than_came(counted: int, kind: type[errors.UnderstudyError]) -> None:
    s = state()
    s.request()
    for message in (info(), numbered(0, 1, 2, 3)):
        s.receive(message)
    with pytest.raises(kind, match=f"after {counted} tokens; 3 had come"):
        s.receive(pb.GenerateResponse(finish=pb.Finish(reason=1, usage=pb.Usage(completion_tokens=counted))))  # type: ignore[arg-type]
    assert s.finish(0) is None
