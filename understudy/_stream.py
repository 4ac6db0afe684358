"""One answer as a state machine without I/O: what was received, what to send next, when it is whole.

A delta carries exactly the ids whose text it completes, so at every moment what the caller has seen and what a
resumed request says he has seen are the same; nothing is buffered, undone or sent twice.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from understudy import _request, errors
from understudy._attempts import Again, Attempts
from understudy.types import Choice, Completion, Finish, FinishReason, Logprob, Piece, PromptInfo, TokenTrace
from understudy.v1 import inference_pb2 as pb


class OutOfStep(errors.Unavailable):
    """Messages are missing or came in another order. Nothing of it was passed on, so that the stream can be resumed."""


@dataclass
class _Sequence:
    """What has been received of one sequence."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    traces: list[TokenTrace] = field(default_factory=list)
    echoed: bool = False
    numbered: bool = False  # its deltas say where they begin
    finish: Finish | None = None


class StreamState:
    """Drive it so: send `request()`, give every response to `receive`, and the end of the call to `ended`; when
    that says Again, wait and start over. `attempts` says where and until when."""

    def __init__(self, request: pb.GenerateRequest | pb.ChatRequest, attempts: Attempts) -> None:
        self.attempts = attempts
        self.prompt: PromptInfo | None = None
        self.cancelled = False
        self._request = request
        self._n = request.sampling.n or 1
        self._sequences: dict[int, _Sequence] = {}
        self._told = False  # this attempt has sent its PromptInfo

    @property
    def complete(self) -> bool:
        """Every sequence has its Finish."""
        return len(self._sequences) == self._n and all(s.finish for s in self._sequences.values())

    def request(self) -> pb.GenerateRequest | pb.ChatRequest:
        """What the next attempt sends: the caller's request, and what was received once there is anything."""
        self._told = False
        if self.prompt is None:
            return self._request
        resumed = copy.deepcopy(self._request)
        resumed.resume.model_fingerprint = self.prompt.model_fingerprint
        resumed.resume.numerics_id = self.prompt.numerics_id
        resumed.resume.prompt_token_ids.extend(self.prompt.prompt_token_ids)
        resumed.resume.seed = self.prompt.seed
        for index, sequence in sorted(self._sequences.items()):
            resumed.resume.sequences.add(index=index, token_ids=sequence.token_ids)
        return resumed

    def receive(self, response: pb.GenerateResponse | pb.ChatResponse) -> Piece | None:
        """What the caller gets of a response, if anything.

        InternalError where the service breaks its protocol, CannotResume where it goes on with another answer,
        OutOfStep where something is missing: the call is of no more use then; `ended` says what follows.
        """
        which = response.WhichOneof("event")
        if which == "prompt_info":
            self._on_prompt_info(response.prompt_info)
            return None
        if self.prompt is None:
            raise errors.InternalError(f"the service sent {which or 'an unknown event'} before prompt_info")
        if which == "delta":
            return self._on_delta(response.delta)
        if which == "finish":
            self._on_finish(response.finish)
        return None  # an event that a later version of the API adds

    def ended(self, error: errors.UnderstudyError | None, now: float) -> Again | None:
        """What follows when a call ends: None (the answer is whole) or Again; otherwise the error is raised."""
        if self.complete and not self._cut_short(error):
            return None
        if self.cancelled:
            raise errors.Cancelled("the caller cancelled, or closed the client") from error
        if error is None:
            raise errors.InternalError("the service ended the stream before the answer was whole")
        return self.attempts.failed(error, now, resuming=self.prompt is not None)

    def completion(self) -> Completion:
        """The whole answer. RuntimeError while it is not whole."""
        if self.prompt is None or not self.complete:
            raise RuntimeError("the answer is not whole yet: read the stream to its end first")
        return Completion(self.prompt, tuple(self._choice(index) for index in range(self._n)))

    def text(self, index: int) -> str:
        return "".join(self._sequences[index].texts) if index in self._sequences else ""

    def token_ids(self, index: int) -> tuple[int, ...]:
        return tuple(self._sequences[index].token_ids) if index in self._sequences else ()

    def finish(self, index: int) -> Finish | None:
        return self._sequences[index].finish if index in self._sequences else None

    def finishes(self) -> tuple[Finish, ...]:
        """Of the sequences that have ended, in the order of their index."""
        return tuple(s.finish for _, s in sorted(self._sequences.items()) if s.finish is not None)

    def _choice(self, index: int) -> Choice:
        sequence = self._sequences[index]
        assert sequence.finish is not None  # `complete` was checked
        text, ids, logprobs = self.text(index), self.token_ids(index), tuple(sequence.logprobs)
        return Choice(index, text, ids, logprobs, sequence.finish, tuple(sequence.traces))

    def _cut_short(self, error: errors.UnderstudyError | None) -> bool:
        """The status says why every sequence ended before its time: that is the caller's error."""
        early = (FinishReason.TIMEOUT, FinishReason.CANCELLED)
        return isinstance(error, (errors.DeadlineExceeded, errors.Cancelled)) and any(
            finish.reason in early for finish in self.finishes()
        )

    def _on_prompt_info(self, message: pb.PromptInfo) -> None:
        if self._told:
            raise errors.InternalError("the service sent prompt_info twice")
        self._told = True
        info = _request.prompt_info(message)
        if self.prompt is None:
            self.prompt = info
            self.attempts.progress()
            return
        for name in ("model_fingerprint", "numerics_id", "prompt_token_ids", "seed"):
            had, has = getattr(self.prompt, name), getattr(info, name)
            if had != has:
                raise errors.CannotResume(f"the stream began with {name} {had!r} and would go on with {has!r}")

    def _piece(self, message: Any) -> Piece:
        return _request.piece(message)

    def _on_delta(self, message: Any) -> Piece | None:
        sequence = self._sequence(message.index)
        if sequence.finish is not None:
            return None  # the service makes the end of a finished sequence again after a resume
        if self._had(message, sequence):
            return None
        piece = self._piece(message)
        if piece.echo:
            if sequence.echoed:
                return None
            sequence.echoed = True
        else:
            sequence.token_ids += piece.token_ids
            sequence.logprobs += piece.logprobs
            sequence.traces += piece.trace.tokens if piece.trace is not None else ()
        sequence.texts.append(piece.text)
        self.attempts.progress()
        return piece if piece.text or piece.token_ids or getattr(piece, "tool_calls", ()) else None

    def _had(self, message: Any, sequence: _Sequence) -> bool:
        """Whether a delta came before. OutOfStep where what comes before it is missing."""
        if not message.HasField("position"):
            return False  # an echo, or a service that does not number them
        sequence.numbered = True
        have, start = len(sequence.token_ids), message.position
        if start == have:
            return False
        again = list(message.token_ids)
        if start > have or start + len(again) > have:
            raise OutOfStep(f"the service sent tokens from {start} on of sequence {message.index}; {have} had come")
        if sequence.token_ids[start : start + len(again)] != again:
            raise errors.InternalError(f"the service sent other tokens of sequence {message.index} from {start} on")
        return True

    def _on_finish(self, message: pb.Finish) -> None:
        sequence = self._sequence(message.index)
        if sequence.finish is not None:
            return
        have, counted = len(sequence.token_ids), message.usage.completion_tokens
        if message.HasField("usage") and counted != have:
            what = f"the service finished sequence {message.index} after {counted} tokens; {have} had come"
            # Where deltas are numbered, only the last ones can be missing; else nobody knows which.
            resumable = counted > have and (sequence.numbered or not have)
            raise OutOfStep(what) if resumable else errors.InternalError(what)
        sequence.finish = _request.finish(message)
        self.attempts.progress()

    def _sequence(self, index: int) -> _Sequence:
        if index >= self._n:
            raise errors.InternalError(f"the service sent sequence {index} of {self._n}, counted from 0")
        return self._sequences.setdefault(index, _Sequence())
