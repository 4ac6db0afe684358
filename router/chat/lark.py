"""What grammars of chats have in common."""

from __future__ import annotations

import json

from router.text import ModelText

TEXT = r"TEXT: /(.|\n)*/"


class Marks:
    """How markers stand in a grammar: special tokens by their id, the others as the text that they are. `known` are
    markers in which the templates of one family differ."""

    def __init__(self, text: ModelText, known: frozenset[str] = frozenset()) -> None:
        self._text = text
        self.known = known

    def is_special(self, marker: str) -> bool:
        return self._text.tokenizer.token_to_id(marker) in self._text.special_ids

    def __call__(self, marker: str) -> str:
        id = self._text.tokenizer.token_to_id(marker)
        return f"<[{id}]>" if id in self._text.special_ids else json.dumps(marker, ensure_ascii=False)


def harmony_asides(marks: Marks, thinking: bool) -> str:
    """gpt-oss: messages of thought, and to the user on the way, before the turn's last one. Needs the rule TEXT.

    `thinking`: the answer begins within one.
    """
    channel, message = marks("<|channel|>"), marks("<|message|>")
    end = f'TEXT {marks("<|end|>")} {marks("<|start|>")} "assistant"'
    aside = f'({channel} ("analysis" | "commentary") {message} {end})*'
    return f"{end} {aside}" if thinking else aside


def harmony_final(marks: Marks, thinking: bool) -> str:
    """gpt-oss: all that stands before the text of its answer."""
    final = f'{marks("<|channel|>")} "final" {marks("<|message|>")}'
    return f"start: {harmony_asides(marks, thinking)} {final}\n{TEXT}"
