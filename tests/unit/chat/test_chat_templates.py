"""Templates through the real process: goldens of others, real templates, and templates that mean harm."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from router.chat.renderer import Limits, Renderer, TemplateFailed
from router.chat.templates import ChatTemplate
from understudy.errors import CheckpointError, InvalidRequest, Unavailable

NOW = datetime(2025, 7, 10, 12)
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
async def renderer() -> AsyncIterator[Renderer]:
    made = Renderer(Limits(seconds=2.0))
    yield made
    made.close()


def _cases(oracles: Path, name: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((oracles / "goldens/chat-templates" / name).read_text())["cases"]
    return [c for c in cases if c["jinja2_agrees"]]


@pytest.mark.oracles
async def test_goldens_of_huggingface(oracles: Path, renderer: Renderer) -> None:
    cases = _cases(oracles, "huggingface.js-e2e.json")
    assert len(cases) == 52
    for case in cases:
        assert await renderer.render(case["chat_template"], case["data"], NOW) == case["target"], case["name"]
    assert renderer.started == 1


@pytest.mark.oracles
async def test_goldens_of_llama_cpp(oracles: Path, renderer: Renderer) -> None:
    cases = _cases(oracles, "llama.cpp-test-chat-template.json")
    assert len(cases) == 27
    for case in cases:
        assert await renderer.render(case["chat_template"], case["data"], NOW) == case["target"], case["name"]


@pytest.mark.oracles
async def test_real_templates_render(oracles: Path, renderer: Renderer) -> None:
    made = 0
    for path in sorted((oracles / "templates/llama.cpp").glob("*.jinja")):
        template = ChatTemplate({"default": path.read_text()}, {"bos_token": "<s>", "eos_token": "</s>"})
        tools = [TOOL] if "tool_use" in path.name else []  # transformers, too, takes those with tools only
        more = {"functions": "[]"} if "firefunction" in path.name else {}
        if "command-r-plus" in path.name:
            tools = [{"name": "weather", "description": "", "parameter_definitions": {}}]
        text = await template.render(renderer, HELLO, tools, {"datetime": "today"} | more, now=NOW)
        assert "Hello" in text, path.name
        made += 1
    assert made >= 60


@pytest.mark.oracles
@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen3-0.6B",
        "meta-llama-Llama-3.1-8B-Instruct",
        "mistralai-Mistral-Nemo-Instruct-2407",
        "deepseek-ai-DeepSeek-V3.1",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
        "openai-gpt-oss-120b",
        "mistralai-Ministral-3-14B-Reasoning-2512",
    ],
)
async def test_a_tool_call_is_shown(oracles: Path, renderer: Renderer, name: str) -> None:
    """Whatever shape the template wants calls to have."""
    source = (oracles / "templates/llama.cpp" / f"{name}.jinja").read_text()
    template = ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "sunny, says the tool", "tool_call_id": "abcdefghi", "name": "weather"},
    ]
    text = await template.render(renderer, messages, [TOOL], now=NOW)
    assert "Paris" in text
    assert "sunny, says the tool" in text


async def _fails(renderer: Renderer, template: str, **variables: Any) -> str:
    with pytest.raises(TemplateFailed) as caught:
        await renderer.render(template, variables)
    return caught.value.reason


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "forbidden"),
        ("{{ messages.append(1) }}", "forbidden"),
        ("{{ cycler.__init__.__globals__ }}", "forbidden"),
        ("{% for i in range(1000000000) %}{% endfor %}", "failed"),
        ("{{ 'a' * 100000000000 }}", "memory"),
        ("{{ raise_exception('no') }}", "refused"),
        ("{{ nothing.at.all }}", "failed"),
        ("{% if %}", "syntax"),
        ("{% include 'x' %}", "failed"),
    ],
)
async def test_harm_is_refused_and_the_next_one_renders(renderer: Renderer, template: str, reason: str) -> None:
    assert await _fails(renderer, template, messages=[]) == reason
    assert await renderer.render("{{ messages[0] }}", {"messages": ["fine"]}) == "fine"


async def test_a_loop_without_end_is_killed() -> None:
    renderer = Renderer(Limits(seconds=0.2))
    ever = "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}"
    assert await _fails(renderer, ever) == "time"
    # One operation of C, which no signal handler of Python's would interrupt.
    assert await _fails(renderer, "{{ (7 ** 99999999) % 10 }}") == "time"
    assert await renderer.render("next", {}) == "next"
    assert renderer.started == 3
    renderer.close()


async def test_output_and_memory_are_bounded() -> None:
    renderer = Renderer(Limits(chars=1000, memory_bytes=256 << 20))
    assert await _fails(renderer, "{% for i in range(9999) %}{{ i }}{% endfor %}") == "size"
    grow = "{% set n = namespace(x='abc') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
    assert await _fails(renderer, grow) == "memory"
    assert await renderer.render("next", {}) == "next"
    renderer.close()
    with pytest.raises(Unavailable, match="stopping"):
        await renderer.render("next", {})


async def test_words_of_transformers(renderer: Renderer) -> None:
    template = (
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%d %b %Y') }}"
    )
    assert await renderer.render(template, {"messages": [1, {"a": "é<"}]}, NOW) == '{"a": "é<"}10 Jul 2025'
    assert await renderer.render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=True) }}", {}) == (
        '{\n "a": 2,\n "b": 1\n}'
    )


async def test_which_template(renderer: Renderer) -> None:
    config = {"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]}
    files = {"tokenizer_config.json": json.dumps(config | {"bos_token": {"content": "<s>"}}).encode()}
    several = ChatTemplate.from_files(files)
    assert await several.render(renderer, HELLO) == "D"
    assert await several.render(renderer, HELLO, [TOOL]) == "T"
    beside = ChatTemplate.from_files(files | {"chat_template.jinja": b"{{ bos_token }}J"})
    assert await beside.render(renderer, HELLO) == "<s>J"
    more = ChatTemplate.from_files({"additional_chat_templates/tool_use.jinja": b"A"})
    assert more.source(True) == "A"
    with pytest.raises(InvalidRequest, match=r"chat_template\.jinja beside the checkpoint"):
        ChatTemplate.from_files({}).source(False)
    with pytest.raises(CheckpointError, match="neither text nor a list"):
        ChatTemplate.from_files({"tokenizer_config.json": b'{"chat_template": 3}'})


async def test_refusals_name_the_way_out(renderer: Renderer) -> None:
    for source, said in (
        ("{{ raise_exception('roles must alternate') }}", "messages: the model's chat template refuses them: roles"),
        ("{% if %}", "model: has a chat template that cannot be read: line 1"),
        ("{{ messages.append(1) }}", "model: has a chat template that does what a template may not"),
        ("{{ missing.name }}", "messages: the model's chat template cannot render them"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await ChatTemplate({"default": source}).render(renderer, HELLO)
        assert str(caught.value).startswith(said)


async def test_the_last_message_goes_on(renderer: Renderer) -> None:
    template = ChatTemplate({"default": "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"})
    messages = [*HELLO, {"role": "assistant", "content": "I am "}]
    assert await template.render(renderer, messages, continue_final=True) == "[Hello][I am"
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        await ChatTemplate({"default": "x"}).render(renderer, messages, continue_final=True)
