"""A model as a gateway knows it: what its engines are, how its text is read and written, how it likes to be sampled."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from router.chat.formats import ChatFormats
from router.chat.templates import ChatTemplate
from router.text import ModelText
from understudy.errors import CheckpointError
from workers.engine import EngineInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingDefaults:
    """What holds where a request says nothing.

    A checkpoint's generation_config.json with `do_sample` false means greedy, as in transformers; without the file,
    or without `do_sample` in it, its values are taken where they are given, and 1, 0, 1, 0 where not. Its repetition
    penalty holds either way.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_configs(
        cls, generation_config: Mapping[str, Any] | None, config: Mapping[str, Any] | None
    ) -> SamplingDefaults:
        """From the contents of generation_config.json and config.json. Raises CheckpointError."""
        given, model = generation_config or {}, config or {}
        eos = given.get("eos_token_id", model.get("eos_token_id"))
        ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise CheckpointError(
                f"generation_config.json: eos_token_id is {eos!r}; it must be one token id or several"
            )
        for name in ("no_repeat_ngram_size", "bad_words_ids"):
            if given.get(name) not in (None, 0, []):
                log.warning("generation_config.json: %s = %r is not supported and left out", name, given[name])

        def number(name: str, default: float, low: float, high: float) -> float:
            value = given.get(name)
            if value is None:
                return default
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise CheckpointError(f"generation_config.json: {name} is {value!r}; it must be in [{low:g}, {high:g}]")
            return float(value)

        penalty = number("repetition_penalty", 1.0, 1e-9, 10)
        if given.get("do_sample") is False:
            return cls(temperature=0.0, repetition_penalty=penalty, eos_token_ids=ids)
        return cls(
            temperature=number("temperature", 1.0, 0, 100),
            top_k=int(number("top_k", 0, 0, 2**31 - 1)),
            top_p=number("top_p", 1.0, 1e-9, 1),
            min_p=number("min_p", 0.0, 0, 1),
            repetition_penalty=penalty,
            eos_token_ids=ids,
        )


@dataclass(frozen=True)
class ServedModel:
    """One model that a gateway answers for. `info.model` is the name that clients use."""

    info: EngineInfo
    text: ModelText
    defaults: SamplingDefaults
    chat: ChatTemplate = field(default_factory=lambda: ChatTemplate({}))
    chat_formats: ChatFormats = field(default_factory=ChatFormats)

    @property
    def name(self) -> str:
        return self.info.model

    @classmethod
    def from_files(cls, info: EngineInfo, files: Mapping[str, bytes]) -> ServedModel:
        """From the contents of a checkpoint's files by name; tokenizer.json is needed, tokenizer_config.json,
        generation_config.json and config.json are used where they are there. Raises CheckpointError."""

        def read(name: str) -> dict[str, Any] | None:
            if name not in files:
                return None
            try:
                value = json.loads(files[name])
            except ValueError as error:
                raise CheckpointError(f"{name}: is not JSON: {error}") from error
            if not isinstance(value, dict):
                raise CheckpointError(f"{name}: is not a JSON object")
            return value

        if "tokenizer.json" not in files:
            raise CheckpointError(
                "tokenizer.json: not in the checkpoint; write it with transformers' AutoTokenizer and save_pretrained"
            )
        text = ModelText(files["tokenizer.json"], read("tokenizer_config.json"), info.vocab_size)
        defaults = SamplingDefaults.from_configs(read("generation_config.json"), read("config.json"))
        chat = ChatTemplate.from_files(files)
        return cls(info, text, defaults, chat, ChatFormats.detect(chat))


TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
