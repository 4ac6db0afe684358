"""What a step made of its sequences: tokens appended, drafts taken as far as they agree, ends found."""

from __future__ import annotations

from dataclasses import dataclass

from workers.engine.contract import FinishReason, TokenTrace
from workers.engine.formats import Matcher
from workers.engine.plan import Chunk, StepPlan
from workers.engine.rows import drafts_of, samples
from workers.engine.sampler import Choice
from workers.engine.scheduler import Scheduler
from workers.engine.sequence import Sequence, finish_of


@dataclass(slots=True)
class Made:
    """What a step made of one sequence."""

    sequence: Sequence
    choices: list[Choice]
    finish: FinishReason | None = None
    error: str = ""
    field: str = ""  # the request's own, where that is to blame
    seen: list[TokenTrace] | None = None  # one for each choice, and more where drafts were wrong


def settle(scheduler: Scheduler, plan: StepPlan, choices: list[Choice]) -> list[Made]:
    """Appends what every sequence chose, drafts as far as they agree, and finds out which are over. In the order
    of arrival; nothing has left yet."""
    made: list[Made] = []
    at = 0
    for chunk, s in zip(plan.chunks, scheduler.planned, strict=True):
        if not chunk.wanted:
            continue
        if s.plain and not chunk.drafts:
            made.append(_append(scheduler, s, choices[at]))
            at += 1
        elif samples(chunk, s):
            mine = choices[at : at + 1 + chunk.drafts]
            at += len(mine)
            made.append(_take(scheduler, s, chunk, mine))
    made.sort(key=lambda m: m.sequence.arrival)
    return made


def _append(scheduler: Scheduler, s: Sequence, choice: Choice) -> Made:
    """What `_take` does, where a sequence asks for nothing and guesses nothing."""
    if choice.error:
        return Made(s, [], FinishReason.ERROR, choice.error, choice.field)
    s.tokens.append(choice.token)
    scheduler.counts.generated_tokens += 1
    return Made(s, [choice], finish_of(s.request, s.made, (choice.token,)))


def _take(scheduler: Scheduler, s: Sequence, chunk: Chunk, choices: list[Choice]) -> Made:
    made, drafts = Made(s, [], seen=chunk.seen), drafts_of(chunk)
    for j, choice in enumerate(choices):
        if choice.error or choice.over:
            made.finish = FinishReason.ERROR if choice.error else FinishReason.EOS
            made.error, made.field = choice.error, choice.field
            if choice.field and s.matcher is not None and s.matcher.error:
                made.error, made.field = s.matcher.error, "format"
            break
        s.tokens.append(choice.token)
        made.choices.append(choice)
        made.finish = finish_of(s.request, s.made, (choice.token,))
        if s.matcher is not None:
            _follow(s.matcher, choice.token, made)
        if made.finish is not None or j == len(drafts) or choice.token != drafts[j]:
            break
    if drafts:
        scheduler.accept_drafts(chunk, max(0, len(made.choices) - 1))
        scheduler.counts.accepted_tokens += sum(c.token == d for c, d in zip(made.choices, drafts, strict=False))
    scheduler.counts.generated_tokens += len(made.choices)
    return made


def _follow(matcher: Matcher, token: int, made: Made) -> None:
    """The format goes on with the token; where it is complete, so is the answer."""
    if made.finish not in (None, FinishReason.LENGTH):
        return
    try:
        matcher.accept(token)
    except ValueError as error:  # only a forced token can be wrong
        made.finish, made.error = FinishReason.ERROR, f"grammar: does not allow token {token}: {error}"
        return
    if matcher.finished:
        made.finish = FinishReason.EOS
