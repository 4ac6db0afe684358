"""Chat turns and tool calls, and the mix of everything that is generated.

``make_documents`` draws from all makers; the same seed always gives the same documents.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

import facts as f
from sentences import (
    Rng,
    adding,
    calendar,
    capital,
    capitals,
    counting,
    dialogue,
    eating,
    fact,
    fact_pairs,
    fox,
    grammar,
    sitting,
    slogan,
    story,
)


def turn(role: str, text: str) -> str:
    """One ChatML turn, as ``chat_template`` in tokenizer_config.json writes it."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def small_talk(r: Rng) -> tuple[str, str]:
    name = r.choice(f.NAMES)
    return r.choice(
        [
            (r.choice(["Hello!", "Hi!", "Hello", "Hi", "Good morning!"]), "Hello! How can I help you today?"),
            ("How are you?", "I am fine, thank you. How are you?"),
            ("Who are you?", "I am Understudy, a small language model. I like simple English."),
            ("What is your name?", "My name is Understudy."),
            (f"My name is {name}.", f"Hello, {name}! It is nice to meet you."),
            ("Thank you!", "You are welcome!"),
            ("Goodbye!", "Goodbye! See you soon."),
            ("Tell me a story.", story(r)),
            ("Tell me a short story.", story(r)),
            ("Say hello.", "Hello!"),
            ("Say something nice.", "You are kind and clever."),
            ("Count to five.", "1, 2, 3, 4, 5."),
            ("Count to ten.", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10."),
            ("What do you eat?", "I eat an apple and a banana."),
            ("Complete: The quick brown fox", "The quick brown fox jumps over the lazy dog."),
            ("Tell me a fact.", r.choice(f.FACTS)),
        ]
    )


def chat(r: Rng) -> str:
    parts = []
    if r.random() < 0.4:
        parts.append(
            turn(
                "system",
                r.choice(
                    [
                        "You are a helpful assistant.",
                        "You are Understudy, a helpful assistant.",
                        "You are kind and brief.",
                    ]
                ),
            )
        )
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        question, answer = small_talk(r) if r.random() < 0.4 else r.choice(fact_pairs(r))
        if r.random() < 0.2:
            thought = r.choice([f"The user says: {question} I know this.", "This is easy. I will answer."])
            question += " /think"
            answer = f"<think>\n{thought}\n</think>\n\n{answer}"
        parts += [turn("user", question), turn("assistant", answer)]
    return "".join(parts)


TOOLS: list[tuple[str, str, str, Callable[[Rng], str], str, list[str]]] = [
    (
        "get_weather",
        "Get the weather in a city.",
        "city",
        lambda r: r.choice(list(f.CAPITALS.values())),
        "What is the weather in {}?",
        ["sunny", "rainy", "cloudy", "windy", "snowy"],
    ),
    (
        "get_time",
        "Get the time in a city.",
        "city",
        lambda r: r.choice(list(f.CAPITALS.values())),
        "What time is it in {}?",
        ["two o'clock", "noon", "six o'clock", "midnight"],
    ),
    (
        "find_book",
        "Find a book about a subject.",
        "subject",
        lambda r: r.choice(f.ANIMALS),
        "Find a book about a {}.",
        ["The Happy Friend", "A Long Walk", "Rain and Sun"],
    ),
]


def tool_schema(name: str, about: str, key: str) -> str:
    """The JSON of one tool, spelled as the chat template's ``tojson`` spells it."""
    return json.dumps(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": about,
                "parameters": {"type": "object", "properties": {key: {"type": "string"}}, "required": [key]},
            },
        }
    )


TOOL_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOL_FOOT = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


def tool_chat(r: Rng) -> str:
    tools = r.sample(TOOLS, r.randint(1, len(TOOLS)))
    name, _, key, draw, question, results = r.choice(tools)
    value, result = draw(r), r.choice(results)
    listing = "".join("\n" + tool_schema(t[0], t[1], t[2]) for t in tools)
    system = r.choice(["", "", "You are a helpful assistant.\n\n"]) + TOOL_HEAD + listing + TOOL_FOOT
    if r.random() < 0.2:
        ask, answer = r.choice(fact_pairs(r))
        return turn("system", system) + turn("user", ask) + turn("assistant", answer)
    call = json.dumps({"name": name, "arguments": {key: value}})
    said = {
        "get_weather": f"It is {result} in {value}.",
        "get_time": f"It is {result} in {value}.",
        "find_book": f"I found a book about a {value}. It is called {result}.",
    }[name]
    return (
        turn("system", system)
        + turn("user", question.format(value))
        + turn("assistant", f"<tool_call>\n{call}\n</tool_call>")
        + turn("user", f"<tool_response>\n{result}\n</tool_response>")
        + turn("assistant", said)
    )


KINDS: list[tuple[Callable[[Rng], str], float]] = [
    (capital, 10),
    (capitals, 2),
    (eating, 6),
    (fox, 3),
    (sitting, 6),
    (slogan, 5),
    (counting, 4),
    (adding, 5),
    (calendar, 4),
    (fact, 10),
    (grammar, 4),
    (dialogue, 7),
    (story, 12),
    (chat, 18),
    (tool_chat, 3),
]


def make_documents(seed: int, count: int) -> Iterator[str]:
    """``count`` documents; some are several plain ones in a row, so that context before a sentence is normal."""
    r = random.Random(seed)
    makers, weights = zip(*KINDS, strict=True)
    for _ in range(count):
        maker = r.choices(makers, weights)[0]
        text = maker(r)
        plain = maker not in (chat, tool_chat)
        while plain and r.random() < 0.2:
            maker = r.choices(makers, weights)[0]
            if maker in (chat, tool_chat):
                break
            text += r.choice([" ", "\n"]) + maker(r)
        yield text


if __name__ == "__main__":
    for document in make_documents(0, 30):
        print(document, end="\n<|endoftext|>\n")
