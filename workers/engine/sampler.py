"""From a row of logits to a token. Row by row: the bits of a choice never depend on what stands beside the row.

What is drawn, exactly, for logits l of V tokens, temperature t, and a number u in [0, 1) keyed by (seed, sequence
index, position in the answer), see `philox`:

0. An id that an interjection forces is the token. Nothing else applies.
1. Tokens that the format does not allow, that `min_tokens` still forbids (EOS and stop ids) or that would complete a
   bad word are left out; l of the others is shaped by `penalties`. EOS ids are allowed wherever a format may end. Are
   no tokens left, the answer ends where the format lets it, else it has failed.
2. t = 0: the token with the largest l, the lowest id among equals. Nothing else applies.
3. w_i = exp((l_i - max l) / t), in float64.
4. min_p: tokens with w_i < min_p are left out (max w is 1).
5. top_k (0: all): the k largest l stay, lower ids first among equals.
6. top_p: of the tokens left, likeliest first and lower ids first among equals, the shortest beginning stays whose
   share of their sum is at least top_p.
7. The token is the first, in order of ids, at which the running sum of w over the tokens left exceeds u times their
   whole sum.

Steps 3 to 6 are in the order in which vLLM applies them. Logprobs are of the raw logits: before 1. A row that asks
for nothing of 0 and 1 does not pay for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.engine.contract import Candidate, Sampling, TokenLogprob
from workers.engine.formats import Bits
from workers.engine.logits import DividedLogits, Logits, whole_rows
from workers.engine.penalties import Bias, Penalized, add_bias, penalize
from workers.engine.philox import uniforms

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.intp]

SAMPLER_VERSION = 2  # of the definition above; with numpy's version, part of the numerics id: exp may differ in a bit
_SUM_BLOCK = 1024  # partial sums of the inverse distribution function, in elements


class SamplingOps(Protocol):
    """The operations of `workers.kernels.ops.Ops` that sampling needs."""

    def argmax(self, logits: Tensor) -> Tensor: ...

    def logprobs(self, logits: Tensor) -> Tensor: ...


@dataclass(slots=True)
class Extra:
    """What a row asks for beyond its `Sampling`'s temperature and filters.

    `forced`: the token, whatever the logits say. `mask`: bits of the ids that the format allows (None: all), and
    `may_end` whether `ends` may follow too. `candidates`: how many to tell of; None for none.
    """

    forced: int | None = None
    barred: Sequence[int] = ()
    penalized: Penalized | None = None
    bias: Bias | None = None
    mask: Bits | None = None
    may_end: bool = False
    ends: Sequence[int] = ()
    candidates: int | None = None


@dataclass(slots=True)
class Row:
    """How one row is sampled. `position` counts the tokens of the answer before this one; `barred` ids are not
    drawn; `logprobs` is None for none, else how many of the likeliest come along."""

    sampling: Sampling
    index: int
    position: int
    barred: Sequence[int] = ()
    logprobs: int | None = None
    extra: Extra | None = None


@dataclass(slots=True)
class Choice:
    """What a row became: a token, or `error` where it has none, by the request's `field` or, where that is empty, by
    the model's fault; `over`: the format lets nothing follow, the answer ends before it."""

    token: int
    logprob: TokenLogprob | None = None
    error: str = ""
    field: str = ""
    over: bool = False
    candidates: list[Candidate] | None = None


class Sampler:
    """`ops` brings log_softmax in the engine's numerics."""

    def __init__(self, ops: SamplingOps) -> None:
        self._ops = ops

    def choose(self, logits: Logits, rows: Sequence[Row]) -> list[Choice]:
        """logits: [S, V] of any float type, one row for each of `rows`. A batch that is all greedy costs one argmax."""
        if not rows:
            return []
        choices = [
            Choice(token) if math.isfinite(value) else Choice(token, error=f"the model's logits have a {value}")
            for token, value in self._likeliest(logits)
        ]
        plain = [i for i, choice in enumerate(choices) if not choice.error]
        if shaped := [i for i in plain if rows[i].extra is not None or rows[i].barred]:
            self._shape(logits, rows, shaped, choices)
            plain = [i for i in plain if not (choices[i].error or choices[i].over)]
        if drawn := [i for i in plain if rows[i].sampling.temperature > 0 and not _shaped(rows[i])]:
            self._draw(logits, rows, drawn, choices)
        if told := [i for i in plain if rows[i].logprobs is not None]:
            self._tell(logits, rows, told, choices)
        return choices

    def prompt_logprobs(self, logits: Logits, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
        """What rows [R, V] said of the tokens [R] that follow them, with the `count` likeliest of each."""
        values = self._ops.logprobs(whole_rows(logits)).cpu().numpy()
        return [token_logprob(value, token, count) for value, token in zip(values, tokens, strict=True)]

    def _likeliest(self, logits: Logits) -> Iterable[tuple[int, float]]:
        """Id and logit of each row's likeliest token. A NaN is likeliest, so that it cannot hide."""
        if isinstance(logits, DividedLogits):
            return zip(logits.ids.tolist(), logits.values.tolist(), strict=True)
        ids = self._ops.argmax(logits)
        return zip(ids.tolist(), logits.gather(1, ids[:, None])[:, 0].tolist(), strict=True)

    def _draw(self, logits: Logits, rows: Sequence[Row], which: list[int], choices: list[Choice]) -> None:
        values = _numpy(logits, which)
        for value, number, i in zip(values, _numbers(rows, which), which, strict=True):
            choices[i].token = draw(value, rows[i].sampling, (), float(number))

    def _shape(self, logits: Logits, rows: Sequence[Row], which: list[int], choices: list[Choice]) -> None:
        """Chooses for rows whose logits are not taken as they are."""
        values: Floats = whole_rows(logits, which).to(torch.float32, copy=True).cpu().numpy()
        shape(values, [rows[i] for i in which])
        for value, number, i in zip(values, _numbers(rows, which), which, strict=True):
            extra, choice = rows[i].extra, choices[i]
            if extra is not None and extra.forced is not None:
                choice.token = extra.forced
            elif value.max() > -np.inf:
                choice.token = draw(value, rows[i].sampling, (), float(number))
            elif extra is not None and extra.may_end:
                choice.over = True
            else:
                choice.field, choice.error = _conflict(rows[i])
            if extra is not None and extra.candidates is not None and not (choice.error or choice.over):
                logprobs = self._ops.logprobs(whole_rows(logits, [i])).cpu().numpy()[0]
                choice.candidates = candidates(logprobs, value, rows[i], choice.token)

    def _tell(self, logits: Logits, rows: Sequence[Row], which: list[int], choices: list[Choice]) -> None:
        values = self._ops.logprobs(whole_rows(logits, which)).cpu().numpy()
        for value, i in zip(values, which, strict=True):
            choices[i].logprob = token_logprob(value, choices[i].token, rows[i].logprobs or 0)


def _conflict(row: Row) -> tuple[str, str]:
    """The field to blame where no token is left, and why."""
    rules = [
        name
        for name, bars in (
            ("format", row.extra is not None and row.extra.mask is not None),
            ("sampling.bad_words", row.extra is not None and len(row.extra.barred) > 0),
            ("stopping.min_tokens", len(row.barred) > 0),
        )
        if bars
    ]
    where = f"after {row.position} tokens of the answer"
    if row.extra is not None and row.extra.mask is not None and not row.extra.mask.any():
        return "format", f"lets nothing follow {where}, though it is not whole; allow more"
    if not rules:
        return "", "the model's logits rule out every token"
    if len(rules) == 1:
        return rules[0], f"leaves no token {where}; allow more"
    return rules[0], f"leaves no token {where}, together with {' and '.join(rules[1:])}; relax one of them"


def _shaped(row: Row) -> bool:
    return row.extra is not None or len(row.barred) > 0


def _numbers(rows: Sequence[Row], which: list[int]) -> Doubles:
    return uniforms([(rows[i].sampling.seed, rows[i].index, rows[i].position) for i in which])


def shape(values: Floats, rows: Sequence[Row]) -> None:
    """Step 1 of the definition, in place: values [S, V], what is left out becomes -inf."""
    extras = [(i, row.sampling, row.extra) for i, row in enumerate(rows) if row.extra is not None]
    if biased := [(i, e.bias) for i, _, e in extras if e.bias is not None]:
        add_bias(values, *map(list, zip(*biased, strict=True)))
    if penalized := [(i, s, e.penalized) for i, s, e in extras if e.penalized is not None]:
        penalize(values, *map(list, zip(*penalized, strict=True)))
    vocab = values.shape[1]
    for i, _, extra in extras:
        if extra.mask is not None:
            allowed = np.unpackbits(extra.mask.view(np.uint8), bitorder="little")[:vocab].view(np.bool_)
            if extra.may_end:
                allowed[[id for id in extra.ends if id < vocab]] = True
            values[i][~allowed] = -np.inf
    for value, row in zip(values, rows, strict=True):
        barred = row.barred if row.extra is None else (*row.barred, *row.extra.barred)
        value[[id for id in barred if id < vocab]] = -np.inf  # a checkpoint may name an EOS beyond its vocabulary


def candidates(logprobs: Floats, shaped: Floats, row: Row, token: int) -> list[Candidate]:
    """The likeliest tokens of a row by its raw logits, the chosen one among them, before and after all rules.

    logprobs: [V], raw; shaped: [V], after step 1.
    """
    extra, vocab = row.extra, len(logprobs)
    after = np.zeros(vocab)
    if row.sampling.temperature == 0 or (extra is not None and extra.forced is not None):
        after[token] = 1.0
    else:
        ids, weights = weigh(shaped, row.sampling)
        after[slice(None) if ids is None else ids] = weights / weights.sum()
    count = (extra.candidates or 0) if extra is not None else 0
    told = largest(logprobs, min(count, vocab)).tolist() if count else []
    if count and token not in told:
        told.append(token)
    return [Candidate(id, math.exp(float(logprobs[id])), float(after[id])) for id in told]


def _numpy(logits: Logits, which: list[int]) -> Floats:
    result: Floats = whole_rows(logits, which).float().cpu().numpy()
    return result


def draw(logits: Floats, sampling: Sampling, barred: Sequence[int], number: float) -> int:
    """The token of one row [V] for one number in [0, 1), by the definition at the top of this file."""
    if len(barred):
        logits = logits.copy()
        there = [id for id in barred if id < len(logits)]  # a checkpoint may name an EOS beyond its vocabulary
        logits[there] = -np.inf
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, weights = weigh(logits, sampling)
    token = inverse(weights, number)
    return token if ids is None else int(ids[token])


def weigh(logits: Floats, sampling: Sampling) -> tuple[Ids | None, Doubles]:
    """The tokens that stay, in order of ids (None: all of them), and their weights, not normalized."""
    highest = float(logits.max())
    ids: Ids | None = None
    if 0 < sampling.top_k < len(logits):  # never loses a token that min_p would keep among the k largest
        ids = np.sort(largest(logits, sampling.top_k))
        logits = logits[ids]
    elif sampling.min_p > 0:  # most are far too unlikely to compute a weight for; the rest is looked at closely below
        least = highest + sampling.temperature * math.log(sampling.min_p)
        ids = np.flatnonzero(logits >= least - 1e-4 * (1 + abs(least)))
        logits = logits[ids]
    weights: Doubles = np.subtract(logits, highest, dtype=np.float64)
    if sampling.temperature != 1:
        with np.errstate(over="ignore"):  # a temperature next to 0: everything but the likeliest becomes 0
            weights /= sampling.temperature
    np.exp(weights, out=weights)
    if sampling.min_p > 0:
        ids, weights = _keep(ids, weights, np.flatnonzero(weights >= sampling.min_p))
    if sampling.top_p < 1:
        ids, weights = _keep(ids, weights, _nucleus(weights, sampling.top_p))
    return ids, weights


def _keep(ids: Ids | None, weights: Doubles, which: Ids) -> tuple[Ids, Doubles]:
    return (which if ids is None else ids[which]), weights[which]


def _nucleus(weights: Doubles, top_p: float) -> Ids:
    """The shortest beginning of the tokens, likeliest first, with at least `top_p` of the whole weight.

    Looks only at tokens that can be in it: all those below (1 - top_p) / V of the whole weigh less than 1 - top_p
    together (half of that, so that rounding does not matter). Adds them up in buckets of nearly equal weight, and
    sorts only the bucket in which the share is reached. In order of ids.
    """
    whole = float(weights.sum())
    places = np.flatnonzero(weights >= 0.5 * (1 - top_p) * whole / len(weights))
    weights = weights[places]
    buckets = weights.view(np.int64) >> 46  # positive numbers are ordered as their bits are: 64 buckets to a power of 2
    below = buckets.max() - buckets
    reached = np.cumsum(np.bincount(below, weights))
    last = min(int(np.searchsorted(reached, top_p * whole)), len(reached) - 1)
    stays = below < last
    inside = np.flatnonzero(below == last)
    inside = inside[np.argsort(-weights[inside], kind="stable")]
    before = float(reached[last - 1]) if last else 0.0
    stays[inside[: int(np.searchsorted(before + np.cumsum(weights[inside]), top_p * whole)) + 1]] = True
    return places[stays]


def inverse(weights: Doubles, number: float) -> int:
    """The first place at which the running sum exceeds `number` of the whole; sums go block by block, in order."""
    whole = len(weights) // _SUM_BLOCK * _SUM_BLOCK
    sums = weights[:whole].reshape(-1, _SUM_BLOCK).sum(axis=1)
    running = np.cumsum(np.append(sums, weights[whole:].sum()))
    goal = number * float(running[-1])
    block = int(np.searchsorted(running, goal, side="right"))
    if block < len(running):
        start = block * _SUM_BLOCK
        inside = np.cumsum(weights[start : start + _SUM_BLOCK])
        place = int(np.searchsorted(inside, goal - (float(running[block - 1]) if block else 0.0), side="right"))
        if place < len(inside):
            return start + place
    else:
        start = 0
    # The product, or the block's two sums, rounded to the far end: the last token there that has any weight.
    end = start + _SUM_BLOCK if block < len(running) else len(weights)
    return start + int(np.flatnonzero(weights[start:end])[-1])


def largest(values: NDArray[Any], count: int) -> Ids:
    """Places of the `count` largest values, largest first, lower places first among equals."""
    if count == 1:
        return np.array([values.argmax()])
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        places = np.flatnonzero(values >= least)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")[:count]]


def token_logprob(logprobs: Floats, token: int, count: int) -> TokenLogprob:
    """Logprob and rank of a token in a row [V], and the `count` likeliest; ranks break ties by id."""
    value = logprobs[token]
    rank = 1 + int(np.count_nonzero(logprobs > value)) + int(np.count_nonzero(logprobs[:token] == value))
    top = largest(logprobs, min(count, len(logprobs))) if count else ()
    return TokenLogprob(float(value), rank, [(int(i), float(logprobs[i])) for i in top])
