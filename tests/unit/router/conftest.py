"""Fixtures of the router's tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from router_stage import VOCAB, Stage, left, tokenizer_json, until

from router.text import ModelText


@pytest.fixture(scope="session")
def text() -> ModelText:
    """The text side of the fake model."""
    return ModelText(tokenizer_json(), {}, VOCAB)


@pytest.fixture
async def stage(text: ModelText) -> AsyncIterator[Stage]:
    stage = Stage(text)
    before = asyncio.all_tasks()
    try:
        yield stage
    finally:
        await stage.close()
    await until(lambda: not left(before))
