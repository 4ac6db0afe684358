"""Text to token ids and back, whole and one token at a time.

Incremental decoding is exact where the tokenizer's decoder joins each token's bytes (byte-level BPE, and
SentencePiece's BPE with byte fallback): every token has fixed bytes, which one incremental UTF-8 decoder turns into
text. Other decoders (WordPiece, Metaspace, CTC) go through the tokenizer itself over a window of a few tokens.

Invalid UTF-8 becomes U+FFFD as in the `tokenizers` library: one per maximal invalid part for byte-level decoders, one
per byte for byte fallback. One difference is meant: a run of fallback bytes that is partly valid keeps its valid
characters (the library gives them up, which a stream that has sent them cannot).
"""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

from tokenizers import AddedToken, Tokenizer, processors

from router.detokenizer import ByteDecoder, Decoder, WindowDecoder
from understudy.errors import CheckpointError
from workers.grammar.vocabulary import REPLACE_PER_BYTE, bytes_of


def _replace_per_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(REPLACE_PER_BYTE, _replace_per_byte)


def _content(value: Any) -> str | None:
    """The text of a token in tokenizer_config.json, which is a string or an object."""
    return value.get("content") if isinstance(value, Mapping) else value


class ModelText:
    """The text side of one model.

    `tokenizer_json` is the file's content, `tokenizer_config` that of tokenizer_config.json (empty where there is
    none), `vocab_size` the model's. Raises CheckpointError when the tokenizer cannot be used.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        tokenizer_config: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        config = tokenizer_config or {}
        parsed = self._parse(tokenizer_json)
        try:
            self.tokenizer = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception for whatever it cannot load
            raise CheckpointError(
                "tokenizer.json: cannot be loaded: its vocabulary and merges do not belong together, or a newer "
                f"version of the tokenizers library wrote it; fetch the checkpoint again ({error})"
            ) from error
        self._add_tokens(config)
        vocab = self.tokenizer.get_vocab(with_added_tokens=True)
        if not vocab:
            raise CheckpointError("tokenizer.json: the vocabulary is empty")
        last = max(vocab.values())
        if vocab_size is not None and last >= vocab_size:
            token = self.tokenizer.id_to_token(last)
            raise CheckpointError(
                f"tokenizer.json: token {token!r} has id {last}, beyond the model's vocab_size of {vocab_size} in "
                "config.json; use the tokenizer that belongs to these weights"
            )
        self._showing: dict[tuple[int, ...], ModelText] = {}
        self.vocab_size = vocab_size if vocab_size is not None else last + 1
        self._special_ids = {i for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        self._add_bos_and_eos(config, vocab)
        tokens: list[str | None] = [None] * (last + 1)
        for token, id in vocab.items():
            tokens[id] = token
        self._bytes = bytes_of(tokens, parsed.get("decoder"))
        if self._bytes is not None:
            shown = self._bytes.table
            self._shown = shown
            self._spoken = [b"" if i in self._special_ids else b for i, b in enumerate(shown)]

    @staticmethod
    def _parse(tokenizer_json: bytes) -> dict[str, Any]:
        try:
            parsed = json.loads(tokenizer_json)
        except ValueError as error:
            raise CheckpointError(f"tokenizer.json: is not JSON: {error}") from error
        if not isinstance(parsed, dict):
            raise CheckpointError("tokenizer.json: is not a JSON object")
        for field in ("truncation", "padding"):
            if parsed.get(field) is not None:
                raise CheckpointError(
                    f"tokenizer.json: {field} is set to {json.dumps(parsed[field])}, which would change prompts "
                    f'silently; set "{field}": null in that file'
                )
        return parsed

    def _add_tokens(self, config: Mapping[str, Any]) -> None:
        """Adds what `added_tokens_decoder` of the config has and tokenizer.json lacks, under the ids given there."""
        entries = config.get("added_tokens_decoder") or {}
        if not isinstance(entries, Mapping):
            raise CheckpointError("tokenizer_config.json: added_tokens_decoder is not an object")
        try:
            wanted = sorted(
                ((int(id), str(token["content"]), token) for id, token in entries.items()), key=lambda e: e[0]
            )
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                "tokenizer_config.json: added_tokens_decoder must map ids to objects with a `content`"
            ) from error
        for id, content, token in wanted:
            if self.tokenizer.token_to_id(content) is None:
                flags = {
                    k: bool(token.get(k, False)) for k in ("special", "lstrip", "rstrip", "single_word", "normalized")
                }
                self.tokenizer.add_tokens([AddedToken(content, **flags)])
            if (got := self.tokenizer.token_to_id(content)) != id:
                raise CheckpointError(
                    f"tokenizer_config.json: added_tokens_decoder gives {content!r} the id {id}, tokenizer.json {got}; "
                    "use files of one checkpoint"
                )

    def _add_bos_and_eos(self, config: Mapping[str, Any], vocab: Mapping[str, int]) -> None:
        """Adds BOS and EOS where the config asks for them and tokenizer.json's post-processor does not.

        What the post-processor adds stays: it is the only rule that transformers 5 follows. Its version 4 and
        llama.cpp add what the config asks for, and models were trained so whose file lacks it (DeepSeek-V2 and V3).
        """
        bare, made = self.encode("a", False), self.encode("a")
        start = next((i for i in range(len(made)) if made[i : i + len(bare)] == bare), 0)
        before, after = made[:start], made[start + len(bare) :]
        wanted = []
        for key, there in (("bos_token", before[:1]), ("eos_token", after[-1:])):
            token = _content(config.get(key)) if config.get(f"add_{key}") else None
            if token is not None and token not in vocab:
                raise CheckpointError(f"tokenizer_config.json: {key} {token!r} is not in tokenizer.json's vocabulary")
            wanted.append([vocab[token]] if token is not None and there != [vocab[token]] else [])
        if not any(wanted):
            return
        names = {id: str(self.tokenizer.id_to_token(id)) for id in (*wanted[0], *before, *after, *wanted[1])}
        ends = [[names[id] for id in ids] for ids in (wanted[0] + before, after + wanted[1])]
        self.tokenizer.post_processor = processors.TemplateProcessing(
            single=[*ends[0], "$A", *ends[1]], special_tokens=[(token, id) for id, token in names.items()]
        )

    @property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes of each id's token; None where the tokenizer's decoder does not simply join them."""
        return None if self._bytes is None else self._bytes.table

    @property
    def special_ids(self) -> Set[int]:
        """Ids that are no text."""
        return self._special_ids

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Releases the GIL; slow for megabytes of text."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`: equals the concatenation of what a `Detokenizer` yields for them."""
        if self._bytes is None:
            text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
            return text
        table = self._spoken if skip_special_tokens else self._shown
        n = len(table)
        text = b"".join([table[i] for i in ids if i < n]).decode("utf-8", self._bytes.errors)
        strip = self._bytes.strip
        while strip and text.startswith(" "):
            text, strip = text[1:], strip - 1
        return text

    def token_text(self, id: int) -> str:
        """One token's own text; U+FFFD where its bytes are no whole characters, empty where there is no such token."""
        if self._bytes is None:
            text: str = self.tokenizer.decode([id], skip_special_tokens=False)
            return text
        return self._shown[id].decode("utf-8", "replace") if id < len(self._shown) else ""

    def showing(self, ids: tuple[int, ...]) -> ModelText:
        """The same, but decoders show these special tokens. Without a byte table nothing changes."""
        if self._bytes is None or not ids:
            return self
        if ids not in self._showing:
            other = copy.copy(self)
            other._spoken = list(self._spoken)
            for id in ids:
                other._spoken[id] = self._shown[id]
            self._showing[ids] = other
        return self._showing[ids]

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        """An incremental decoder of what follows `prompt`."""
        if self._bytes is None:
            return WindowDecoder(self.tokenizer, prompt, self._special_ids)
        return ByteDecoder(self._spoken, self._bytes.errors, self._bytes.strip, prompt)
