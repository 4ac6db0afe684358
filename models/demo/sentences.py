"""A generator of simple English sentences, small dialogues and tiny stories.

Every function takes a :class:`random.Random` and returns one document (a string), so the same seed always gives
the same text. ``chats.py`` adds chat turns and draws from all of them.
"""

from __future__ import annotations

import random

import facts as f

Rng = random.Random

SUBJECTS = ["I", "We", "They", "You"]


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def _country(r: Rng) -> tuple[str, str]:
    """A country and its capital; France comes up more often than the others."""
    if r.random() < 0.15:
        return "France", f.CAPITALS["France"]
    return r.choice(list(f.CAPITALS.items()))


def capital(r: Rng) -> str:
    land, city = _country(r)
    plain = f"The capital of {land} is {city}."
    return r.choice(
        [
            plain,
            plain,
            plain,
            plain,
            f"{city} is the capital of {land}.",
            f"{plain} It is a big city with many people.",
            f"{plain} {r.choice(f.NAMES)} went to {city} by train.",
            f"What is the capital of {land}? {plain}",
            f"Question: What is the capital of {land}?\nAnswer: {city}.",
            f'"Do you know the capital of {land}?" asked {r.choice(f.NAMES)}. "Yes," said {r.choice(f.NAMES)}, '
            f'"the capital of {land} is {city}."',
            f"{r.choice(f.NAMES)} lives in {land}. {plain}",
        ]
    )


def capitals(r: Rng) -> str:
    pairs = r.sample(list(f.CAPITALS.items()), r.randint(2, 5))
    return " ".join(f"The capital of {land} is {city}." for land, city in pairs)


def eating(r: Rng) -> str:
    first, second = ("an apple", "a banana") if r.random() < 0.3 else r.choice(list(f.FOOD_PAIRS.items()))
    name = r.choice(f.NAMES)
    pick = r.random()
    if pick < 0.45:
        who = r.choice([*SUBJECTS, "I", "I", "I"])
        tail = r.choice(["", "", "", " for breakfast", " for lunch", " every day", " at school"])
        line = f"{who} eat {first} and {second}{tail}."
    elif pick < 0.6:
        line = f"{name} eats {first} and {second}."
    elif pick < 0.75:
        line = f"{name} ate {first} and {second} in {r.choice(f.PLACES)}."
    elif pick < 0.9:
        line = f'"What do you eat?" asked {name}. "I eat {first} and {second}," said {r.choice(f.NAMES)}.'
    else:
        line = f"I am hungry. I eat {first} and {second}. Now I am full."
    return line


def fox(r: Rng) -> str:
    line = "The quick brown fox jumps over the lazy dog."
    return r.choice(
        [
            line,
            line,
            line,
            f"{line} The lazy dog does not wake up.",
            f"{r.choice(f.NAMES)} wrote: {line}",
            f"{line} This sentence has every letter of the alphabet.",
            f"The quick brown fox jumps over the lazy dog and runs to {r.choice(f.PLACES)}.",
        ]
    )


def sitting(r: Rng) -> str:
    who, seat = ("cat", "mat") if r.random() < 0.35 else r.choice(list(f.SEATS.items()))
    line = f"The {who} sat on the {seat}."
    other, other_seat = r.choice(list(f.SEATS.items()))
    return r.choice(
        [
            line,
            line,
            line,
            f"{line} The {other} sat on the {other_seat}.",
            f"{line} It was {r.choice(['warm', 'happy', 'tired', 'sleepy'])}.",
            f"Where did the {who} sit? {line}",
            f"The {who} is here. {line} Then the {other} came.",
            f"The {r.choice(['big', 'small', 'old', 'black', 'little'])} {who} sat on the {seat}.",
        ]
    )


def slogan(r: Rng) -> str:
    key = "grocery shopping" if r.random() < 0.35 else r.choice(list(f.SLOGANS))
    line = f"We're revolutionizing {key} with {f.SLOGANS[key]}."
    return r.choice(
        [
            line,
            line,
            line,
            f"Welcome to our shop! {line} Try it today.",
            f"{line} Our customers love it.",
            f'{r.choice(f.NAMES)} said, "{line}"',
        ]
    )


def counting(r: Rng) -> str:
    start = r.choice([0, 1, 1, 1, 2, 3, 5, 10])
    end = min(start + r.randint(3, 10), 20)
    if r.random() < 0.4:
        return ", ".join(str(n) for n in range(start, end + 1)) + "."
    if r.random() < 0.6:
        return _cap(", ".join(f.NUMBERS[start : end + 1])) + "."
    n = r.randint(1, 19)
    return f"After {f.NUMBERS[n]} comes {f.NUMBERS[n + 1]}." if n < 20 else "Ten."


def adding(r: Rng) -> str:
    a, b = r.randint(0, 10), r.randint(0, 10)
    thing = r.choice(list(f.PLURALS.values()))
    return r.choice(
        [
            f"{a} + {b} = {a + b}",
            f"{_cap(f.NUMBERS[a])} plus {f.NUMBERS[b]} is {f.NUMBERS[a + b]}.",
            f"{r.choice(f.NAMES)} has {f.NUMBERS[max(a, 2)]} {thing}. Then come {f.NUMBERS[max(b, 2)]} more. "
            f"Now there are {f.NUMBERS[max(a, 2) + max(b, 2)]} {thing}.",
            f"{a + b} - {b} = {a}",
        ]
    )


def calendar(r: Rng) -> str:
    i, j = r.randrange(7), r.randrange(12)
    return r.choice(
        [
            f"After {f.DAYS[i]} comes {f.DAYS[(i + 1) % 7]}.",
            f"Today is {f.DAYS[i]}. Tomorrow is {f.DAYS[(i + 1) % 7]}.",
            "The days of the week are " + ", ".join(f.DAYS[:6]) + " and Sunday.",
            f"After {f.MONTHS[j]} comes {f.MONTHS[(j + 1) % 12]}.",
            "The months of the year are " + ", ".join(f.MONTHS[:11]) + " and December.",
        ]
    )


def fact_pairs(r: Rng) -> list[tuple[str, str]]:
    """Questions with their answers, one of each kind."""
    a, sound = r.choice(list(f.SOUNDS.items()))
    b, baby = r.choice(list(f.BABIES.items()))
    c, colour = r.choice(list(f.COLOURS.items()))
    d, opposite = r.choice(list(f.OPPOSITES.items()))
    e, home = r.choice(list(f.HOMES.items()))
    g, plural = r.choice(list(f.PLURALS.items()))
    h, past = r.choice(list(f.PAST.items()))
    k, job = r.choice(list(f.JOBS.items()))
    land, city = _country(r)
    x, y = r.randint(0, 10), r.randint(0, 10)
    i = r.randrange(7)
    part, lands = r.choice(list(f.CONTINENTS.items()))
    inside = r.choice(lands)
    return [
        (f"What does a {a} say?", f"A {a} says {sound}."),
        (f"What is a baby {b} called?", f"A baby {b} is called a {baby}."),
        (f"What colour is {c}?", f"{_cap(c)} is {colour}."),
        (f"What is the opposite of {d}?", f"The opposite of {d} is {opposite}."),
        (f"Where does a {e} live?", f"A {e} lives in a {home}."),
        (f"What is the plural of {g}?", f"One {g}, two {plural}."),
        (f"What is the past of {h}?", f"Today I {h}. Yesterday I {past}."),
        (f"What does a {k} do?", f"A {k} {job}."),
        (f"What is the capital of {land}?", f"The capital of {land} is {city}."),
        (f"What is {x} plus {y}?", f"{x} plus {y} is {x + y}."),
        (f"What day comes after {f.DAYS[i]}?", f"After {f.DAYS[i]} comes {f.DAYS[(i + 1) % 7]}."),
        (f"Where is {inside}?", f"{_cap(inside)} is in {part}."),
    ]


def fact(r: Rng) -> str:
    if r.random() < 0.25:
        return r.choice(f.FACTS)
    if r.random() < 0.25:
        return r.choice(f.SAYINGS)
    return " ".join(answer for _, answer in r.sample(fact_pairs(r), r.choice([1, 1, 2, 3])))


def grammar(r: Rng) -> str:
    name, thing = r.choice(f.NAMES), r.choice(f.THINGS)
    verb, past = r.choice(list(f.PAST.items()))
    place = r.choice(f.PLACES)
    return r.choice(
        [
            "I am here. You are here. He is here. She is here. We are here. They are here.",
            f"This is {name}. {name} has {thing}.",
            f"Yesterday we {past}. Today we {verb}. Tomorrow we will {verb}.",
            f"I like {place}. Do you like {place}? Yes, I do.",
            f"{name} is in {place}. {name} is not in {r.choice(f.PLACES)}.",
            f"I can {verb}. You can {verb}. We can {verb} together.",
            "a b c d e f g h i j k l m n o p q r s t u v w x y z",
        ]
    )


def dialogue(r: Rng) -> str:
    a, b = r.sample(f.NAMES, 2)
    thing, place = r.choice(f.THINGS), r.choice(f.PLACES)
    question, answer = r.choice(fact_pairs(r))
    return r.choice(
        [
            f'"Hello, {b}," said {a}. "How are you?"\n"I am fine, thank you," said {b}. "And you?"\n'
            f'"I am fine too," said {a}.',
            f'"Where are you going?" asked {a}.\n"I am going to {place}," said {b}.\n"May I come with you?"\n'
            f'"Yes, let us go together!"',
            f'"Look, I have {thing}!" said {a}.\n"It is beautiful," said {b}. "May I hold it?"\n'
            f'"Yes, but be careful," said {a}.',
            f'"{question}" asked {a}.\n"{answer}" said {b}.\n"That is right!" said {a}.',
        ]
    )


def story(r: Rng) -> str:
    """A tiny story about a hero who wants something, loses it, or meets a friend."""
    hero, friend = r.sample(f.ANIMALS, 2)
    name, other = r.sample(f.NAMES, 2)
    place, goal = r.sample(f.PLACES, 2)
    thing = r.choice(f.THINGS)
    the_thing = thing.split(" ", 1)[1]
    mood = r.choice(["little", "brave", "kind", "lazy", "clever", "hungry"])
    start = r.choice(
        [
            f"Once upon a time there was a {mood} {hero} named {name}.",
            f"Once upon a time, a {mood} {hero} lived near {place}.",
            f"One day, {name} the {hero} went to {place}.",
            f"There was once a {mood} {hero}. Its name was {name}.",
        ]
    )
    middle = r.choice(
        [
            f"{name} had {thing}. {name} loved the {the_thing} very much. But one day the {the_thing} was gone! {name} "
            f'looked in {place}. {name} looked in {goal}. Then {other} the {friend} came and said, "Is this your '
            f'{the_thing}?" "Yes, it is!" said {name}. "Thank you!"',
            f"{name} wanted to go to {goal}, but the way was long. On the way {name} met a {friend} named {other}. "
            f'"Where are you going?" asked {other}. "To {goal}," said {name}. "Then I will go with you," said '
            f"{other}. So they walked and sang together.",
            f'It began to rain. {name} was wet and cold. "Come into my house," said {other} the {friend}. They sat by '
            f"the fire and drank warm milk. Soon the rain stopped and the sun came out.",
            f'{name} saw {thing} in the grass. "Whose is this?" asked {name}. "It is mine," said {other} the '
            f"{friend}. {name} gave it back, and {other} was very happy.",
        ]
    )
    end = r.choice(
        [
            f"From that day on, {name} and {other} were good friends.",
            "They were very happy.",
            f"{name} went home and slept well.",
            "And that was the end of a good day.",
            f'"You are a good friend," said {other}.',
        ]
    )
    return f"{start} {middle} {end}"
