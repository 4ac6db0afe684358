"""How one model writes thoughts and calls: found in its template, or told by the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from router.chat.harmony import HarmonyParser
from router.chat.parser import THOUGHTS, TOOL_FORMATS, Parser
from router.chat.templates import ChatTemplate
from router.text import ModelText

HARMONY = "harmony"


@dataclass(frozen=True)
class ChatFormats:
    """`tools` is hermes, llama3, mistral, deepseek, harmony or empty; `reasoning` is think, mistral, harmony or empty.

    `switch` and `effort`: the template knows a variable that turns thought on and off, or one for how much.
    """

    tools: str = ""
    reasoning: str = ""
    switch: bool = False
    effort: bool = False

    @classmethod
    def detect(cls, template: ChatTemplate) -> ChatFormats:
        """From the markers that the template writes."""
        source = "\n".join(template.named.values())
        switch = "enable_thinking" in source or "thinking" in _variables(source)
        effort = "reasoning_effort" in source
        if "<|channel|>" in source and "<|message|>" in source:
            return cls(HARMONY, HARMONY, switch, effort)
        tools = ""
        if "<｜tool▁call▁begin｜>" in source:
            tools = "deepseek"
        elif "[TOOL_CALLS]" in source:
            tools = "mistral"
        elif "<tool_call>" in source and "<function=" not in source and "<arg_key>" not in source:
            tools = "hermes"
        elif "<|python_tag|>" in source or '"parameters": dictionary of argument' in source:
            tools = "llama3"
        reasoning = "think" if "</think>" in source else "mistral" if "[/THINK]" in source else ""
        return cls(tools, reasoning or ("think" if switch else ""), switch, effort)

    @property
    def opener(self) -> str:
        """What begins a thought at the start of an answer."""
        if self.reasoning == HARMONY:
            return "<|channel|>analysis<|message|>"
        return THOUGHTS[self.reasoning][0] + "\n" if self.reasoning else ""

    @property
    def closer(self) -> str:
        """The marker that ends a thought."""
        return "<|end|>" if self.reasoning == HARMONY else THOUGHTS[self.reasoning][1] if self.reasoning else ""

    def opened(self, prompt: str) -> bool:
        """Whether an answer to this prompt begins within a thought."""
        return bool(self.reasoning) and prompt.rstrip().endswith(self.opener.rstrip())

    def parser(self, with_tools: bool, thinking: bool) -> Parser:
        if HARMONY in (self.tools, self.reasoning):
            return HarmonyParser(thinking)
        return Parser(self.tools if with_tools else "", self.reasoning, thinking)

    def visible(self, with_tools: bool) -> tuple[str, ...]:
        """Special tokens that a parser must see."""
        if HARMONY in (self.tools, self.reasoning):
            return HarmonyParser.MARKERS
        tools = TOOL_FORMATS[self.tools] if with_tools and self.tools else None
        found = (*tools.markers, *tools.glue) if tools is not None else ()
        if self.tools == "mistral" and with_tools:
            found += ("[ARGS]", "[CALL_ID]")
        if self.tools == "deepseek" and with_tools:
            found += ("<｜tool▁sep｜>",)
        return (*found, *THOUGHTS[self.reasoning]) if self.reasoning else found


def _variables(source: str) -> set[str]:
    """Words that stand in conditions, roughly: `{% if thinking %}`."""
    return {word for line in source.split("{%")[1:] for word in line.split("%}")[0].split() if word.isidentifier()}


def seeing(text: ModelText, tokens: tuple[str, ...]) -> ModelText:
    """The same text side, whose decoders show these special tokens."""
    ids = [text.tokenizer.token_to_id(t) for t in tokens]
    return text.showing(tuple(i for i in ids if i is not None))
