"""The part of a request that says how tokens are chosen, and what is told of it: from message to engine, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from router.bounds import BOUNDS, check_strings, show, within
from router.models import ServedModel
from router.text import ModelText
from understudy.errors import InvalidRequest
from understudy.v1 import inference_pb2 as pb
from workers.engine import Probe, Sampling

MAX_BIASES = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_BYTES = 1024
MAX_BAD_WORD_TOKENS = 16
MAX_ATTENTION_LAYERS = 8
DEFAULT_CANDIDATES = 10
_TRACE = "response.trace_options"


def sampling(message: pb.Sampling, model: ServedModel, seed: int) -> Sampling:
    """What the engine is told of `message`. Encodes the bad words. Raises InvalidRequest."""
    d = model.defaults

    def number(name: str, default: float) -> float:
        return within(f"sampling.{name}", getattr(message, name)) if message.HasField(name) else default

    return Sampling(
        temperature=number("temperature", d.temperature),
        top_k=int(number("top_k", d.top_k)),
        top_p=number("top_p", d.top_p),
        min_p=number("min_p", d.min_p),
        seed=seed,
        repetition_penalty=number("repetition_penalty", d.repetition_penalty),
        presence_penalty=number("presence_penalty", 0.0),
        frequency_penalty=number("frequency_penalty", 0.0),
        logit_bias=_logit_bias(message.logit_bias, model.info.vocab_size),
        bad_words=bad_words(message.bad_words, model.text),
    )


def sequences(message: pb.Sampling) -> int:
    """How many sequences are asked for. Raises InvalidRequest."""
    return int(within("sampling.n", message.n)) if message.HasField("n") else 1


def _logit_bias(given: Mapping[int, float], vocab_size: int) -> list[tuple[int, float]]:
    field = "sampling.logit_bias"
    if len(given) > MAX_BIASES:
        raise InvalidRequest(f"has {len(given)} entries; at most {MAX_BIASES} are allowed", field)
    for id, bias in sorted(given.items()):
        if id >= vocab_size:
            raise InvalidRequest(f"names token {id}; ids must be below the vocabulary size of {vocab_size}", field)
        if bias not in BOUNDS[field]:
            raise InvalidRequest(f"of token {id} is {bias:g}; it must be in {BOUNDS[field]}", field)
    return sorted(given.items())


def bad_words(words: Sequence[str], text: ModelText) -> list[list[int]]:
    """The sequences of ids that spell each word: where a text begins, after a space, and after a line's end.

    Raises InvalidRequest.
    """
    field = "sampling.bad_words"
    check_strings(field, words, MAX_BAD_WORDS, MAX_BAD_WORD_BYTES)
    break_ = text.encode("\n", add_special_tokens=False)
    found: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(words):
        spelled = [text.encode(w, add_special_tokens=False) for w in (word, f" {word}")]
        after_break = text.encode(f"\n{word}", add_special_tokens=False)
        if after_break[: len(break_)] == break_:  # as it is within a text, where a tokenizer puts a space before it
            spelled.append(after_break[len(break_) :])
        longest = max(map(len, spelled))
        if longest > MAX_BAD_WORD_TOKENS:
            raise InvalidRequest(
                f"[{i}] is {show(word)}, which takes {longest} tokens; at most {MAX_BAD_WORD_TOKENS} are allowed: give "
                "a shorter part of it",
                field,
            )
        if not spelled[0]:
            raise InvalidRequest(f"[{i}] is {show(word)}, of which this model's tokenizer makes no token", field)
        found |= dict.fromkeys(tuple(ids) for ids in spelled if ids)
    return [list(ids) for ids in found]


def probe(response: pb.ResponseOptions, layers: int) -> Probe | None:
    """What the engine is asked to tell; `layers` is how many the model has, 0 where that is not known.

    Raises InvalidRequest.
    """
    options = response.trace_options
    if not response.trace:
        if response.HasField("trace_options"):
            raise InvalidRequest("is given, but response.trace is not set; set it, or leave this out", _TRACE)
        return None
    candidates = options.candidates if options.HasField("candidates") else DEFAULT_CANDIDATES
    field = f"{_TRACE}.attention_layers"
    attention = list(dict.fromkeys(options.attention_layers))
    if len(attention) > MAX_ATTENTION_LAYERS:
        raise InvalidRequest(f"has {len(attention)} layers; at most {MAX_ATTENTION_LAYERS} are allowed", field)
    beyond = [i for i in attention if layers and i >= layers]
    if beyond:
        raise InvalidRequest(f"names layer {beyond[0]}; the model has {layers}, counted from 0", field)
    return Probe(int(within(f"{_TRACE}.candidates", candidates)), True, sorted(attention))
