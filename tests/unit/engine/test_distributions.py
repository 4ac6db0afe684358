"""What is drawn follows the exact probabilities: chi-square with fixed seeds, for every way to shape a row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from paged_runner import PlainSamplingOps, paged_engine

from workers.engine import Request, Sampling
from workers.engine.sampler import Row, Sampler
from workers.engine.ways import Ways, asks

LOGITS = [0.0, 1.0, 2.0, -1.0, 0.5, 1.9, -3.0, 0.2]
PROMPT, ANSWER = [1, 2], [2, 5, 5]
DRAWS = 4_000


def exact(sampling: Sampling) -> dict[int, float]:
    """Probabilities by the definitions of penalties and sampler, token by token in plain floats."""
    logit = dict(enumerate(LOGITS))
    for token, bias in sampling.logit_bias:
        logit[token] += bias
    for token in {*PROMPT, *ANSWER}:
        r = sampling.repetition_penalty
        logit[token] = logit[token] / r if logit[token] > 0 else logit[token] * r
    for token in set(ANSWER):
        logit[token] -= sampling.frequency_penalty * ANSWER.count(token) + sampling.presence_penalty
    for word in sampling.bad_words:
        if [*ANSWER, word[-1]][-len(word) :] == word:
            del logit[word[-1]]
    weight = {t: math.exp(x / sampling.temperature) for t, x in logit.items()}
    top = max(weight.values())
    weight = {t: w for t, w in weight.items() if w >= sampling.min_p * top}
    order = sorted(weight, key=lambda t: (-weight[t], t))
    order = order[: sampling.top_k or None]
    whole, reached, kept = sum(weight[t] for t in order), 0.0, []
    for token in order:
        kept.append(token)
        reached += weight[token]
        if reached >= sampling.top_p * whole:
            break
    whole = sum(weight[t] for t in kept)
    return {t: weight[t] / whole for t in kept}


def chi_square_limit(freedom: int) -> float:
    """What one in about 10,000 exceeds (Wilson and Hilferty 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.719 * math.sqrt(part)) ** 3


WAYS = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.6),
    "hot": Sampling(temperature=1.8),
    "top_k": Sampling(top_k=3),
    "top_p": Sampling(top_p=0.75),
    "min_p": Sampling(min_p=0.2),
    "all filters": Sampling(temperature=1.2, top_k=6, top_p=0.9, min_p=0.05),
    "repetition": Sampling(repetition_penalty=1.6),
    "less repetition": Sampling(repetition_penalty=0.7),
    "presence": Sampling(presence_penalty=0.9),
    "frequency": Sampling(frequency_penalty=0.8),
    "bias": Sampling(logit_bias=[(6, 4.0), (2, -1.5)]),
    "bad words": Sampling(bad_words=[[5, 5, 1], [2], [5, 2, 0]]),
    "all": Sampling(
        0.8, 6, 0.95, 0.01, repetition_penalty=1.2, presence_penalty=-0.4, frequency_penalty=0.5,
        logit_bias=[(0, 1.0)], bad_words=[[4]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_draws_follow_the_exact_probabilities(name: str) -> None:
    sampling = WAYS[name]
    request = Request("a", PROMPT, 10, sampling)
    extra = Ways(request, len(LOGITS)).extras([*PROMPT, *ANSWER], [])[0] if asks(request) else None
    rows = [Row(sampling, index, 3, extra=extra) for index in range(DRAWS)]
    logits = torch.tensor([LOGITS]).repeat(DRAWS, 1)
    counts = np.bincount([c.token for c in Sampler(PlainSamplingOps()).choose(logits, rows)], minlength=len(LOGITS))
    expected = exact(sampling)
    assert set(np.flatnonzero(counts)) <= set(expected)
    chi_square = sum((counts[t] - DRAWS * p) ** 2 / (DRAWS * p) for t, p in expected.items())
    if len(expected) > 1:
        assert chi_square < chi_square_limit(len(expected) - 1)


def test_the_sequences_of_one_prompt_are_drawn_apart() -> None:
    """n sequences of one seed are as independent as n seeds: their first tokens have the prompt's distribution."""
    prompt, n = list(range(20)), 400
    told = paged_engine(64, vocab=8)[0]
    told.add(Request("p", prompt, 1, Sampling(temperature=0), logprobs=8))
    (output,) = told.step()
    expected = {token: n * math.exp(p) for token, p in output.logprobs[0].top}
    engine, _ = paged_engine(64, vocab=8, max_running=16, chunk_tokens=256)
    for i in range(n):
        engine.add(Request(f"r{i}", prompt, 1, Sampling(seed=17), index=i, family="f"))
    counts = dict.fromkeys(expected, 0)
    while engine.has_work():
        for o in engine.step():
            counts[o.token_ids[0]] += 1
    engine.check_idle()
    likely = {t: e for t, e in expected.items() if e >= 5}
    chi_square = sum((counts[t] - e) ** 2 / e for t, e in likely.items())
    assert chi_square < chi_square_limit(max(1, len(likely) - 1))
