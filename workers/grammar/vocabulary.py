"""The bytes that each token adds to a text, where a tokenizer's decoder simply joins them.

So it is for byte-level BPE, and for SentencePiece's BPE with byte fallback.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from understudy.errors import CheckpointError
from workers.engine.formats import mask_words

REPLACE_PER_BYTE = "understudy.replace_per_byte"  # an error handler of codecs, see `router.text`

VOCABULARY_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
NO_BYTES = (
    "the tokens of this model have no bytes of their own, so that no answer can be held to a format; leave it out"
)


@lru_cache(maxsize=1)
def byte_of_char() -> dict[str, int]:
    """GPT-2's map of printable characters to the bytes they stand for."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenBytes(NamedTuple):
    """Each id's bytes, how invalid ones are shown, and how many leading spaces the whole text loses."""

    table: list[bytes]
    errors: str
    strip: int


@lru_cache(maxsize=1)
def _byte_map() -> Any:
    """`byte_of_char` as the codecs take it: a hundred thousand tokens in hundredths of a second."""
    chars = {byte: char for char, byte in byte_of_char().items()}
    return codecs.charmap_build("".join(chars[byte] for byte in range(256)))


def _byte_level(token: str) -> bytes:
    try:
        return codecs.charmap_encode(token, "strict", _byte_map())[0]
    except UnicodeEncodeError:
        return token.encode()


def _fallback_byte(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None


def _sequence_rules(decoder: Mapping[str, Any]) -> tuple[list[tuple[str, str]], int] | None:
    """Replacements and leading spaces to strip of a Replace*, ByteFallback, Fuse, Strip? sequence; else None."""
    rules, strip = [], 0
    order = ["Replace", "ByteFallback", "Fuse", "Strip"]
    stage, kinds = 0, set()
    for step in decoder.get("decoders", []):
        kind = step["type"]
        if kind not in order or order.index(kind) < stage:
            return None
        stage = order.index(kind)
        kinds.add(kind)
        if kind == "Replace":
            if "String" not in step["pattern"]:
                return None
            rules.append((step["pattern"]["String"], step["content"]))
        elif kind == "Strip":
            if step["content"] != " " or step["stop"] != 0:
                return None
            strip = int(step["start"])
    return (rules, strip) if {"ByteFallback", "Fuse"} <= kinds else None


def bytes_of(tokens: Sequence[str | None], decoder: Mapping[str, Any] | None) -> TokenBytes | None:
    """The byte table of a tokenizer, or None where its decoder does not simply join bytes."""
    if decoder is None:
        return None
    if decoder["type"] == "Sequence" and [d["type"] for d in decoder["decoders"]] == ["ByteLevel"]:
        decoder = decoder["decoders"][0]
    if decoder["type"] == "ByteLevel":
        return TokenBytes([b"" if t is None else _byte_level(t) for t in tokens], "replace", 0)
    if decoder["type"] != "Sequence" or (found := _sequence_rules(decoder)) is None:
        return None
    rules, strip = found
    table = []
    for token in tokens:
        text = token or ""
        for old, new in rules:
            text = text.replace(old, new)
        table.append(_fallback_byte(text) or text.encode())
    return TokenBytes(table, REPLACE_PER_BYTE, strip)


@dataclass(frozen=True)
class Vocabulary:
    """What masks are made of: `size` is the model's V; `tokens[i]` are the bytes of token i, empty for those that are
    never part of an answer's text: special tokens, and ids that the tokenizer does not know."""

    tokens: tuple[bytes, ...]
    size: int

    @cached_property
    def spoken(self) -> NDArray[np.uint32]:
        """Bits of the tokens that are text."""
        return self._bits(bool)

    @cached_property
    def breaks(self) -> NDArray[np.uint32]:
        """Bits of the tokens that are line breaks and nothing else."""
        return self._bits(lambda token: bool(token) and not token.strip(b"\n"))

    def _bits(self, wanted: Callable[[bytes], bool]) -> NDArray[np.uint32]:
        bits = np.zeros(mask_words(self.size) * 32, np.bool_)
        bits[: self.size] = np.fromiter(map(wanted, self.tokens), np.bool_, self.size)
        return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)

    @classmethod
    def of(cls, table: Sequence[bytes], barred: Collection[int], size: int) -> Vocabulary:
        """`table` may be shorter or longer than `size`; `barred` ids lose their bytes."""
        lost = set(barred)
        spoken = [b"" if i in lost else b for i, b in enumerate(table[:size])]
        return cls((*spoken, *[b""] * (size - len(spoken))), size)


def vocabulary_of(files: Mapping[str, bytes], size: int) -> Vocabulary | None:
    """The vocabulary of a checkpoint, from its files' contents by name: tokenizer.json, tokenizer_config.json for
    tokens that only it names, generation_config.json and config.json for the ids that end an answer.

    None where a token has no bytes of its own (WordPiece, Metaspace, CTC). Raises CheckpointError.
    """
    if "tokenizer.json" not in files:
        raise CheckpointError("tokenizer.json: not in the checkpoint; answers cannot be held to a format without it")
    parsed = _json("tokenizer.json", files["tokenizer.json"])
    model = parsed.get("model") or {}
    names: dict[int, str] = {}
    vocab = model.get("vocab") or {}
    pairs = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    for token, id in pairs:
        names[id] = token
    barred = set(_ends(files))
    for token in parsed.get("added_tokens") or []:
        names[token["id"]] = token["content"]
        if token.get("special"):
            barred.add(token["id"])
    if "tokenizer_config.json" in files:
        added = _json("tokenizer_config.json", files["tokenizer_config.json"]).get("added_tokens_decoder") or {}
        for id, token in added.items():
            names.setdefault(int(id), token["content"])
            if token.get("special"):
                barred.add(int(id))
    found = bytes_of([names.get(i) for i in range(max(names, default=-1) + 1)], parsed.get("decoder"))
    return None if found is None else Vocabulary.of(found.table, barred, size)


def _ends(files: Mapping[str, bytes]) -> list[int]:
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if name in files:
            given = _json(name, files[name]).get("eos_token_id")
            ids += given if isinstance(given, list) else [] if given is None else [given]
    return ids


def _json(name: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{name}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{name}: is not a JSON object")
    return value
