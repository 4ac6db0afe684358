"""From a sequence and its chunk to the rows that a step samples."""

from __future__ import annotations

from concurrent.futures import Future

from workers.engine.contract import Request
from workers.engine.drafts import Ask
from workers.engine.formats import Bits
from workers.engine.plan import Chunk
from workers.engine.sampler import Row
from workers.engine.sequence import Sequence
from workers.engine.ways import Ways

Masks = list[tuple[Bits, bool]]


def samples(chunk: Chunk, s: Sequence) -> bool:
    """Whether the chunk's last rows become tokens: it reaches the end of what is known."""
    return chunk.start + len(chunk.tokens) - chunk.drafts == len(s.tokens)


def looks_inside(request: Request) -> bool:
    """Whether the request asks what happens within the layers."""
    return request.probe is not None and bool(request.probe.experts or request.probe.attention)


def needs_likeliest_only(s: Sequence) -> bool:
    """Whether a sequence that asks for nothing else takes the likeliest token, as it is, in every row."""
    r = s.request
    return r.sampling.temperature == 0 and r.logprobs is None and s.made >= r.min_tokens


def drafts_of(chunk: Chunk) -> list[int]:
    """The guesses at the end of a chunk."""
    return chunk.tokens[len(chunk.tokens) - chunk.drafts :] if chunk.drafts else []


def ask_of(s: Sequence, at_most: int) -> Ask:
    """What a proposer is asked for a sequence."""
    r = s.request
    return Ask(s.id, s.tokens, at_most, r.cache_salt, r.sampling, r.index, s.made)


def row_of(s: Sequence, position: int) -> Row:
    """How the token at `position` of the answer is chosen where nothing is asked beyond temperature and filters."""
    request = s.request
    barred = [*request.eos_ids, *request.stop_ids] if position < request.min_tokens else ()
    return Row(request.sampling, request.index, position, barred, request.logprobs)


def shaped_rows(s: Sequence, ways: Ways, drafts: list[int], masks: Future[Masks] | None) -> list[Row]:
    """Rows of a sequence that asks for more, one after each beginning of its drafts."""
    rows: list[Row] = []
    allowed = None if masks is None else masks.result()
    for j, extra in enumerate(ways.extras(s.tokens, drafts)):
        if allowed is not None and j < len(allowed):
            extra.mask, extra.may_end = allowed[j]
            extra.ends = s.request.eos_ids
        row = row_of(s, s.made + j)
        row.extra = extra
        rows.append(row)
    return rows
