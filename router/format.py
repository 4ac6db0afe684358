"""What an answer's text must match: from message to engine, checked by compiling it.

Compiling may take some tenths of a second: call it beside the event loop.
"""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary

from router.models import ServedModel
from router.text import ModelText
from understudy.errors import InvalidRequest
from understudy.v1 import inference_pb2 as pb
from workers.engine.contract import Grammar

_formats: WeakKeyDictionary[ModelText, Any] = WeakKeyDictionary()  # of each model, from its first format on


def grammar_of(message: pb.Format, model: ServedModel) -> Grammar | None:
    """The format for the engine; None where none is asked for. Raises InvalidRequest with field and reason."""
    grammar = _grammar(message)
    if grammar is not None:
        _open(grammar, model)
    return grammar


def _grammar(message: pb.Format) -> Grammar | None:
    kind = message.WhichOneof("kind")
    if kind is None:
        return None
    if kind == "json_object":
        if not message.json_object:
            raise InvalidRequest("is false; only true is allowed: leave it out", "format.json_object")
        return Grammar("json")
    if kind == "choice":
        return Grammar("choice", json.dumps(list(message.choice.choices)))
    return Grammar("ebnf" if kind == "grammar" else kind, getattr(message, kind))


def check(grammar: Grammar, model: ServedModel, field: str) -> None:
    """Raises InvalidRequest, of this field, with the reason why the grammar cannot be held."""
    try:
        _open(grammar, model)
    except InvalidRequest as error:
        raise InvalidRequest(error.message.removeprefix(f"{error.field}: "), field) from None


def _open(grammar: Grammar, model: ServedModel) -> None:
    from workers.grammar.formats import TokenFormats  # a gateway that never sees a format does not pay for it
    from workers.grammar.vocabulary import NO_BYTES, Vocabulary

    formats = _formats.get(model.text)
    if formats is None:
        table = model.text.token_bytes
        if table is None:
            raise InvalidRequest(NO_BYTES, "format")
        barred = {*model.text.special_ids, *model.defaults.eos_token_ids}
        formats = _formats.setdefault(model.text, TokenFormats(Vocabulary.of(table, barred, model.info.vocab_size)))
    formats.open(grammar)
