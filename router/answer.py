"""One answer: batches of tokens become the messages that a client sees."""

from __future__ import annotations

import msgspec

from router.detokenizer import Detokenizer, Piece
from router.dispatch import Batch
from router.models import ServedModel
from router.stops import StopStrings
from router.validate import ValidRequest
from understudy.v1 import inference_pb2 as pb
from workers.engine import FinishReason, TokenLogprob

_ENDS = (FinishReason.EOS, FinishReason.STOP_TOKEN)


class Answer:
    """Turns batches into messages, in order: PromptInfo once, deltas, one Finish.

    `stops` is the automaton of the request's stop strings. Token ids always reach up to the token that ended the
    answer, as usage counts them; `include_stop` is about text.
    """

    def __init__(
        self, request: ValidRequest, model: ServedModel, started: float, stops: StopStrings | None = None
    ) -> None:
        self._request = request
        self._model = model
        self._started = started
        self._text = Detokenizer(model.text.decoder(request.prompt), stops, request.include_stop, request.received)
        self._ids: list[int] = []  # not yet passed on
        self._logprobs: list[TokenLogprob] = []
        self._opened = False
        self.info = model.info  # of the replica that answers
        if request.pinned is not None:
            fingerprint, numerics = request.pinned
            self.info = msgspec.structs.replace(model.info, model_fingerprint=fingerprint, numerics_id=numerics)
        self.completion_tokens = len(request.received)
        self.finish: FinishReason | None = None

    def complete(self) -> list[pb.GenerateResponse] | None:
        """All messages of an answer that the client already has in full; None where tokens are missing."""
        request = self._request
        last = request.received[-1:]
        later = len(request.received) > request.min_tokens
        if self._text.stop is not None:
            reason, matched = FinishReason.STOP_SEQUENCE, self._text.stop
        elif later and last and last[0] in request.eos_ids:
            reason, matched = FinishReason.EOS, None
        elif later and last and last[0] in request.stop_ids:
            reason, matched = FinishReason.STOP_TOKEN, None
        elif len(request.received) >= request.max_tokens:
            reason, matched = FinishReason.LENGTH, None
        else:
            return None
        return [*self.open(0), self._end(reason, matched, last)]

    def open(self, cached_tokens: int) -> list[pb.GenerateResponse]:
        """PromptInfo, unless it was made already. `cached_tokens` are prompt tokens that the prefix tree spared."""
        if self._opened:
            return []
        self._opened = True
        request, info = self._request, self.info
        return [
            pb.GenerateResponse(
                prompt_info=pb.PromptInfo(
                    request_id=request.request_id,
                    model=request.model,
                    model_fingerprint=info.model_fingerprint,
                    numerics_id=info.numerics_id,
                    prompt_token_ids=request.prompt,
                    prompt_tokens=len(request.prompt),
                    cached_tokens=pb.CachedTokens(device=cached_tokens),
                    seed=request.sampling.seed,
                )
            )
        ]

    def add(self, batch: Batch, now: float) -> list[pb.GenerateResponse]:
        """Messages of a batch. Nothing may be added once `finish` is set."""
        messages = [] if self._opened else self.open(batch.cached_tokens or 0)
        ids = batch.token_ids
        self._ids += ids
        self._logprobs += batch.logprobs
        silent = batch.finish in _ENDS and not self._request.include_stop and bool(ids)
        piece = self._text.push(ids[:-1] if silent else ids)
        if piece.stop is None and batch.finish is not None:
            if silent:
                self._text.push_silent()
            piece = _joined(piece, self._text.finish())
        last = self._send(messages, piece, batch.step, now)
        if piece.stop is not None:
            messages.append(self._end(FinishReason.STOP_SEQUENCE, piece.stop, last))
        elif batch.finish is not None:
            messages.append(self._end(batch.finish, None, last))
        return messages

    def cut(self, reason: FinishReason, now: float) -> list[pb.GenerateResponse]:
        """What is held back, and an end that nobody foresaw: TIMEOUT or CANCELLED."""
        messages = self.open(0)
        last = self._send(messages, self._text.finish(), 0, now)
        messages.append(self._end(reason, None, last))
        return messages

    def _send(self, messages: list[pb.GenerateResponse], piece: Piece, step: int, now: float) -> list[int]:
        """Appends a delta of this piece, if there is anything in it; the ids that it completes."""
        n = piece.ids
        ids, self._ids = self._ids[:n], self._ids[n:]
        logprobs, self._logprobs = self._logprobs[:n], self._logprobs[n:]
        self.completion_tokens += n
        if not n and not piece.text:
            return ids
        message = pb.GenerateResponse()
        delta = message.delta
        delta.text = piece.text
        if self._request.want_token_ids:
            delta.token_ids.extend(ids)
        if self._request.logprobs is not None:
            delta.logprobs.extend(self._logprob(i, p) for i, p in zip(ids, logprobs, strict=True))
        if self._request.trace:
            delta.trace.server_us = int((now - self._started) * 1e6)
            delta.trace.step = step
        messages.append(message)
        return ids

    def _logprob(self, id: int, logprob: TokenLogprob) -> pb.Logprob:
        text = self._model.text.token_text
        top = [pb.TopLogprob(token_id=i, text=text(i), logprob=p) for i, p in logprob.top]
        return pb.Logprob(token_id=id, text=text(id), logprob=logprob.logprob, rank=logprob.rank, top=top)

    def _end(self, reason: FinishReason, stop: str | None, last: list[int]) -> pb.GenerateResponse:
        self.finish = reason
        usage = pb.Usage(prompt_tokens=len(self._request.prompt), completion_tokens=self.completion_tokens)
        finish = pb.Finish(reason=pb.FinishReason.Name(reason), usage=usage)
        if stop is not None:
            finish.stop = stop
        elif reason is FinishReason.STOP_TOKEN:
            finish.stop_token_id = last[-1]
        return pb.GenerateResponse(finish=finish)


def _joined(first: Piece, second: Piece) -> Piece:
    return Piece(first.text + second.text, first.ids + second.ids, second.stop)
