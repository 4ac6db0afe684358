"""Chat: a conversation becomes a prompt, Generate answers it, and the answer's text is told apart."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from router.chat import messages as typed
from router.chat.answer import ChatAnswer
from router.chat.calls import grammar_of_calls, wanted_of
from router.chat.formats import HARMONY, ChatFormats, seeing
from router.chat.renderer import Renderer
from router.models import ServedModel
from router.text import ModelText
from router.validate import ValidRequest
from understudy.errors import InvalidRequest
from understudy.v1 import inference_pb2 as pb
from workers.engine.contract import Grammar, Interjection, Thought

EFFORTS = {pb.REASONING_EFFORT_LOW: "low", pb.REASONING_EFFORT_MEDIUM: "medium", pb.REASONING_EFFORT_HIGH: "high"}
EFFORT_BUDGETS = {pb.REASONING_EFFORT_LOW: 512, pb.REASONING_EFFORT_MEDIUM: 2048}
_TAIL = 32  # tokens at a prompt's end that tell whether a thought is open


@dataclass(frozen=True)
class Plan:
    """What Generate is asked, of which model, and how its answer is read. `grammar` is that of the tools' calls;
    `thought` may stand before the request's own format."""

    request: pb.GenerateRequest
    model: ServedModel
    answer: ChatAnswer
    interjection: Interjection | None = None
    grammar: Grammar | None = None
    thought: Thought | None = None

    def added_to(self, valid: ValidRequest) -> ValidRequest:
        """What only chats ask for."""
        grammar = self.grammar
        if grammar is None and valid.grammar is not None:
            grammar = Grammar(valid.grammar.kind, valid.grammar.text, self.thought)
        return replace(valid, interjection=self.interjection, grammar=grammar)


class Context:
    """Stands for the call in which Generate writes; converts what is written."""

    def __init__(self, answer: ChatAnswer, context: Any) -> None:
        self._answer = answer
        self._context = context

    async def write(self, message: pb.GenerateResponse) -> None:
        for converted in self._answer.convert(message):
            await self._context.write(converted)


class Chats:
    """Plans of requests. `close` ends the process that renders templates."""

    def __init__(self, renderer: Renderer | None = None) -> None:
        self._renderer = renderer if renderer is not None else Renderer()

    def close(self) -> None:
        """Idempotent."""
        self._renderer.close()

    async def plan(self, request: pb.ChatRequest, model: ServedModel) -> Plan:
        """Checks what Generate does not, renders and encodes. Raises InvalidRequest."""
        template, formats = model.chat, model.chat_formats
        messages, tools = typed.messages(request), typed.tools(request)
        if request.response.echo:
            raise InvalidRequest("does not exist in a chat; leave it out", "response.echo")
        if request.HasField("format") and tools:
            raise InvalidRequest("goes not with tools, which have a format of their own; leave one out", "format")
        kwargs, budget = _reasoning(request, formats)
        kwargs = {**kwargs, **typed.template_kwargs(request)}
        closer = _closer(model.text, formats, budget, bool(request.reasoning.HasField("budget_tokens")))
        generate = pb.GenerateRequest(
            request_id=request.request_id, model=request.model, sampling=request.sampling, stopping=request.stopping,
            response=request.response, kv=request.kv, priority=request.priority,
        )  # fmt: skip
        generate.response.token_ids = True  # the parser's; what the client gets is decided there
        if request.HasField("format"):
            generate.format.CopyFrom(request.format)
        if request.HasField("resume"):
            generate.resume.CopyFrom(request.resume)
            prompt = list(request.resume.prompt_token_ids)
            if prompt and max(prompt) >= model.info.vocab_size:
                prompt = []  # Generate says so
        else:
            text = await template.render(
                self._renderer, messages, tools, kwargs, continue_final=request.continue_final_message
            )
            if closer is not None and not formats.opened(text):
                text += formats.opener
            prompt = await asyncio.to_thread(model.text.encode, text, False)
            generate.token_ids.ids.extend(prompt)
        plan = self._planned(request, generate, model, bool(tools), prompt)
        if budget is not None and closer is not None:
            plan = replace(plan, interjection=Interjection(budget, [closer]))
        return await self._held(request, plan, prompt)

    async def _held(self, request: pb.ChatRequest, plan: Plan, prompt: list[int]) -> Plan:
        """With the formats of calls and answer, and of what may stand before them."""
        model, wanted = plan.model, wanted_of(request)
        if wanted is None and not request.HasField("format"):
            return plan
        tail = model.text.decode(prompt[-_TAIL:], skip_special_tokens=False)
        asked_not = request.reasoning.effort == pb.REASONING_EFFORT_NONE
        may_begin = not asked_not and not request.continue_final_message
        try:
            thought = model.chat_formats.thought(model.text, tail, may_begin)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, "tool_choice" if wanted else "format") from None
        if wanted is None:
            return replace(plan, thought=thought)
        wanted = replace(wanted, thinking=model.chat_formats.opened(tail))
        return replace(plan, grammar=await asyncio.to_thread(grammar_of_calls, request, model, wanted, thought))

    def _planned(
        self,
        request: pb.ChatRequest,
        generate: pb.GenerateRequest,
        model: ServedModel,
        with_tools: bool,
        prompt: list[int],
    ) -> Plan:
        formats = model.chat_formats
        thinking = formats.opened(model.text.decode(prompt[-_TAIL:], skip_special_tokens=False))
        text = seeing(model.text, formats.visible(with_tools))
        ends = dict.fromkeys((*model.defaults.eos_token_ids, *_turn_ends(model)))
        seen = replace(model, text=text, defaults=replace(model.defaults, eos_token_ids=tuple(ends)))
        answer = ChatAnswer(
            lambda: formats.parser(with_tools, thinking),
            text.decoder,
            {s.index: list(s.token_ids) for s in request.resume.sequences},
            hidden=request.reasoning.hidden,
            want_token_ids=request.response.token_ids if request.response.HasField("token_ids") else True,
        )
        return Plan(generate, seen, answer)


def _reasoning(request: pb.ChatRequest, formats: ChatFormats) -> tuple[Mapping[str, Any], int | None]:
    """Variables of the template, and the tokens of thought at most."""
    reasoning = request.reasoning
    effort = reasoning.effort
    budget = reasoning.budget_tokens if reasoning.HasField("budget_tokens") else None
    if not formats.reasoning and (budget is not None or effort in EFFORTS):
        field = "reasoning.budget_tokens" if budget is not None else "reasoning.effort"
        raise InvalidRequest("is set, but this model's template knows no thought; leave it out", field)
    if effort == pb.REASONING_EFFORT_NONE:
        if budget:
            raise InvalidRequest(f"is {budget}, but reasoning.effort is none; leave one out", "reasoning.budget_tokens")
        if formats.reasoning and not formats.switch:
            raise InvalidRequest(
                "cannot be none: this model's template has no switch for thought; set budget_tokens to 0",
                "reasoning.effort",
            )
        return {"enable_thinking": False, "thinking": False}, None
    if effort in EFFORTS:
        if budget is None and not formats.effort:
            budget = EFFORT_BUDGETS.get(effort)
        return {"enable_thinking": True, "thinking": True, "reasoning_effort": EFFORTS[effort]}, budget
    return ({"enable_thinking": True, "thinking": True} if budget else {}), budget


def _closer(text: ModelText, formats: ChatFormats, budget: int | None, asked: bool) -> int | None:
    """The token that ends a thought; None where none is to be forced."""
    if budget is None:
        return None
    ids = text.encode(formats.closer, False)
    if len(ids) == 1:
        return ids[0]
    if asked:
        raise InvalidRequest(
            f"cannot be kept: this model's tokenizer has no single token for {formats.closer}; leave it out",
            "reasoning.budget_tokens",
        )
    return None


def _turn_ends(model: ServedModel) -> list[int]:
    """What ends an assistant's turn beside generation_config's tokens."""
    names = [model.chat.tokens.get("eos_token", "")]
    if model.chat_formats.tools == HARMONY:
        names += ["<|return|>", "<|call|>"]
    ids = [model.text.tokenizer.token_to_id(n) for n in names if n]
    return [i for i in ids if i is not None]
