"""A draft model's cache: whatever was guessed, refused, forgotten or full before, a draft is that of the tokens."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import BLOCK, PagedRunner, PlainSamplingOps

from understudy.errors import CheckpointError, ConfigError
from workers.cache.manager import CacheManager
from workers.engine import Sampling
from workers.engine.draft import DraftModel, check_tokenizers
from workers.engine.drafts import Ask
from workers.engine.runner import RunnerInfo
from workers.engine.speculate import LONGEST_REST, Pace, agreeing

VOCAB = 12


def draft_model(
    blocks: int = 64, windows: list[int | None] | None = None, chunk: int = 32, max_context: int = 2048
) -> tuple[DraftModel, PagedRunner, CacheManager]:
    windows = windows or [None]
    counts = (blocks,) * len(windows)
    runner = PagedRunner(list(counts), windows, VOCAB)
    info = RunnerInfo("draft", "paged", "Paged", "float32", max_context, VOCAB, counts, tuple(windows), 0)
    cache = CacheManager(counts, windows, BLOCK, True)
    return DraftModel(runner, info, cache, PlainSamplingOps(), chunk), runner, cache


def alone(tokens: list[int], count: int, windows: list[int | None], sampling: Sampling, made: int) -> list[int]:
    """The draft of a model that saw nothing before."""
    model, _, _ = draft_model(windows=windows, chunk=4096)
    [draft] = model.propose([Ask("x", tokens, count, "", sampling, 0, made)])
    return draft


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    windows=st.sampled_from([[None], [None, 18], [17], [20, None, 1]]),
    blocks=st.integers(4, 24),
    chunk=st.sampled_from([1, 7, 40]),
    trust=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_a_draft_is_that_of_its_tokens(
    seed: int, windows: list[int | None], blocks: int, chunk: int, trust: float
) -> None:
    """Sequences come, go on with as much of their drafts as chance (`trust`) has it, are forgotten and come again."""
    dice = random.Random(seed)
    model, _, cache = draft_model(blocks, windows, chunk)
    stem = [dice.randrange(VOCAB) for _ in range(40)]
    live: dict[str, list[int]] = {}
    ways = {f"s{i}": Sampling(temperature=dice.choice([0.0, 1.0]), seed=i) for i in range(5)}
    drafted = 0
    for _ in range(30):
        for id in ways:
            if id not in live and dice.random() < 0.3:
                live[id] = stem[: dice.choice([0, 20, 40])] + [dice.randrange(VOCAB) for _ in range(dice.randint(1, 9))]
        asked = [id for id in live if dice.random() < 0.8]
        asks = [Ask(id, live[id], dice.randint(1, 6), "", ways[id], 0, len(live[id])) for id in asked]
        drafts = model.propose(asks)
        cache.check([s.table for s in model._sequences.values()])
        for ask, draft in zip(asks, drafts, strict=True):
            drafted += len(draft)
            assert len(draft) <= ask.at_most
            tokens = live[ask.id]
            if draft and dice.random() < 0.4:
                assert draft == alone(list(tokens), len(draft), windows, ask.sampling, ask.made)
            right = sum(1 for _ in iter(lambda: dice.random() < trust, False)) if trust < 1 else len(draft)
            tokens += [*draft[:right], dice.randrange(VOCAB)]
            if dice.random() < 0.1:
                model.forget(ask.id)
                if dice.random() < 0.5:
                    del live[ask.id]
    assert drafted or blocks < 12 or chunk < 40
    for id in live:
        model.forget(id)
    model.check_idle()


def test_accepted_drafts_cost_one_row_each() -> None:
    model, runner, _ = draft_model()
    tokens = [1, 2, 3]
    for _ in range(4):
        [draft] = model.propose([Ask("a", tokens, 4)])
        assert len(draft) == 4
        tokens = [*tokens, *draft, 5]
    rows = [sum(rows for _, _, rows, _ in plan) for plan in runner.plans]
    assert rows == [3, 1, 1, 1] + 3 * [2, 1, 1, 1], "the last draft, which was not fed, and the token after it"


def test_sequences_are_computed_together() -> None:
    model, runner, _ = draft_model()
    drafts = model.propose([Ask(f"s{i}", [i, 2, 3], 2 + i) for i in range(3)])
    assert [len(d) for d in drafts] == [2, 3, 4]
    assert [len(plan) for plan in runner.plans] == [3, 3, 2, 1]


def test_a_full_cache_has_no_drafts_and_holds_nothing() -> None:
    model, _, cache = draft_model(blocks=2)
    asks = [Ask("a", [1] * 20, 4), Ask("b", [2] * 20, 4)]
    a, b = model.propose(asks)
    assert (len(a), b) == (4, [])
    model.forget("a")
    for _ in range(64):
        assert model.propose([Ask("b", [2] * 20, 4)]) == [[]]
    assert len(model.propose([Ask("b", [2] * 20, 4)])[0]) == 4
    model.forget("b")
    model.check_idle()
    assert cache.blocks_in_use == 0


def test_nothing_beyond_the_context() -> None:
    model, _, _ = draft_model(max_context=10)
    assert len(model.propose([Ask("a", [1] * 7, 4)])[0]) == 4
    assert model.propose([Ask("b", [1] * 8, 4), Ask("c", [1] * 30, 4)]) == [[], []]


def test_a_long_prompt_is_computed_over_several_calls() -> None:
    model, runner, _ = draft_model(chunk=8)
    drafts = [model.propose([Ask("a", [3] * 20, 2)])[0] for _ in range(3)]
    assert [len(d) for d in drafts] == [0, 0, 2]
    assert max(sum(rows for _, _, rows, _ in plan) for plan in runner.plans) == 8


def test_a_failure_ends_drafting_and_nothing_else() -> None:
    model, runner, _ = draft_model()
    asks = [Ask("a", [1, 2, 3], 2)]
    assert model.propose(asks) != [[]]
    runner.fail_with = RuntimeError("out of memory")
    assert model.propose(asks) == [[]]
    assert model.propose(asks) == [[]]
    model.check_idle()
    model.close()
    model.close()
    assert runner.closed == 1


# How much is drafted.


def test_refused_drafts_become_shorter_then_rarer() -> None:
    pace, tokens, counts = Pace(), [0], []
    for _ in range(130):
        counts.append(count := pace.allowed(tokens, 4))
        pace.drafted(tokens, [1] * count)
        tokens = [*tokens, 0]
    assert counts[:8] == [4, 1, 0, 0, 1, 0, 0, 0]
    assert sum(counts) <= 4 + 8
    gaps = [len(g) for g in "".join(map(str, counts)).split("1")]
    assert max(gaps) == LONGEST_REST


def test_drafts_that_agree_grow_again() -> None:
    pace, tokens, counts = Pace(), [0], []
    for right in (1, 2, 4, 8, 8):
        counts.append(count := pace.allowed(tokens, 8))
        draft = [7] * count
        pace.drafted(tokens, draft)
        tokens = [*tokens, *draft[:right], 0]
    assert counts == [8, 2, 4, 8, 8]
    assert agreeing([1, 2, 3], [1, 2]) == 2
    assert agreeing([1, 2], [3]) == agreeing([], [1]) == 0


# Whose draft model.


def tokenizer(folder: Path, *, vocab: object = None, added: object = ()) -> Path:
    folder.mkdir(exist_ok=True)
    tree = {"model": {"vocab": {"a": 0, "b": 1} if vocab is None else vocab}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    return folder


def test_tokenizers_must_agree(tmp_path: Path) -> None:
    target = tokenizer(tmp_path / "target")
    check_tokenizers(target, tokenizer(tmp_path / "same", vocab=[["a", -1.0], ["b", -2.0]]))
    check_tokenizers(target, tmp_path / "none")
    with pytest.raises(ConfigError, match=r"draft_model_dir: .*other has another tokenizer.*id 1 is 'c'.*is 'b'"):
        check_tokenizers(target, tokenizer(tmp_path / "other", vocab={"a": 0, "c": 1}))
    with pytest.raises(ConfigError, match=r"id 2 is '<x>', the model's is None"):
        check_tokenizers(target, tokenizer(tmp_path / "more", added=[{"id": 2, "content": "<x>"}]))
    with pytest.raises(CheckpointError, match=r"bad/tokenizer\.json: its vocabulary cannot be read"):
        check_tokenizers(target, tokenizer(tmp_path / "bad", vocab=3))
