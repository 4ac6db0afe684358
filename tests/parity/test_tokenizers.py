"""Token ids and decoded text against answers that this project did not write."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.detokenizer import Detokenizer
from router.text import ModelText
from understudy.errors import CheckpointError

pytestmark = pytest.mark.oracles
LLAMA_CPP = {
    "gpt2": "gpt-2",
    "llama3": "llama-bpe",
    "tinyllama": "llama-spm",
    "qwen3": "qwen2",
    "deepseek-llm": "deepseek-llm",
}
TRANSFORMERS_JS = (  # tokenizer, file, model, whether its ids have BOS
    ("gpt2", "gpt2", "openai-community/gpt2", True),
    ("gpt2", "gpt2", "Xenova/gpt2", True),
    ("tinyllama", "llama", "Xenova/llama-tokenizer", True),
    ("llama3", "llama", "Xenova/llama3-tokenizer-new", True),
    ("llama3", "llama", "Xenova/llama3-tokenizer", False),
    ("qwen3", "qwen2", "Xenova/Qwen1.5-0.5B-Chat", True),
    ("gpt-oss", "gpt2", "Xenova/gpt-4o", True),
)
# Decoded with a clean-up of spaces that this service, like transformers today, does not do.
CLEANED_UP = {"gpt2": {"PUNCTUATION"}, "llama3": {"PUNCTUATION"}}
ALL = ("gpt2", "llama3", "tinyllama", "qwen3", "deepseek-llm", "gpt-oss", "minimind", "stories260K", "demo")
BYTE_FALLBACK = ("tinyllama", "stories260K")
ELSEWHERE = {
    "stories260K": Path("weights", "stories260K-hf"),
    "demo": Path(__file__).parents[2] / "models" / "demo",
}
_loaded: dict[str, ModelText] = {}


def load(oracles: Path, name: str) -> ModelText:
    if name not in _loaded:
        folder = oracles / ELSEWHERE.get(name, Path("tokenizers", name))
        config = folder / "tokenizer_config.json"
        settings_ = json.loads(config.read_text()) if config.is_file() else {}
        _loaded[name] = ModelText((folder / "tokenizer.json").read_bytes(), settings_)
    return _loaded[name]


def texts(oracles: Path, name: str = "gpt-2") -> list[str]:
    whole = (oracles / "goldens" / "llama.cpp" / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode()
    *found, after_the_last = whole.split("\n__ggml_vocab_test__\n")
    assert not after_the_last
    return found


def streamed(text: ModelText, prompt: list[int], ids: list[int]) -> tuple[str, list[int]]:
    """The text that a stream of these ids gives, and how many ids each piece completes."""
    detokenizer = Detokenizer(text.decoder(prompt))
    pieces = [*(detokenizer.push([i]) for i in ids), detokenizer.finish()]
    return "".join(p.text for p in pieces), [p.ids for p in pieces]


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_ids_equal_those_of_llama_cpp(oracles: Path, name: str) -> None:
    text = load(oracles, name)
    golden = LLAMA_CPP[name]
    lines = (oracles / "goldens" / "llama.cpp" / f"ggml-vocab-{golden}.gguf.out").read_text().splitlines()
    inputs = texts(oracles, golden)
    assert len(inputs) == len(lines) == 46
    for given_, line in zip(inputs, lines, strict=True):
        assert text.encode(given_, add_special_tokens=False) == [int(i) for i in line.split()], given_


@pytest.mark.parametrize(("name", "file", "model", "special"), TRANSFORMERS_JS)
def test_ids_equal_those_of_transformers_js(oracles: Path, name: str, file: str, model: str, special: bool) -> None:
    text = load(oracles, name)
    goldens = json.loads((oracles / "goldens" / "transformers.js" / f"{file}.json").read_text(encoding="utf-8"))
    cases: dict[str, Any] = goldens[model]
    for case, golden in cases.items():
        assert text.encode(golden["text"], special) == golden["ids"], case
    different = {c for c, g in cases.items() if text.decode(g["ids"], skip_special_tokens=False) != g["decoded"]}
    assert different == CLEANED_UP.get(name, set())


@pytest.mark.parametrize("name", ALL)
def test_streamed_text_equals_the_whole(oracles: Path, name: str) -> None:
    """Golden texts with a prompt of every length: prompt and answer together read as the library decodes them."""
    text = load(oracles, name)
    for given_ in texts(oracles):
        ids = text.encode(given_, add_special_tokens=False)
        whole = text.tokenizer.decode(ids, skip_special_tokens=True)
        assert text.decode(ids) == whole
        for cut in {0, min(1, len(ids)), len(ids) // 2, max(len(ids) - 1, 0)}:
            answer, counts = streamed(text, ids[:cut], ids[cut:])
            assert sum(counts) == len(ids) - cut
            before = text.tokenizer.decode(ids[:cut], skip_special_tokens=True)
            if not before.endswith("\ufffd"):
                assert before + answer == whole


@pytest.mark.parametrize("name", ALL)
def test_random_ids_stream_as_the_library_decodes_them(oracles: Path, name: str) -> None:
    """Random ids are mostly broken UTF-8. Where byte fallback is decoded run by run, only runs that are whole or
    hold no whole character can be equal, so there single byte tokens are drawn."""
    text = load(oracles, name)
    rng = random.Random(7)
    size = text.tokenizer.get_vocab_size()
    for _ in range(60):
        ids = [rng.randrange(size) for _ in range(rng.randrange(1, 80))]
        received = rng.randrange(len(ids))
        answer, _ = streamed(text, [], ids)
        assert answer == text.decode(ids)
        if name not in BYTE_FALLBACK:
            assert answer == text.tokenizer.decode(ids, skip_special_tokens=True)
        again = Detokenizer(text.decoder([]), received=ids[:received])
        parts = [again.received_text, *(again.push([i]).text for i in ids[received:]), again.finish().text]
        assert "".join(parts) == answer


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_the_whole_decodes(oracles: Path, name: str, data: st.DataObject) -> None:
    """Whatever the ids (special, unknown, half characters), however many come at once, wherever the prompt ends."""
    text = load(oracles, name)
    added = sorted(text.tokenizer.get_added_tokens_decoder())
    id_ = st.one_of(st.integers(0, text.vocab_size - 1), st.integers(0, 300), st.sampled_from(added))
    ids = data.draw(st.lists(id_, max_size=40))
    cut, batch = data.draw(st.integers(0, len(ids))), data.draw(st.integers(1, 5))
    detokenizer = Detokenizer(text.decoder([]), received=ids[:cut])
    pieces = [detokenizer.push(ids[i : i + batch]) for i in range(cut, len(ids), batch)] + [detokenizer.finish()]
    assert detokenizer.received_text + "".join(p.text for p in pieces) == text.decode(ids)
    assert sum(p.ids for p in pieces) == len(ids) - cut
    if name not in BYTE_FALLBACK:
        assert text.decode(ids) == text.tokenizer.decode(ids, skip_special_tokens=True)
        assert text.decode(ids, False) == text.tokenizer.decode(ids, skip_special_tokens=False)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_text_streams_whole_with_byte_fallback(oracles: Path, data: st.DataObject) -> None:
    """TinyLlama's vocabulary lacks most characters: their bytes come one token at a time, never half a character."""
    text = load(oracles, "tinyllama")
    said = data.draw(st.text(max_size=40).filter(lambda s: "</s>" not in s and "<s>" not in s and "<unk>" not in s))
    ids = text.encode(said, add_special_tokens=False)
    detokenizer = Detokenizer(text.decoder([1]))
    pieces = [detokenizer.push([i]) for i in ids]
    assert all("\ufffd" not in p.text for p in pieces) or "\ufffd" in said
    assert "".join(p.text for p in pieces) + detokenizer.finish().text == text.tokenizer.decode(ids)
    held = 0
    for piece in pieces:
        held += 1
        assert bool(piece.text) <= bool(piece.ids)
        held -= piece.ids
        assert 0 <= held < 4


@pytest.mark.parametrize("name", ALL)
def test_special_tokens_as_transformers_adds_them(oracles: Path, name: str) -> None:
    """`PreTrainedTokenizerFast`, for the `LlamaTokenizer` of transformers 5 builds its own rules for spaces instead of
    the file's, and then differs from llama.cpp's ids."""
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(str(oracles / ELSEWHERE.get(name, Path("tokenizers", name))))
    text = load(oracles, name)
    special = "".join(f" a {t.content} b" for t in list(text.tokenizer.get_added_tokens_decoder().values())[:40])
    for given_ in ("", "Hello world", "  two spaces", "né", special):
        assert text.encode(given_) == reference(given_)["input_ids"]
        assert text.encode(given_, False) == reference(given_, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["gpt2", "stories260K"])
@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("eos", [None, False, True])
def test_bos_and_eos_as_transformers_adds_them(
    oracles: Path, tmp_path: Path, name: str, bos: bool | None, eos: bool | None
) -> None:
    """Whatever the post-processor in tokenizer.json; and then what the config asks for and is not there yet."""
    from transformers import PreTrainedTokenizerFast

    raw = (oracles / ELSEWHERE.get(name, Path("tokenizers", name)) / "tokenizer.json").read_bytes()
    added = [t.content for t in load(oracles, name).tokenizer.get_added_tokens_decoder().values() if t.special]
    config: dict[str, Any] = {"bos_token": added[len(added) > 1], "eos_token": added[-1]}
    config |= {k: v for k, v in (("add_bos_token", bos), ("add_eos_token", eos)) if v is not None}
    (tmp_path / "tokenizer.json").write_bytes(raw)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    reference = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    text = ModelText(raw, config)
    vocab = text.tokenizer.get_vocab()
    for said in ("", "Hello world"):
        expected = reference(said)["input_ids"]
        if bos and expected[:1] != [vocab[config["bos_token"]]]:
            expected = [vocab[config["bos_token"]], *expected]
        if eos:
            expected = [*expected, vocab[config["eos_token"]]]
        assert text.encode(said) == expected
        assert text.encode(said, False) == reference(said, add_special_tokens=False)["input_ids"]


def test_truncation_in_the_tokenizer_is_refused(oracles: Path) -> None:
    raw = (oracles / "tokenizers" / "negative" / "gpt2-truncation-50" / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match=r'tokenizer\.json: truncation .*"truncation": null'):
        ModelText(raw)


def test_a_renamed_token_is_refused(oracles: Path) -> None:
    """One entry of the vocabulary was renamed, so that a merge has no result."""
    raw = (oracles / "tokenizers" / "negative" / "gpt2-one-token-renamed" / "tokenizer.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be loaded.*do not belong together"):
        ModelText(raw)
