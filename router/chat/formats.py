"""How one model writes thoughts and calls: found in its template, or told by the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from router.chat.harmony import HarmonyParser
from router.chat.lark import Marks, harmony_final
from router.chat.parser import THOUGHTS, TOOL_FORMATS, Parser
from router.chat.templates import ChatTemplate
from router.text import ModelText
from understudy.errors import InvalidRequest
from workers.engine.contract import Thought

HARMONY = "harmony"
MARKS = ("[ARGS]", "[CALL_ID]", "```json")  # in which the calls of one family differ


@dataclass(frozen=True)
class ChatFormats:
    """`tools` is hermes, llama3, mistral, deepseek, harmony or empty; `reasoning` is think, mistral, harmony or empty.

    `switch` and `effort`: the template knows a variable that turns thought on and off, or one for how much. `marks`:
    those of MARKS that the template writes.
    """

    tools: str = ""
    reasoning: str = ""
    switch: bool = False
    effort: bool = False
    marks: frozenset[str] = frozenset()

    @classmethod
    def detect(cls, template: ChatTemplate) -> ChatFormats:
        """From the markers that the template writes."""
        source = "\n".join(template.named.values())
        switch = "enable_thinking" in source or "thinking" in _variables(source)
        effort = "reasoning_effort" in source
        marks = frozenset(m for m in MARKS if m in source)
        if "<|channel|>" in source and "<|message|>" in source:
            return cls(HARMONY, HARMONY, switch, effort, marks)
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
        return cls(tools, reasoning or ("think" if switch else ""), switch, effort, marks)

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

    def thought(self, text: ModelText, prompt: str, may_begin: bool) -> Thought | None:
        """What may stand before a format in an answer to this prompt, of which the end is enough; None for nothing.

        `may_begin`: the model may think though the prompt has not begun it. Raises InvalidRequest where the answer
        begins within a thought whose end has no token of its own.
        """
        if self.reasoning == HARMONY:
            return Thought(grammar=harmony_final(Marks(text), self.opened(prompt)))
        if not self.reasoning:
            return None
        begun, closed = self.opened(prompt), prompt.rstrip().endswith(self.closer)
        open, close = (text.tokenizer.token_to_id(marker) for marker in THOUGHTS[self.reasoning])
        if close is None and begun:
            raise InvalidRequest(
                f"goes not with a thought, which the prompt begins: this model's tokenizer has no single token for "
                f"{self.closer}; leave one out",
                "format",
            )
        if close is None or not (begun or (may_begin and not closed and open is not None)):
            return None
        return Thought(close, begun, -1 if begun or open is None else open)

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
