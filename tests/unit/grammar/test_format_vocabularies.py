"""Formats over real vocabularies: texts as their tokenizers write them pass, and nothing special does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from router.format import grammar_of
from router.models import SamplingDefaults, ServedModel
from router.text import ModelText
from understudy.errors import InvalidRequest
from understudy.v1 import inference_pb2 as pb
from workers.engine import EngineInfo
from workers.engine.contract import Grammar
from workers.engine.formats import mask_words
from workers.grammar.formats import CheckpointFormats, TokenFormats
from workers.grammar.vocabulary import VOCABULARY_FILES, vocabulary_of

TEXTS = ['{"name": "Zoë €", "n": [1, 2.5, true]}', '{"a":"日本語 😀 \\n"}', '{\n  "x": {}\n}']
NAMES = ["tinyllama", "gpt2", "qwen3", "minimind"]  # llama3, deepseek-llm and gpt-oss: byte level, as qwen3


def check(path: Path) -> None:
    files = {n: (path / n).read_bytes() for n in VOCABULARY_FILES if (path / n).is_file()}
    text = ModelText(files["tokenizer.json"], json.loads(files.get("tokenizer_config.json", b"{}")))
    size = text.vocab_size + 7
    vocabulary = vocabulary_of(files, size)
    assert vocabulary is not None
    assert text.token_bytes is not None
    for id, token in enumerate(text.token_bytes):  # as the gateway has them
        assert vocabulary.tokens[id] == (b"" if id in text.special_ids else token) or vocabulary.tokens[id] == b""
    formats = TokenFormats(vocabulary)
    special = sorted(text.special_ids)
    row = np.zeros(mask_words(size), dtype=np.uint32)
    for sample in TEXTS:
        ids = text.encode(sample, add_special_tokens=False)
        spaced = vocabulary.tokens[ids[0]].startswith(b" ")  # SentencePiece puts a space before a text
        grammar = Grammar("ebnf", 'start: " " value\nvalue: %json {}') if spaced else Grammar("json")
        matcher = formats.open(grammar)
        for id in ids:
            matcher.mask_into(row)
            bits = np.unpackbits(row.view(np.uint8), bitorder="little")
            assert bits[id]
            assert not bits[special].any()
            assert not bits[text.vocab_size :].any()
            matcher.accept(id)
        assert matcher.mask_into(row)


@pytest.mark.oracles
@pytest.mark.parametrize("name", NAMES)
def test_a_real_vocabulary(oracles: Path, name: str) -> None:
    check(oracles / "tokenizers" / name)


def test_the_bundled_vocabulary(demo_model: Path) -> None:
    check(demo_model)


def served(path: Path) -> ServedModel:
    size = json.loads((path / "config.json").read_bytes())["vocab_size"]
    info = EngineInfo(
        model="m",
        model_fingerprint="f",
        numerics_id="n",
        architecture="A",
        dtype="float32",
        max_context=512,
        vocab_size=size,
        block_tokens=16,
        blocks=8,
        cache_bytes=1,
        max_running=4,
        chunk_tokens=64,
        layers=2,
    )
    return ServedModel(info, ModelText((path / "tokenizer.json").read_bytes(), None, size), SamplingDefaults())


def test_a_message_becomes_a_grammar_or_a_refusal(demo_model: Path) -> None:
    model = served(demo_model)
    assert grammar_of(pb.Format(), model) is None
    assert grammar_of(pb.Format(json_object=True), model) == Grammar("json")
    assert grammar_of(pb.Format(regex="a+"), model) == Grammar("regex", "a+")
    assert grammar_of(pb.Format(json_schema="{}"), model) == Grammar("json_schema", "{}")
    assert grammar_of(pb.Format(grammar='root ::= "a"'), model) == Grammar("ebnf", 'root ::= "a"')
    assert grammar_of(pb.Format(choice=pb.Choices(choices=["a", "é"])), model) == Grammar("choice", '["a", "\\u00e9"]')
    for message, field in (
        (pb.Format(json_object=False), "format.json_object"),
        (pb.Format(choice=pb.Choices()), "format.choice"),
        (pb.Format(regex="("), "format.regex"),
        (pb.Format(json_schema='{"not": {}}'), "format.json_schema"),
        (pb.Format(grammar="x"), "format.grammar"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            grammar_of(message, model)
        assert refused.value.field == field
        assert str(refused.value).startswith(field)


def test_a_leader_reads_the_vocabulary_that_the_gateway_has(demo_model: Path) -> None:
    model = served(demo_model)
    matcher = CheckpointFormats(demo_model, model.info.vocab_size).open(Grammar("choice", '["yes", "no"]'))
    row = np.zeros(mask_words(model.info.vocab_size), dtype=np.uint32)
    assert not matcher.mask_into(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    table = model.text.token_bytes or []
    found = {table[int(i)] for i in np.flatnonzero(bits)}
    assert {b"y", b"n"} <= found <= {b"y", b"ye", b"yes", b"n", b"no"}
