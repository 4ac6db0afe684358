"""The tokenizer: byte-level BPE, so that every string can be encoded and decoding gives it back unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
SPECIAL = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
VISIBLE = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
RESERVED = [f"<|reserved_{i}|>" for i in range(12)]

# Words with the space before them, single digits, runs of marks, line ends.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE of exactly ``vocab`` entries, added tokens included (they take the first ids)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [*SPECIAL, *VISIBLE, *RESERVED]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=added,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return mark_added(tokenizer)


def mark_added(tokenizer: Tokenizer) -> Tokenizer:
    """Make the think and tool tokens ordinary added tokens, which decoding keeps."""
    state = json.loads(tokenizer.to_str())
    for entry in state["added_tokens"]:
        entry["special"] = entry["content"] not in VISIBLE
    return Tokenizer.from_str(json.dumps(state))
