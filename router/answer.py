"""One answer: batches of tokens become the messages that a client sees."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import msgspec

from router.detokenizer import Detokenizer, Piece
from router.dispatch import Batch
from router.models import ServedModel
from router.stops import StopStrings
from router.validate import ValidRequest
from understudy.v1 import inference_pb2 as pb
from workers.engine import FinishReason, TokenLogprob, TokenTrace

_ENDS = (FinishReason.EOS, FinishReason.STOP_TOKEN)


class Answer:
    """Turns batches into messages, in order: PromptInfo once; then of each sequence its echo, deltas, one Finish.

    `stops` is the automaton of the request's stop strings. Token ids always reach up to the token that ended the
    sequence, as usage counts them; `include_stop` is about text. Sequences that the client has in full already are
    finished from the start; `to_make` are the others.
    """

    def __init__(
        self, request: ValidRequest, model: ServedModel, started: float, stops: StopStrings | None = None
    ) -> None:
        self._request = request
        self._model = model
        self._sequences = [_SequenceAnswer(i, request, model, started, stops) for i in range(request.n)]
        self._held: list[pb.GenerateResponse] = []  # what waits for PromptInfo
        for sequence in self._sequences:
            self._held += sequence.whole()
        self.to_make = [s.index for s in self._sequences if s.finish is None]
        echoed = [i for i in self.to_make if i not in request.received] if request.echo else []
        self._echoed = echoed
        self._echo = _text_of(model, request.prompt) if echoed else ""
        self._opened = False
        self._cached: pb.CachedTokens | None = None
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self._waits_for_logprobs = request.prompt_logprobs is not None and request.pinned is None
        self.info = model.info  # of the replica that answers
        if request.pinned is not None:
            fingerprint, numerics = request.pinned
            self.info = msgspec.structs.replace(model.info, model_fingerprint=fingerprint, numerics_id=numerics)

    @property
    def finished(self) -> bool:
        """Every sequence has its Finish."""
        return all(s.finish is not None for s in self._sequences)

    @property
    def reasons(self) -> list[FinishReason]:
        """Why those that have ended did, in the order of their index."""
        return [s.finish for s in self._sequences if s.finish is not None]

    @property
    def completion_tokens(self) -> int:
        """Of all sequences, up to what was passed on."""
        return sum(s.completion_tokens for s in self._sequences)

    def ended(self, index: int) -> bool:
        """Whether nothing more is wanted of this sequence."""
        return self._sequences[index].finish is not None

    def open(self) -> list[pb.GenerateResponse]:
        """PromptInfo and what waited for it, unless that was made already."""
        if self._opened:
            return []
        self._opened = True
        held, self._held = self._held, []
        echoes = [self._echo_of(index) for index in self._echoed]
        return [pb.GenerateResponse(prompt_info=self._prompt_info()), *echoes, *held]

    def add(self, batch: Batch, now: float) -> list[pb.GenerateResponse]:
        """Messages of a batch. Nothing may be added to a sequence that has ended."""
        if self._cached is None and batch.cached_tokens is not None:
            self._cached = pb.CachedTokens(device=batch.cached_tokens, host=batch.cached_host, store=batch.cached_store)
        if batch.prompt_logprobs is not None:
            self._prompt_logprobs = batch.prompt_logprobs
        messages = self._sequences[batch.index].add(batch, now)
        if self._opened:
            return messages
        self._held += messages
        if self._waits_for_logprobs and self._prompt_logprobs is None and not self.finished:
            return []
        return self.open()

    def cut(self, reason: FinishReason, now: float) -> list[pb.GenerateResponse]:
        """What is held back, and an end that nobody foresaw: TIMEOUT or CANCELLED."""
        messages = self.open()
        for sequence in self._sequences:
            if sequence.finish is None:
                messages += sequence.cut(reason, now)
        return messages

    def _prompt_info(self) -> pb.PromptInfo:
        """`cached_tokens` are prompt tokens that the first sequence was spared."""
        request, info = self._request, self.info
        text = cache(self._model.text.token_text)
        given = zip(request.prompt[1:], self._prompt_logprobs or (), strict=False)
        return pb.PromptInfo(
            request_id=request.request_id,
            model=request.model,
            model_fingerprint=info.model_fingerprint,
            numerics_id=info.numerics_id,
            prompt_token_ids=request.prompt,
            prompt_tokens=len(request.prompt),
            cached_tokens=self._cached or pb.CachedTokens(),
            seed=request.sampling.seed,
            prompt_logprobs=[
                pb.Logprob(token_id=i, text=text(i), logprob=p.logprob, rank=p.rank, top=[
                    pb.TopLogprob(token_id=t, text=text(t), logprob=q) for t, q in p.top
                ])
                for i, p in given
            ],
        )  # fmt: skip

    def _echo_of(self, index: int) -> pb.GenerateResponse:
        ids = self._request.prompt if self._request.want_token_ids else ()
        return pb.GenerateResponse(delta=pb.Delta(index=index, text=self._echo, token_ids=ids, echo=True))


class _SequenceAnswer:
    """One sequence of an answer."""

    def __init__(
        self, index: int, request: ValidRequest, model: ServedModel, started: float, stops: StopStrings | None
    ) -> None:
        received = request.received_of(index)
        self.index = index
        self._request = request
        self._token_text = model.text.token_text
        self._started = started
        self._text = Detokenizer(model.text.decoder(request.prompt), stops, request.include_stop, received)
        self._ids: list[int] = []  # not yet passed on
        self._logprobs: list[TokenLogprob] = []
        self._traces: list[TokenTrace] = []
        self.completion_tokens = len(received)
        self.finish: FinishReason | None = None

    def whole(self) -> list[pb.GenerateResponse]:
        """Finish of a sequence that the client already has in full; nothing where tokens are missing."""
        request, received = self._request, self._request.received_of(self.index)
        last = received[-1:]
        later = len(received) > request.min_tokens
        if self._text.stop is not None:
            return [self._end(FinishReason.STOP_SEQUENCE, self._text.stop, last)]
        if later and last and last[0] in request.eos_ids:
            return [self._end(FinishReason.EOS, None, last)]
        if later and last and last[0] in request.stop_ids:
            return [self._end(FinishReason.STOP_TOKEN, None, last)]
        if len(received) >= request.max_tokens:
            return [self._end(FinishReason.LENGTH, None, last)]
        return []

    def add(self, batch: Batch, now: float) -> list[pb.GenerateResponse]:
        """Messages of a batch. Nothing may be added once `finish` is set."""
        messages: list[pb.GenerateResponse] = []
        ids = batch.token_ids
        self._ids += ids
        self._logprobs += batch.logprobs
        self._traces += batch.traces
        silent = batch.finish in _ENDS and not self._request.include_stop and self._ends(ids)
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

    def _ends(self, ids: list[int]) -> bool:
        """Whether the last id is what ended it: an answer whose format is whole may end without one."""
        return bool(ids) and (ids[-1] in self._request.eos_ids or ids[-1] in self._request.stop_ids)

    def cut(self, reason: FinishReason, now: float) -> list[pb.GenerateResponse]:
        """What is held back, and the end."""
        messages: list[pb.GenerateResponse] = []
        last = self._send(messages, self._text.finish(), 0, now)
        messages.append(self._end(reason, None, last))
        return messages

    def _send(self, messages: list[pb.GenerateResponse], piece: Piece, step: int, now: float) -> list[int]:
        """Appends a delta of this piece, if there is anything in it; the ids that it completes."""
        n = piece.ids
        ids, self._ids = self._ids[:n], self._ids[n:]
        logprobs, self._logprobs = self._logprobs[:n], self._logprobs[n:]
        traces, self._traces = self._traces[:n], self._traces[n:]
        position = self.completion_tokens
        self.completion_tokens += n
        if not n and not piece.text:
            return ids
        message = pb.GenerateResponse()
        delta = message.delta
        delta.index = self.index
        delta.position = position
        delta.text = piece.text
        if self._request.want_token_ids:
            delta.token_ids.extend(ids)
        if self._request.logprobs is not None:
            delta.logprobs.extend(self._logprob(i, p) for i, p in zip(ids, logprobs, strict=True))
        if self._request.probe is not None:
            delta.trace.server_us = int((now - self._started) * 1e6)
            delta.trace.step = step
            delta.trace.tokens.extend(self._trace(i, t) for i, t in zip(ids, traces, strict=False))
        messages.append(message)
        return ids

    def _logprob(self, id: int, logprob: TokenLogprob) -> pb.Logprob:
        text = self._token_text
        top = [pb.TopLogprob(token_id=i, text=text(i), logprob=p) for i, p in logprob.top]
        return pb.Logprob(token_id=id, text=text(id), logprob=logprob.logprob, rank=logprob.rank, top=top)

    def _trace(self, id: int, trace: TokenTrace) -> pb.TokenTrace:
        text = self._token_text
        return pb.TokenTrace(
            token_id=id,
            candidates=[
                pb.Candidate(token_id=c.token, text=text(c.token), before=c.before, after=c.after)
                for c in trace.candidates
            ],
            experts=[pb.ExpertChoice(layer=e.layer, experts=e.experts, weights=e.weights) for e in trace.experts],
            attention=[pb.Attention(layer=a.layer, start=a.start, weights=a.weights) for a in trace.attention],
        )

    def _end(self, reason: FinishReason, stop: str | None, last: list[int]) -> pb.GenerateResponse:
        self.finish = reason
        usage = pb.Usage(prompt_tokens=len(self._request.prompt), completion_tokens=self.completion_tokens)
        finish = pb.Finish(index=self.index, reason=pb.FinishReason.Name(reason), usage=usage)
        if stop is not None:
            finish.stop = stop
        elif reason is FinishReason.STOP_TOKEN:
            finish.stop_token_id = last[-1]
        return pb.GenerateResponse(finish=finish)


def _text_of(model: ServedModel, prompt: Sequence[int]) -> str:
    """The prompt's text up to its last whole character: half a one belongs to the answer, which completes it."""
    decoder = model.text.decoder(())
    return "".join([decoder.push(id) for id in prompt])


def _joined(first: Piece, second: Piece) -> Piece:
    return Piece(first.text + second.text, first.ids + second.ids, second.stop)
