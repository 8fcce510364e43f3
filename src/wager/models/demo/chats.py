"""Generated conversations in the demo's chat format: who it is, small skills, tool calls, JSON answers, questions about Python.

They teach the format, the end of a turn and the form of a tool call; a model of this size learns little more from them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

from wager.models.demo.tokenizer import render


def _words(text: str) -> list[str]:
    return text.split()


WORDS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
COLORS = _words("red green blue yellow black white orange purple brown grey")
ANIMALS = _words("cat dog horse cow sheep goat bird fish mouse rabbit fox wolf bear lion tiger")
CITIES = _words("Paris London Berlin Rome Madrid Vienna Oslo Cairo Tokyo Delhi Lima Quito Boston Denver Zurich Geneva")
NAMES = _words("Ada Alan Grace Edsger Barbara Donald John Mary Anna Peter Paul Lisa Tom Emma Noah Mia")
IDENTITY = "I am wager's demo model: a small language model that ships with the engine so that you can try it. I know a little Python."
SYSTEMS = ("You are a helpful assistant.", "Be brief.", "You are the demo model of wager.", "Answer in one sentence.")

Turn = dict[str, object]
Skill = Callable[[random.Random], tuple[str, str]]


def generated_chats(count: int, seed: int = 0) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(count):
        kind = rng.random()
        if kind < 0.25:
            yield _tool_chat(rng)
        elif kind < 0.35:
            yield _json_chat(rng)
        else:
            yield _skill_chat(rng)


def question_about(name: str, signature: str, summary: str) -> str:
    """A one-turn chat whose answer is the documentation's summary. The question's form follows from the name, so it is repeatable."""
    rng = random.Random(name)
    form = rng.choice(
        ("What does {0} do?", "What is {0}?", "Explain {0}.", "Tell me about {0}.", "How do I use {0}?", "{0}?")
    )
    answer = summary if rng.random() < 0.6 else f"{signature}: {summary}"
    return render(_system(rng) + [_user(form.format(name)), _assistant(answer)])


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def _system(rng: random.Random) -> list[Turn]:
    return [{"role": "system", "content": rng.choice(SYSTEMS)}] if rng.random() < 0.3 else []


def _skill_chat(rng: random.Random) -> str:
    turns = _system(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        question, answer = rng.choice(SKILLS)(rng)
        turns += [_user(question), _assistant(answer)]
    return render(turns)


def _count(rng: random.Random) -> tuple[str, str]:
    low, high = rng.choice((0, 1, 1, 1, 2, 3, 5)), rng.randint(6, 20)
    if rng.random() < 0.5:
        asked = f"{WORDS[low]} to {WORDS[high]}"
        return f"Count from {asked}.", ", ".join(WORDS[low : high + 1]) + "."
    return f"Count from {low} to {high}.", ", ".join(map(str, range(low, high + 1))) + "."


def _add(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(0, 20), rng.randint(0, 20)
    word, result = rng.choice((("plus", a + b), ("times", a * b), ("minus", a - b)))
    return f"What is {a} {word} {b}?", f"{a} {word} {b} is {result}."


def _repeat(rng: random.Random) -> tuple[str, str]:
    words = " ".join(
        rng.choices(COLORS + ANIMALS + CITIES + ["é", "漢字", "ñandú", "über", "🙂", "Ω"], k=rng.randint(1, 5))
    )
    return f"Repeat: {words}", words


def _listing(rng: random.Random) -> tuple[str, str]:
    title, pool = rng.choice((("colors", COLORS), ("animals", ANIMALS), ("cities", CITIES), ("names", NAMES)))
    count = rng.randint(2, 6)
    chosen = rng.sample(pool, count)
    if rng.random() < 0.5:
        return f"Name {WORDS[count]} {title}.", ", ".join(chosen) + "."
    return f"Give me a list of {count} {title}.", "\n".join(f"{i}. {item}" for i, item in enumerate(chosen, 1))


def _identity(rng: random.Random) -> tuple[str, str]:
    asked = rng.choice(
        (
            "Who are you?",
            "What are you?",
            "What model is this?",
            "Tell me about yourself.",
            "Are you a person?",
            "Your name?",
        )
    )
    return asked, IDENTITY


def _greeting(rng: random.Random) -> tuple[str, str]:
    hello = rng.choice(("Hello", "Hi", "Hey", "Good morning", "Hello there", "hi", "hello"))
    return hello + rng.choice(("", "!", ".")), rng.choice(
        ("Hello! How can I help you?", "Hi! Ask me something about Python.")
    )


def _order(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(ANIMALS + COLORS, rng.randint(3, 6))
    if rng.random() < 0.5:
        return f"Sort these words: {', '.join(words)}", ", ".join(sorted(words))
    return f"Reverse this list: {', '.join(words)}", ", ".join(reversed(words))


def _function(rng: random.Random) -> tuple[str, str]:
    name, body = rng.choice(
        (
            ("adds two numbers", "def add(a, b):\n    return a + b"),
            ("squares a number", "def square(x):\n    return x * x"),
            ("returns the larger of two values", "def larger(a, b):\n    return a if a > b else b"),
            ("reverses a string", "def reverse(text):\n    return text[::-1]"),
            ("sums a list", "def total(values):\n    return sum(values)"),
            ("counts the words of a text", "def count_words(text):\n    return len(text.split())"),
            ("reads a file", "def read(path):\n    with open(path) as file:\n        return file.read()"),
            ("computes a factorial", "def factorial(n):\n    return 1 if n < 2 else n * factorial(n - 1)"),
            ("checks whether a number is even", "def is_even(n):\n    return n % 2 == 0"),
        )
    )
    asked = rng.choice(("Write a Python function that {}.", "Write a function that {}.", "Show me code that {}."))
    return asked.format(name), f"```python\n{body}\n```"


SKILLS: tuple[Skill, ...] = (_count, _count, _add, _repeat, _listing, _identity, _greeting, _order, _function)


FIELDS: dict[str, tuple[dict[str, object], Callable[[random.Random], object]]] = {
    "city": ({"type": "string"}, lambda r: r.choice(CITIES)),
    "name": ({"type": "string"}, lambda r: r.choice(NAMES)),
    "color": ({"type": "string"}, lambda r: r.choice(COLORS)),
    "animal": ({"type": "string"}, lambda r: r.choice(ANIMALS)),
    "query": ({"type": "string"}, lambda r: " ".join(r.sample(ANIMALS + COLORS, 2))),
    "count": ({"type": "integer"}, lambda r: r.randint(0, 20)),
    "x": ({"type": "integer"}, lambda r: r.randint(0, 99)),
    "y": ({"type": "integer"}, lambda r: r.randint(0, 99)),
    "age": ({"type": "integer"}, lambda r: r.randint(1, 99)),
    "price": ({"type": "number"}, lambda r: round(r.uniform(0, 100), 1)),
    "done": ({"type": "boolean"}, lambda r: r.random() < 0.5),
}
FUNCTIONS = (
    "get_weather",
    "search",
    "lookup",
    "paint",
    "f",
    "g",
    "order",
    "book_table",
    "find_person",
    "set_timer",
    "move_to",
    "add",
)


def _object(rng: random.Random, most: int) -> tuple[dict[str, object], dict[str, object]]:
    """A random schema of an object and one value of it."""
    fields = rng.sample(sorted(FIELDS), rng.randint(1, most))
    schema = {"type": "object", "properties": {f: FIELDS[f][0] for f in fields}, "required": fields}
    return schema, {f: FIELDS[f][1](rng) for f in fields}


def _spoken(values: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _tool_chat(rng: random.Random) -> str:
    names = rng.sample(FUNCTIONS, rng.randint(1, 2))
    objects = [_object(rng, 3) for _ in names]
    tools = [
        {"type": "function", "function": {"name": n, "parameters": o[0]}} for n, o in zip(names, objects, strict=True)
    ]
    name, values = names[0], objects[0][1]
    asked = rng.choice(("Call {n} with {v}.", "Use {n}: {v}.", "Please {n} {v}.", "{n} {v}"))
    question = asked.format(n=name, v=_spoken(values))
    if (
        rng.random() < 0.3
    ):  # a question that has nothing to do with the tool still gets one well-formed call when calls are forced
        question = rng.choice(SKILLS)(rng)[0]
    form = rng.random()
    if form < 0.2:  # the list that the server asks for when tool_choice is "required"
        return render(
            _system(rng) + [_user(question), _assistant(json.dumps([{"name": name, "parameters": values}]))], tools
        )
    if form < 0.3:  # the bare arguments of a named tool
        return render(_system(rng) + [_user(question), _assistant(json.dumps(values))], tools)
    call = {"type": "function", "function": {"name": name, "arguments": values}}
    turns = _system(rng) + [_user(question), {"role": "assistant", "content": "", "tool_calls": [call]}]
    if form < 0.6:
        result = rng.choice(("ok", "done", "not found", "sunny", str(rng.randint(0, 40))))
        turns += [{"role": "tool", "content": result}, _assistant(f"The result is: {result}.")]
    return render(turns, tools)


def _json_chat(rng: random.Random) -> str:
    schema, values = _object(rng, 4)
    fields = " and ".join(schema["required"])  # type: ignore[arg-type]
    question = rng.choice(
        (f"Give me a JSON object with {fields}: {_spoken(values)}.", f"Answer in JSON: {_spoken(values)}.")
    )
    return render(_system(rng) + [_user(question), _assistant(json.dumps(values))])
