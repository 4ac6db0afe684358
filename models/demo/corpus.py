"""Reads the training text, cleans it, and turns it into token streams.

The text folder holds ``storybooks/*_en.txt`` (CC-BY picture books, with ``*_ATTRIBUTION.tsv`` beside them) and
``gutenberg_children_clean.txt`` (public-domain books). In all of them a line ``<|endoftext|>`` ends a document.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bpe import END_OF_TEXT
from chats import make_documents
from tokenizers import Tokenizer

HOLD_OUT_EVERY = 20
SOURCES = ("storybooks", "books", "sentences")

# Publishers' catalogues, title pages and notes on the transcription: never part of a story.
NOT_STORY = re.compile(
    r"12mo|BOUND IN CLOTH|DURABLY BOUND|Handsomely bound|Handsome Cloth|post-?paid|BURT CO|Burt Company|DUTTON"
    r"|G(?:rosset|ROSSET) (?:&|AND)|[Pp]unctuation (?:errors|normal|was|repaired)|[Ee]xtraneous punct"
    r"|changed to [\"“]|[Hh]yphenat|hyphen\b|[Hh]yphens added|booksellers|cents per|PRICE|Price[, ]|COPYRIGHT|Copyright"
    r"|[Tt]ranscriber|Publishers|PUBLISHERS|^Page \d+|Gutenberg|per volume|Colophon are|handy catalog"
    r"|^\W*(?:Author|AUTHOR) (?:of|Of|OF)|^Illustrat|Made in the United States|Trademark|Frontispiece"
    r"|For Little Men and Women|away the Wrapper|which you can buy at the same store|[Ww]ith Illustrations by"
    r"|ILLUSTRATIONS|LITTLE SIMON|^List of I|by Margery Williams|did not belong in the story"
    r"|last line of Chapter VI actually"
    r"|^By [A-Z][\w. ]+$|appeared originally in|were retained|error corrected"
)
LATE = 0.88  # from here on, the first such line ends the book


def tidy(text: str) -> str:
    """Straight quotes, single spaces, no trailing blanks."""
    text = text.replace("“", '"').replace("”", '"').replace("‘", "'").replace("’", "'").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+", " ", text)
    return "\n".join(line.strip() for line in text.split("\n") if line.strip())


def clean_book(text: str) -> str:
    """A book without its front matter and its publisher's pages."""
    lines = tidy(text).split("\n")
    hits = [i for i, line in enumerate(lines) if NOT_STORY.search(line) or line.count("  ") > 3]
    late = [i for i in hits if i >= LATE * len(lines)]
    if len(late) >= 2:
        lines = lines[: late[0]]
    kept = []
    for line in lines:
        letters = [c for c in line if c.isalpha()]
        shouting = len(letters) > 12 and sum(c.isupper() for c in letters) > 0.6 * len(letters)
        if not NOT_STORY.search(line) and not shouting and letters:
            kept.append(line)
    return "\n".join(kept)


def read_documents(folder: Path) -> dict[str, list[str]]:
    """Documents of each source that is read from ``folder``."""
    stories: list[str] = []
    for path in sorted((folder / "storybooks").glob("*_en.txt")):
        stories += [tidy(d) for d in path.read_text(encoding="utf-8").split(END_OF_TEXT)]
    raw = (folder / "gutenberg_children_clean.txt").read_text(encoding="utf-8")
    books = [clean_book(d) for d in raw.split(END_OF_TEXT)]
    return {"storybooks": [d for d in stories if d], "books": [d for d in books if d]}


def read_attribution(folder: Path) -> str:
    """The attribution tables of the storybooks as one table, with the collection in the first column."""
    rows: list[str] = []
    for path in sorted((folder / "storybooks").glob("*_ATTRIBUTION.tsv")):
        head, *body = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        if not rows:
            rows.append("collection\t" + head)
        collection = path.name.removesuffix("_ATTRIBUTION.tsv")
        rows += [f"{collection}\t{line}" for line in body]
    return "\n".join(rows) + "\n"


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training documents and held-out ones."""
    held = [d for i, d in enumerate(documents) if i % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1]
    return [d for i, d in enumerate(documents) if i % HOLD_OUT_EVERY != HOLD_OUT_EVERY - 1], held


@dataclass
class Stream:
    """Documents as one run of tokens, each document followed by end-of-text."""

    tokens: np.ndarray  # [tokens] uint16
    starts: np.ndarray  # [documents] int64
    text_bytes: int

    @staticmethod
    def of(documents: list[str], tokenizer: Tokenizer) -> Stream:
        end = tokenizer.token_to_id(END_OF_TEXT)
        pieces, starts, at = [], [], 0
        for encoding in tokenizer.encode_batch_fast(documents):
            starts.append(at)
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
            at += len(pieces[-1])
        size = sum(len(d.encode()) for d in documents)
        return Stream(np.concatenate(pieces), np.array(starts), size)

    def rows(self, rng: np.random.Generator, count: int, length: int, at_start: float) -> np.ndarray:
        """``count`` crops of ``length`` + 1 tokens; a share ``at_start`` of them begins where a document does."""
        last = len(self.tokens) - length - 1
        firsts = np.where(
            rng.random(count) < at_start,
            np.minimum(rng.choice(self.starts, count), last),
            rng.integers(0, last, count),
        )
        return np.stack([self.tokens[i : i + length + 1] for i in firsts]).astype(np.int64)


def load_streams(folder: Path, tokenizer: Tokenizer, sentences: int) -> tuple[dict[str, Stream], dict[str, Stream]]:
    """Training and held-out streams of every source."""
    train, held = {}, {}
    for name, documents in read_documents(folder).items():
        a, b = split(documents)
        train[name], held[name] = Stream.of(a, tokenizer), Stream.of(b, tokenizer)
    train["sentences"] = Stream.of(list(make_documents(1, sentences)), tokenizer)
    held["sentences"] = Stream.of(list(make_documents(2, 600)), tokenizer)
    return train, held
