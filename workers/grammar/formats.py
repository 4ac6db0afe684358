"""Matchers of answers' formats over one vocabulary: `workers.engine.formats` is what the engine asks of them."""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from pathlib import Path

import llguidance
import numpy as np
from numpy.typing import NDArray

from understudy.errors import CheckpointError, InvalidRequest
from workers.engine.contract import Grammar
from workers.engine.formats import Bits, Matcher, mask_words
from workers.grammar.source import lark_of
from workers.grammar.thought import AfterThought
from workers.grammar.vocabulary import NO_BYTES, VOCABULARY_FILES, Vocabulary, vocabulary_of

log = logging.getLogger(__name__)

FIELDS = {
    "json_schema": "format.json_schema",
    "json": "format.json_object",
    "regex": "format.regex",
    "ebnf": "format.grammar",
    "choice": "format.choice",
    "calls": "tools",
}
KEPT = 64  # compiled grammars
_REASON = 400  # characters of the library's reason that an error repeats

# What one grammar may cost. The library counts its work, so that the same grammar is refused everywhere: compiling
# takes some tenths of a second at most, a step some tens of milliseconds.
_LIMITS = llguidance.LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=50_000,  # of 1 to 2 KB each
    max_grammar_size=200_000,
    verbose_errors=False,
)


class _Tokenizer:
    """A vocabulary in the form that the library takes. Its last token is an end that no model has."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.size
        self.tokens = [*vocabulary.tokens, b"<end>"]
        self.special_token_ids = [vocabulary.size]

    def __call__(self, _text: object) -> list[int]:
        """The library asks for this to force text, which is switched off."""
        return []


class TokenFormats:
    """Opens matchers over one vocabulary. Thread-safe. What it needs beyond the tokens' bytes is built at first use
    (for 150,000 tokens about half a second), or by `prepare`."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[Grammar, llguidance.LLMatcher] = OrderedDict()

    def open(self, grammar: Grammar) -> Matcher:
        """A matcher before the first token. Raises InvalidRequest, with field and reason, where the grammar cannot be
        held. May take long."""
        thought, grammar = grammar.thought, Grammar(grammar.kind, grammar.text)
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        if found is None:
            found = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = found
                while len(self._compiled) > KEPT:
                    self._compiled.popitem(last=False)
        matcher = TokenMatcher(found.deep_copy(), self._vocabulary.size)
        if thought is None:
            return matcher
        before = self.open(Grammar("calls", thought.grammar)) if thought.grammar else None
        return AfterThought(matcher, thought, self._vocabulary, before)

    def prepare(self) -> None:
        """Builds what every grammar needs."""
        self._library_tokenizer()
        _ = self._vocabulary.spoken

    def _library_tokenizer(self) -> llguidance.LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = llguidance.LLTokenizer(_Tokenizer(self._vocabulary))  # type: ignore[arg-type]
            return self._tokenizer

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        field = FIELDS.get(grammar.kind, "format")
        try:
            lark = lark_of(grammar)
        except ValueError as error:
            raise InvalidRequest(str(error), field) from None
        compiled = llguidance.LLMatcher(self._library_tokenizer(), lark, log_level=0, limits=_LIMITS)
        if not compiled.is_error():
            first = TokenMatcher(compiled.deep_copy(), self._vocabulary.size)
            row: Bits = np.zeros(mask_words(self._vocabulary.size), dtype=np.uint32)
            may_end = first.mask_into(row)
            if first.error and "NoExtension" not in first.error:
                raise InvalidRequest(first.reason(grammar.kind), field)
            if not may_end and not row.any():
                raise InvalidRequest("no answer of this model can match it", field)
            return compiled
        raise InvalidRequest(_reason(compiled.get_error(), grammar.kind), field)


class TokenMatcher:
    """How far one answer has come. See `workers.engine.formats.Matcher`."""

    def __init__(self, matcher: llguidance.LLMatcher, size: int) -> None:
        self._matcher = matcher
        self._size = size
        self._bits: NDArray[np.uint32] = np.zeros(mask_words(size + 1), dtype=np.uint32)

    def mask_into(self, row: Bits) -> bool:
        """See the port. A grammar that grows too complex on the way is a dead end, and `error` says so."""
        bits = self._bits
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            log.info("an answer's format was given up: %s", self.error)
            row[:] = 0
            return False
        bits[self._size // 32] &= np.uint32(0xFFFFFFFF ^ (1 << self._size % 32))  # the end that no model has
        row[:] = bits[: len(row)]
        return self._matcher.is_accepting()

    def accept(self, token: int) -> None:
        """See the port. Where the way to it is too much work, nothing is raised: the next mask is a dead end."""
        if self._matcher.try_consume_tokens([token]) != 1 and not self._matcher.is_error():
            raise ValueError(f"the format does not allow token {token} here")

    def rollback(self, count: int) -> None:
        """See the port."""
        if count and not self._matcher.is_error() and not self._matcher.rollback(count):
            raise ValueError(f"{count} tokens cannot be taken back: {self._matcher.get_error()}")

    @property
    def finished(self) -> bool:
        """See the port."""
        return not self._matcher.is_error() and self._matcher.is_stopped() and self._matcher.is_accepting()

    @property
    def error(self) -> str:
        """See the port."""
        return self.reason()

    def reason(self, kind: str = "") -> str:
        """Why nothing can be said any more, of a grammar of this kind; empty while all is well."""
        return _reason(self._matcher.get_error(), kind) if self._matcher.is_error() else ""


def _reason(error: str, kind: str) -> str:
    """The library's reason without its echo of the grammar; lines are told only of a grammar that the user wrote."""
    text = error.split("\n<state>", maxsplit=1)[0]
    text = re.sub(r"\n +\d+ \| .*|\n +\^+ *$", "", text, flags=re.MULTILINE).strip()
    at = re.match(r"(?:at )?(\d+)\((\d+)\): ", text)
    if at:
        text = text[at.end() :]
        if kind == "ebnf":
            text = f"line {at[1]}: {text}"
    text = re.sub(r"\s*\n\s*", " / ", text).removesuffix(" / <non-verbose/>")
    text = text.replace("following special tokens are available: ⟦⟧", "special tokens cannot be asked for")
    text = text.replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "write anyOf")
    return f"cannot be held: {text[:_REASON]}"


class CheckpointFormats:
    """Formats over the vocabulary of a checkpoint, which is read when the first grammar comes, or by `prepare`.
    Thread-safe."""

    def __init__(self, model_dir: Path, vocab_size: int) -> None:
        self._dir = model_dir
        self._size = vocab_size
        self._lock = threading.Lock()
        self._formats: TokenFormats | None = None

    def open(self, grammar: Grammar) -> Matcher:
        """See `TokenFormats.open`. Raises InvalidRequest too where this checkpoint cannot hold any grammar."""
        return self._of_vocabulary().open(grammar)

    def prepare(self) -> None:
        """Reads and builds all that a first grammar would wait for. What cannot be read is told when one comes."""
        try:
            self._of_vocabulary().prepare()
        except Exception as error:
            log.debug("no answer of this model can be held to a format: %s", error)

    def _of_vocabulary(self) -> TokenFormats:
        with self._lock:
            if self._formats is None:
                self._formats = TokenFormats(self._vocabulary())
            return self._formats

    def _vocabulary(self) -> Vocabulary:
        files = {n: (self._dir / n).read_bytes() for n in VOCABULARY_FILES if (self._dir / n).is_file()}
        try:
            vocabulary = vocabulary_of(files, self._size)
        except CheckpointError as error:
            raise InvalidRequest(str(error), "format") from error
        if vocabulary is None:
            raise InvalidRequest(NO_BYTES, "format")
        return vocabulary
