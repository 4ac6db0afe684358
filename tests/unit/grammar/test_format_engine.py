"""Formats through the real engine with the bundled model: every answer is whole, and nobody else notices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from router.text import ModelText
from workers.engine import EngineConfig, FinishReason, Grammar, Request, Sampling, SequenceOutput
from workers.engine.build import build_engine
from workers.engine.core import EngineCore

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
FORMAT = Grammar("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def text(demo_model: Path) -> ModelText:
    return ModelText((demo_model / "tokenizer.json").read_bytes())


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[EngineCore]:
    core = build_engine(EngineConfig(str(demo_model), cache_bytes=16 << 20, max_context=512, max_running=16, threads=1))
    yield core
    core.check_idle()
    core.close()


def request(text: ModelText, id: str, seed: int, format: Grammar | None, **more: object) -> Request:
    eos = [text.tokenizer.token_to_id("<|endoftext|>")]
    given: dict[str, object] = {"max_tokens": 300, "sampling": Sampling(seed=seed), "eos_ids": eos, **more}
    return Request(id=id, prompt=text.encode("Tell me about it: "), grammar=format, **given)  # type: ignore[arg-type]


def run(engine: EngineCore, requests: list[Request]) -> dict[str, SequenceOutput]:
    """Every request's tokens, and how it ended."""
    whole = {r.id: SequenceOutput(r.id, []) for r in requests}
    for r in requests:
        engine.add(r)
    while engine.has_work():
        for output in engine.step():
            whole[output.id].token_ids += output.token_ids
            if output.finish is not None:
                whole[output.id].finish, whole[output.id].error = output.finish, output.error
    return whole


def test_every_completion_under_a_schema_parses_and_validates(engine: EngineCore, text: ModelText) -> None:
    told = run(engine, [request(text, str(i), i, FORMAT) for i in range(24)])
    for output in told.values():
        assert (output.finish, output.error) == (FinishReason.EOS, "")
        jsonschema.validate(json.loads(text.decode(output.token_ids)), SCHEMA)


def test_alone_in_a_batch_and_resumed_an_answer_is_the_same(engine: EngineCore, text: ModelText) -> None:
    def free(i: int) -> Request:
        return request(text, f"free {i}", i, None, max_tokens=40)

    held = request(text, "held", 5, FORMAT)
    alone = run(engine, [held])["held"].token_ids
    mates = [run(engine, [free(i)])[f"free {i}"].token_ids for i in range(4)]
    together = run(engine, [free(0), free(1), held, free(2), free(3)])
    assert together["held"].token_ids == alone
    assert [together[f"free {i}"].token_ids for i in range(4)] == mates
    for had in (1, len(alone) // 2, len(alone) - 1):
        resumed = run(engine, [request(text, "held", 5, FORMAT, generated=alone[:had])])["held"]
        assert resumed.token_ids == alone[had:]
        assert resumed.finish is FinishReason.EOS


def test_a_preempted_answer_is_the_same(engine: EngineCore, text: ModelText, demo_model: Path) -> None:
    verse = Grammar("regex", "([a-z]{1,2} ){40}[a-z]")
    requests = [request(text, str(i), i, verse, max_tokens=120) for i in range(4)]
    at_ease = run(engine, requests)
    size = engine.info.cache_bytes // engine.info.blocks * 10
    narrow = build_engine(EngineConfig(str(demo_model), cache_bytes=size, max_context=160, max_running=4, threads=1))
    pressed = run(narrow, requests)
    assert narrow.stats().preemptions > 0
    assert {k: o.token_ids for k, o in pressed.items()} == {k: o.token_ids for k, o in at_ease.items()}
    narrow.check_idle()
    narrow.close()


def test_a_format_that_cannot_be_held_ends_only_its_own_request(engine: EngineCore, text: ModelText) -> None:
    told = run(engine, [request(text, "bad", 1, Grammar("regex", "(")), request(text, "good", 2, FORMAT)])
    assert told["bad"].finish is FinishReason.ERROR
    assert "unclosed group" in told["bad"].error
    assert told["good"].finish is FinishReason.EOS


@pytest.mark.parametrize(
    ("format", "answers"),
    [
        (Grammar("choice", '["yes", "no", "maybe so"]'), {"yes", "no", "maybe so"}),
        (Grammar("regex", "[0-9]{2}"), {f"{i:02}" for i in range(100)}),
        (Grammar("ebnf", 'root ::= ("a" | "é") "b"?'), {"a", "ab", "é", "éb"}),
    ],
)
def test_kinds(engine: EngineCore, text: ModelText, format: Grammar, answers: set[str]) -> None:
    told = run(engine, [request(text, str(i), i, format, max_tokens=20) for i in range(10)])
    assert {text.decode(o.token_ids) for o in told.values()} <= answers
    assert {o.finish for o in told.values()} == {FinishReason.EOS}
