"""Text without a network: stop strings, detokenizing, what a tokenizer may not be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_stage import BOS, EOS, VOCAB, tokenizer_json
from tokenizers import Tokenizer, decoders, models

from router.detokenizer import Detokenizer, Piece
from router.models import SamplingDefaults, ServedModel
from router.stops import StopMatcher, StopStrings
from router.text import ModelText
from understudy.errors import CheckpointError
from workers.engine.fake import FakeEngine

FEW = "ab€"
ADDED = 259  # the first id that the stage's tokenizer has not given


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, int, str] | None:
    """By trying every end: the first end wins, there the longest."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return end - len(longest), end, longest
    return None


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(FEW, max_size=40),
    stops=st.lists(st.text(FEW, min_size=1, max_size=5), min_size=1, max_size=6),
    cuts=st.lists(st.integers(0, 40)),
)
def test_the_first_stop_string_is_found_however_the_text_comes(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    borders = sorted({0, len(text), *(c for c in cuts if c < len(text))})
    match = None
    for start, end in pairwise(borders):
        match = matcher.feed(text[start:end])
        if match is not None:
            break
        held = max((n for s in stops for n in range(len(s)) if text[:end].endswith(s[:n])), default=0)
        assert matcher.held == held
    assert (tuple(match) if match is not None else None) == first_stop(text, stops)


@settings(max_examples=300, deadline=None)
@given(
    ids=st.lists(st.one_of(st.sampled_from([*"ab€".encode()]), st.integers(0, 299)), max_size=30),
    stops=st.lists(st.text(FEW, min_size=1, max_size=4), max_size=4),
    include=st.booleans(),
    received=st.integers(0, 30),
    batch=st.integers(1, 4),
)
def test_pieces_join_to_the_text_up_to_the_stop(
    text: ModelText, ids: list[int], stops: list[str], include: bool, received: int, batch: int
) -> None:
    """Whatever the batches and wherever a stream was taken up: the same text, cut at the same place; each piece has
    whole tokens' text, and the pieces' ids reach up to the token that completed the stop."""
    whole = text.decode(ids)
    found = first_stop(whole, stops) if stops else None
    automaton = StopStrings(stops) if stops else None
    detokenizer = Detokenizer(text.decoder([]), automaton, include)
    pieces = run(detokenizer, ids, batch)
    said = "".join(p.text for p in pieces)
    if found is None:
        assert said == whole
        assert sum(p.ids for p in pieces) == len(ids)
        assert pieces[-1].stop is None
    else:
        assert said == whole[: found[1] if include else found[0]]
        assert pieces[-1].stop == found[2]
    have = sum(p.ids for p in pieces[: received % len(pieces)])
    rest = run(Detokenizer(text.decoder([]), automaton, include, ids[:have]), ids[have:], batch)
    assert "".join(p.text for p in rest) == "".join(p.text for p in pieces[received % len(pieces) :])
    assert (sum(p.ids for p in rest) + have, rest[-1].stop) == (sum(p.ids for p in pieces), pieces[-1].stop)


def run(detokenizer: Detokenizer, ids: Sequence[int], batch: int) -> list[Piece]:
    """All pieces of these ids, `batch` at a time."""
    pieces = []
    for start in range(0, len(ids), batch):
        pieces.append(detokenizer.push(ids[start : start + batch]))
        if pieces[-1].stop is not None:
            return pieces
    return [*pieces, detokenizer.finish()]


def test_a_piece_has_exactly_the_ids_of_its_text(text: ModelText) -> None:
    detokenizer = Detokenizer(text.decoder([]), StopStrings(["b€c"]))
    sent = [(p.text, p.ids) for p in (detokenizer.push([i]) for i in "xb€bd".encode())]
    assert sent == [("x", 1), *[("", 0)] * 4, ("b€", 4), ("bd", 2)]


def test_a_half_character_of_the_prompt_is_completed_by_the_answer(text: ModelText) -> None:
    euro = [*"€".encode()]
    detokenizer = Detokenizer(text.decoder([*b"x", *euro[:2]]))
    assert detokenizer.push(euro[2:]) == ("€", 1, None)


def test_special_tokens_are_silent_and_keep_bytes_together(text: ModelText) -> None:
    a, b = "é".encode()
    assert text.decode([BOS, a, EOS, b]) == "é"
    detokenizer = Detokenizer(text.decoder([BOS]))
    assert [detokenizer.push([i]) for i in (a, EOS, b)] == [("", 0, None), ("", 0, None), ("é", 3, None)]
    assert text.token_text(EOS) == "<eos>"
    assert text.token_text(VOCAB - 1) == ""


def test_leading_space_of_byte_fallback() -> None:
    """What SentencePiece's decoder strips, it strips once, at the beginning of prompt and answer together."""
    text = sentencepiece()
    space_a, a = 1, 2
    for prompt, said in (([], "a a"), ([0], "a a"), ([a], " a a"), ([space_a], " a a"), ([3], " a a")):
        detokenizer = Detokenizer(text.decoder(prompt))
        assert "".join(detokenizer.push([i]).text for i in (space_a, space_a)) == said
        whole = text.tokenizer.decode([*prompt, space_a, space_a])
        assert whole == text.decode([*prompt, space_a, space_a]) == text.tokenizer.decode(prompt) + said


def sentencepiece(decoder: Any = None) -> ModelText:
    """A vocabulary of a few words and all byte tokens."""
    words = {"<unk>": 0, "▁a": 1, "a": 2, "▁": 3}
    vocab = words | {f"<0x{b:02X}>": len(words) + b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>"])
    tokenizer.decoder = decoder or decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return ModelText(tokenizer.to_str().encode())


@settings(max_examples=200, deadline=None)
@given(said=st.text(max_size=12), spaces=st.integers(0, 2))
def test_byte_fallback_of_any_text(said: str, spaces: int) -> None:
    text = sentencepiece()
    ids = [1] * spaces + [4 + b for b in said.encode("utf-8", "ignore")]
    detokenizer = Detokenizer(text.decoder([]))
    pieces = [detokenizer.push([i]) for i in ids]
    assert "".join(p.text for p in pieces) + detokenizer.finish().text == text.tokenizer.decode(ids)
    assert all("\ufffd" not in p.text for p in pieces) or "\ufffd" in said


def test_other_decoders_go_through_the_tokenizer() -> None:
    """Metaspace and WordPiece do not simply join bytes."""
    for decoder in (decoders.Metaspace(), decoders.WordPiece(prefix="a", cleanup=False)):
        text = sentencepiece(decoder)
        ids = [1, 2, 3, 1, 1, 2]
        for cut in range(len(ids)):
            detokenizer = Detokenizer(text.decoder(ids[:cut]))
            said = "".join(detokenizer.push([i]).text for i in ids[cut:]) + detokenizer.finish().text
            assert text.tokenizer.decode(ids[:cut]) + said == text.tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["metaspace", "wordpiece", "bpe"]),
    ids=st.lists(st.sampled_from([0, 0, 1, 2, 3]), max_size=30),
    cut=st.integers(0, 30),
)
def test_a_window_never_loses_a_space(kind: str, ids: list[int], cut: int) -> None:
    """Tokens without text, however many in a row, do not make the next one read as the first."""
    library = {
        "metaspace": decoders.Metaspace(),
        "wordpiece": decoders.WordPiece("a", False),
        "bpe": decoders.BPEDecoder("a"),
    }
    text = sentencepiece(library[kind])
    detokenizer = Detokenizer(text.decoder(ids[:cut]))
    said = "".join(detokenizer.push([i]).text for i in ids[cut:]) + detokenizer.finish().text
    assert text.tokenizer.decode(ids[:cut]) + said == text.tokenizer.decode(ids)


def changed(**fields: Any) -> bytes:
    return json.dumps(json.loads(tokenizer_json()) | fields).encode()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed(truncation={"max_length": 50}), r'truncation is set to \{"max_length": 50\}.*"truncation": null'),
        (changed(padding={"strategy": "BatchLongest"}), "padding is set to"),
        (b"{", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"{}", "cannot be loaded"),
        (b"\xff", "is not JSON"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(raw: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: {message}"):
        ModelText(raw)


def test_a_tokenizer_larger_than_its_model() -> None:
    with pytest.raises(CheckpointError, match="'Ġhello' has id 258, beyond the model's vocab_size of 258"):
        ModelText(tokenizer_json(), {}, 258)
    assert ModelText(tokenizer_json(), {}, 259).vocab_size == 259


def test_bos_and_eos_where_the_config_says_so() -> None:
    names = {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}}
    assert ModelText(tokenizer_json(), names).encode("a") == [97]
    assert ModelText(tokenizer_json(), names | {"add_bos_token": True}).encode("a") == [BOS, 97]
    both = ModelText(tokenizer_json(), names | {"add_bos_token": True, "add_eos_token": True})
    assert both.encode("a") == [BOS, 97, EOS]
    assert both.encode("a", add_special_tokens=False) == [97]
    begins: dict[str, Any] = {"type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}]}
    begins["single"] = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, *begins["pair"]]
    begins["special_tokens"] = {"<bos>": {"id": "<bos>", "ids": [BOS], "tokens": ["<bos>"]}}
    own = changed(post_processor=begins)
    for config in ({}, {"add_eos_token": False}, {"add_bos_token": False}, {"add_bos_token": True}):
        assert ModelText(own, names | config).encode("a") == [BOS, 97]
    assert ModelText(own, names | {"add_eos_token": True}).encode("a") == [BOS, 97, EOS]
    with pytest.raises(CheckpointError, match="bos_token '<s>' is not in"):
        ModelText(tokenizer_json(), {"bos_token": "<s>", "add_bos_token": True})


@pytest.mark.parametrize(
    ("flags", "said", "ids"),
    [
        ({"special": True}, "a<x>b", [97, ADDED, 98]),
        ({"special": False}, "a<x>b", [97, ADDED, 98]),
        ({"lstrip": True}, "a  <x> b", [97, ADDED, 32, 98]),
        ({"rstrip": True}, "a <x>  b", [97, 32, ADDED, 98]),
        ({"single_word": True}, "a<x>b <x>", [97, *b"<x>", 98, 32, ADDED]),
    ],
)
def test_added_tokens_of_the_config(flags: dict[str, bool], said: str, ids: list[int]) -> None:
    """Under their ids, with their flags, and silent only where they are special."""
    config = {"added_tokens_decoder": {str(ADDED): {"content": "<x>", **flags}, str(BOS): {"content": "<bos>"}}}
    text = ModelText(tokenizer_json(), config, ADDED + 1)
    assert text.encode(said) == ids
    assert text.decode([97, ADDED]) == ("a" if flags.get("special") else "a<x>")
    assert text.decode([97, ADDED], skip_special_tokens=False) == "a<x>"
    assert text.decode([97, BOS]) == "a", "what tokenizer.json has keeps its own flags"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"7": {"content": "<bos>"}}, "gives '<bos>' the id 7, tokenizer.json 257"),
        ({"9999": {"content": "<x>"}}, "gives '<x>' the id 9999, tokenizer.json"),
        ({"x": {"content": "<x>"}}, "must map ids to objects"),
        ({"7": "<x>"}, "must map ids to objects"),
        ([], None),
        ([1], "is not an object"),
    ],
)
def test_added_tokens_that_contradict(entries: Any, message: str | None) -> None:
    if message is None:
        assert ModelText(tokenizer_json(), {"added_tokens_decoder": entries}).encode("a") == [97]
        return
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: added_tokens_decoder {message}"):
        ModelText(tokenizer_json(), {"added_tokens_decoder": entries})


# The checkpoint's own wishes.


def test_defaults_of_a_checkpoint() -> None:
    read = SamplingDefaults.from_configs
    assert read(None, {"eos_token_id": 7}) == SamplingDefaults(eos_token_ids=(7,))
    assert read({"eos_token_id": [1, 2]}, {"eos_token_id": 7}).eos_token_ids == (1, 2)
    assert read({"do_sample": False, "temperature": 0.7}, None).temperature == 0
    sampled = read({"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": None}, None)
    assert sampled == SamplingDefaults(0.7, 20, 0.8, 0.0)
    for bad in ({"temperature": -1}, {"top_p": "x"}, {"eos_token_id": "x"}, {"top_k": True}):
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            read({"do_sample": True, **bad}, None)


def test_a_model_from_its_files() -> None:
    info = FakeEngine(vocab_size=VOCAB).info
    files = {"tokenizer.json": tokenizer_json(), "config.json": b'{"eos_token_id": 256}'}
    model = ServedModel.from_files(info, files)
    assert (model.name, model.defaults.eos_token_ids, model.text.vocab_size) == ("fake", (256,), VOCAB)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not in the checkpoint"):
        ServedModel.from_files(info, {})
    with pytest.raises(CheckpointError, match=r"config\.json: is not JSON"):
        ServedModel.from_files(info, files | {"config.json": b"{"})
    with pytest.raises(CheckpointError, match=r"config\.json: is not a JSON object"):
        ServedModel.from_files(info, files | {"config.json": b"3"})
