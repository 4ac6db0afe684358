"""A checkpoint's chat template: where it lies, which one of several, and what it is given.

The text itself is made by `router.chat.renderer`, in a process of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from router.chat.renderer import Renderer, TemplateFailed
from understudy.errors import CheckpointError, InvalidRequest

TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_NONE = re.compile(r"content['\"]?\]?\s+is\s+(not\s+)?none")

Json = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """The templates of one checkpoint by name ("default", "tool_use", ...), and the special tokens that they see."""

    named: Mapping[str, str]
    tokens: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> ChatTemplate:
        """From a checkpoint's files by name: chat_template.jinja wins over tokenizer_config.json, and both may be
        joined by additional_chat_templates/NAME.jinja. Raises CheckpointError."""
        try:
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            named = _from_config(config.get("chat_template"))
            for name, data in files.items():
                if name == TEMPLATE_FILE:
                    named["default"] = data.decode()
                elif name.startswith(MORE_TEMPLATES + "/"):
                    named[name.removeprefix(MORE_TEMPLATES + "/").removesuffix(".jinja")] = data.decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{TEMPLATE_FILE}: is not UTF-8: {error}") from error
        tokens = {name: text for name in _TOKENS if (text := _content(config.get(name))) is not None}
        return cls(named, tokens)

    def source(self, with_tools: bool) -> str:
        """The template for a request with tools or without. Raises InvalidRequest where there is none."""
        names = ("tool_use", "default") if with_tools else ("default", "tool_use")
        for name in names:
            if name in self.named:
                return self.named[name]
        if self.named:
            raise InvalidRequest(
                f"has chat templates named {', '.join(sorted(self.named))} and none named default; "
                f"put the right one into {TEMPLATE_FILE} beside the checkpoint",
                "model",
            )
        raise InvalidRequest(
            f"has no chat template: put one into {TEMPLATE_FILE} beside the checkpoint, or use Generate with a text "
            "prompt",
            "model",
        )

    async def render(
        self,
        renderer: Renderer,
        messages: Sequence[Json],
        tools: Sequence[Json] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        continue_final: bool = False,
        now: datetime | None = None,
    ) -> str:
        """The prompt. `messages` and `tools` as transformers' `apply_chat_template` takes them.

        With `continue_final` it ends with the last message's content, else with what begins the assistant's turn.
        Raises InvalidRequest with the template's own words where it refuses.
        """
        source = self.source(bool(tools))
        given = [dict(m) for m in messages]
        final = given[-1]["content"] if continue_final else None
        variables: Json = {**self.tokens, **(kwargs or {}), "tools": list(tools) or None, "documents": None}
        variables["add_generation_prompt"] = not continue_final
        first: TemplateFailed | None = None
        for variant in _variants(source, given):
            try:
                text = await renderer.render(source, variables | {"messages": variant}, now)
                return text if final is None else _cut_after(text, final)
            except TemplateFailed as error:
                first = first or error
                if error.reason != "failed":
                    break
        assert first is not None
        raise _refusal(first) from first


def _variants(source: str, messages: list[Json]) -> list[list[Json]]:
    """Templates do not agree on how a turn that only calls tools looks: its content is empty or none, and its
    arguments are an object or text. The likeliest first; a template that fails on one is given the next."""
    if not any(m.get("tool_calls") for m in messages):
        return [messages]
    nothing = [None, ""] if _NONE.search(source) else ["", None]

    def shaped(message: Json, empty: str | None, as_text: bool) -> Json:
        if not message.get("tool_calls"):
            return message
        calls = message["tool_calls"]
        if as_text:
            calls = [c | {"function": c["function"] | {"arguments": _text(c["function"]["arguments"])}} for c in calls]
        return message | {"content": message["content"] or empty, "tool_calls": calls}

    return [[shaped(m, empty, as_text) for m in messages] for as_text in (False, True) for empty in nothing]


def _text(arguments: Json) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def _from_config(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(v, dict) and {"name", "template"} <= set(v) for v in value):
        return {str(v["name"]): str(v["template"]) for v in value}
    raise CheckpointError("tokenizer_config.json: chat_template is neither text nor a list of {name, template}")


def _content(value: Any) -> str | None:
    """The text of a token, which is a string or an object."""
    found = value.get("content") if isinstance(value, Mapping) else value
    return found if isinstance(found, str) else None


def _cut_after(text: str, final: str) -> str:
    """`text` up to the end of the last message's content, whose spaces a template may trim."""
    for wanted in (final, final.strip()):
        at = text.rfind(wanted)
        if at >= 0:
            return text[: at + len(wanted)]
    raise InvalidRequest(
        "cannot be kept: the model's template does not show the last message as it is; leave it out",
        "continue_final_message",
    )


def _refusal(error: TemplateFailed) -> InvalidRequest:
    """What a caller is told of a template that did not render."""
    said = error.message
    if error.reason == "refused":
        return InvalidRequest(f"the model's chat template refuses them: {said}", "messages")
    if error.reason in ("syntax", "forbidden"):
        what = "cannot be read" if error.reason == "syntax" else "does what a template may not"
        return InvalidRequest(f"has a chat template that {what}: {said}; mend {TEMPLATE_FILE}", "model")
    if error.reason in ("time", "size", "memory"):
        limit = {"time": "takes too long", "size": "makes too much text", "memory": "needs too much memory"}
        return InvalidRequest(
            f"the model's chat template {limit[error.reason]} ({said}); send fewer or shorter ones", "messages"
        )
    return InvalidRequest(f"the model's chat template cannot render them: {said}", "messages")
