"""One sequence: its tokens, how many of them are computed, and the blocks that hold them. Integers only."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workers.cache.manager import BlockTable
from workers.engine.contract import FinishReason, Interjection, Request, TokenLogprob

if TYPE_CHECKING:
    from workers.engine.family import Family
    from workers.engine.formats import Matcher
    from workers.engine.loads import OpenLoad
    from workers.engine.ways import Ways


@dataclass(slots=True, eq=False)
class Sequence:
    """`tokens` is the prompt and the answer so far; the keys and values of tokens[:computed] are in the cache.

    Half-open ranges over `tokens`:

        0                  computed          prompt_tokens        len(tokens)
        |---- in the cache ----|--- to compute ---------------------|

    A sequence decodes when one token is left to compute. `rank` orders sequences: larger priority first, then whoever
    came first; smaller is better. Whoever has waited longest may be put before all (`workers.engine.turns`).
    """

    request: Request
    rank: tuple[int, int]
    root: bytes  # parent key of its first block
    table: BlockTable
    tokens: list[int]
    computed: int = 0
    cached: int | None = None  # prompt tokens that the prefix tree spared; None until first admitted
    loaded: list[int] = field(default_factory=lambda: [0, 0, 0])  # prompt tokens that loads spared, by `Tier`
    load: OpenLoad | None = None  # under way from the tiers behind the cache
    running: bool = False  # admitted and not preempted
    long: bool = False  # see `Chunk`
    reported: bool = False  # an output of this sequence has been given
    plain: bool = True  # nothing is asked beyond temperature and filters: no `ways`, no `told`
    told: list[TokenLogprob] | None = None  # of the prompt's tokens from the second on, as far as known; None: unasked
    family: Family | None = None
    ways: Ways | None = None
    opening: Future[Matcher] | None = None  # its format is being opened: the scheduler does not know it yet
    matcher: Matcher | None = None
    began: float = 0.0  # moment of its first step, where spans of it are wanted

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def arrival(self) -> int:
        """Number of the request, in the order in which they came."""
        return self.rank[1]

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt)

    @property
    def made(self) -> int:
        """Tokens of the answer, those that the caller already had among them."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def asks_prompt(self) -> bool:
        """Whether rows of the prompt are still wanted for their logprobs."""
        return self.told is not None and len(self.told) < self.prompt_tokens - 1 > self.computed

    @property
    def left(self) -> int:
        """Rows to compute before the next token is known."""
        return len(self.tokens) - self.computed


def finish_of(request: Request, made: int, last: Tokens[int]) -> FinishReason | None:
    """Why a sequence with `made` answer tokens, the last of them in `last`, is over; None when it goes on.

    EOS and stop tokens count once more than `min_tokens` tokens are there: until then they are not drawn.
    """
    if last and made > request.min_tokens:
        if last[0] in request.eos_ids:
            return FinishReason.EOS
        if last[0] in request.stop_ids:
            return FinishReason.STOP_TOKEN
    return FinishReason.LENGTH if made >= request.max_tokens else None


def forced_id(rule: Interjection, tokens: Tokens[int], start: int, end: int) -> int | None:
    """The id that must follow the answer tokens[start:end]; None where it is free."""
    at = end - start - rule.after
    if not 0 <= at < len(rule.ids):
        return None
    width, before = len(rule.ids), start + rule.after
    if any(tokens[i : i + width] == rule.ids for i in range(start, before - width + 1)):
        return None
    return rule.ids[at]


def begun_words(words: Tokens[list[int]], tokens: Tokens[int], start: int, end: int) -> list[int]:
    """The ids that would complete one of `words` after the answer tokens[start:end]."""
    found = []
    for word in words:
        first = end - len(word) + 1
        if word and first >= start and tokens[first:end] == word[:-1]:
            found.append(word[-1])
    return found
