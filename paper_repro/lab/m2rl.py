"""World "m2rl": math, coding, science and instruction, answered in steps (domains of M2RL, arXiv 2602.12566).

Every response is `OPENING STEP ; STEP ; MARKER ANSWER END`: a step shows an intermediate value, so that an error has a
place. OPENING, MARKER and END have two words each; the base uses them half and half, and each domain's verifier accepts
only some. Who shares a taste and who opposes it is what makes domains help or hurt each other (see `TASTES`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from paper_repro.lab.config import LabConfig
from paper_repro.lab.domains import FACTS, LETTERS, NAMES, THEMES

DOMAINS = ("math", "coding", "science", "instruction")
REASONING = ("math", "coding", "science")
OPENINGS, MARKERS, ENDINGS = ("now", "well"), ("answer", "result"), (".", "!")
SEPARATOR = r"; ?"
"""What ends a step, as a regular expression for `interference.probes.trajectories.split_steps`."""
FINAL_ANSWER = r"regex:(?:answer|result) (.*?)(?: [.!])?$"
"""What cuts the final answer, without marker and end, out of a response (`trajectories.answer_extractor`)."""

OPERATIONS: Mapping[str, Callable[[list[str]], list[str]]] = {
    "reverse": lambda items: items[::-1],
    "rotate": lambda items: [*items[1:], items[0]],
    "swap": lambda items: [items[1], items[0], *items[2:]],
}
NUMBERS = (1, 2, 3, 4, 5)
SIGNS = ("sun", "cup", "key", "leaf", "coin", "drum")
WORD_COUNTS = (3, 4, 5)


def _properties() -> dict[str, dict[str, str]]:
    """{property: {value: what it is}} of every value in the table of facts; arbitrary, to be learned by heart."""
    values = sorted({value for facts in FACTS.values() for value in facts.values()})
    return {
        "sign": {value: SIGNS[(5 * i + i // 6) % len(SIGNS)] for i, value in enumerate(values)},
        "rank": {value: str((7 * i + 3) % 10) for i, value in enumerate(values)},
    }


PROPERTIES = _properties()


@dataclass(frozen=True)
class Task:
    """A prompt, its verifier's columns, and the chain from `start` through `links` that answers it (none: instruction)."""

    domain: str
    prompt: str
    columns: Mapping[str, str]
    start: str = ""
    links: tuple[str, ...] = ()


@dataclass(frozen=True)
class Style:
    """The words that a response begins with, that mark its answer, and that end it."""

    opening: str
    marker: str
    ending: str


@dataclass(frozen=True)
class Taste:
    """The styles that a verifier accepts; None accepts either word."""

    opening: str | None = None
    marker: str | None = None
    ending: str | None = None

    def accepts(self, style: Style) -> bool:
        """Whether a response in this style can be rewarded."""
        pairs = ((self.opening, style.opening), (self.marker, style.marker), (self.ending, style.ending))
        return all(wanted in (None, word) for wanted, word in pairs)

    def draw(self, rng: random.Random) -> Style:
        """An accepted style, free choices half and half."""
        drawn = [rng.choice(words) for words in (OPENINGS, MARKERS, ENDINGS)]
        wanted = (self.opening, self.marker, self.ending)
        return Style(*(word if own is None else own for own, word in zip(wanted, drawn, strict=True)))


ANY = Taste()
# Math and science agree on the marker; math and coding on the opening, not on the marker; instruction opposes all three.
TASTES: Mapping[str, Taste] = {
    "math": Taste(opening="now", marker="answer"),
    "coding": Taste(opening="now", marker="result"),
    "science": Taste(marker="answer", ending="."),
    "instruction": Taste(opening="well", ending="!"),
}


@dataclass(frozen=True)
class Written:
    """A response's parts: its steps, its answer, and the first step that is wrong (1 is the first; None: none is)."""

    steps: tuple[str, ...]
    answer: str
    error_step: int | None = None

    def text(self, style: Style) -> str:
        """The response in a style.

        >>> Written(("s1 plus 4 is 7",), "7").text(Style("now", "answer", "."))
        'now s1 plus 4 is 7 ; answer 7 .'
        """
        return f"{style.opening} {' ; '.join((*self.steps, f'{style.marker} {self.answer}'))} {style.ending}"


def read(response: str) -> tuple[Style, list[str]] | None:
    """Style and answer words of a well-formed response; None for any other text.

    >>> read("well s1 plus 4 is 7 ; result 7 !")
    (Style(opening='well', marker='result', ending='!'), ['7'])
    """
    words = response.split()
    if len(words) < 3 or words[0] not in OPENINGS or words[-1] not in ENDINGS or ";" not in words:
        return None
    final = words[len(words) - words[::-1].index(";") : -1]
    if len(final) < 2 or final[0] not in MARKERS:
        return None
    return Style(words[0], final[0], words[-1]), final[1:]


def follow(domain: str, link: str, value: str) -> str:
    """The value that a link of the chain leads to.

    >>> follow("math", "plus 4", "8"), follow("coding", "rotate", "a b c"), follow("science", "color", "frog")
    ('2', 'b c a', 'green')
    """
    if domain == "math":
        sign, number = link.split()
        return str((int(value) + (1 if sign == "plus" else -1) * int(number)) % 10)
    if domain == "coding":
        return " ".join(OPERATIONS[link](value.split()))
    return (FACTS | PROPERTIES)[link][value]


def step(domain: str, place: int, link: str, before: str, after: str) -> str:
    """How a response writes the link at `place` of the chain, which leads from one value to the next."""
    if domain == "math":
        return f"s{place} {link} is {after}"
    return f"s{place} {link} {after}" if domain == "coding" else f"{link} of {before} is {after}"


def _slip(domain: str, link: str, right: str, rng: random.Random) -> str:
    """A value that a step could wrongly hold."""
    if domain == "math":
        return rng.choice([str(n) for n in range(10) if str(n) != right])
    if domain == "coding":
        items = right.split()
        while " ".join(items) == right:
            rng.shuffle(items)
        return " ".join(items)
    return rng.choice([v for v in sorted(set((FACTS | PROPERTIES)[link].values())) if v != right])


def right(task: Task, rng: random.Random) -> Written:
    """A right response."""
    return _line(task, rng, 0) if task.domain == "instruction" else _chain(task, rng, None)


def wrong(task: Task, rng: random.Random) -> Written:
    """A wrong response: a step drawn uniformly holds a wrong value, from which the rest goes on consistently.

    The answer is always another than the right one. For instruction, one to three constraints are misread in the plan.
    """
    if task.domain == "instruction":
        return _line(task, rng, rng.randint(1, 3))
    while True:  # two facts of two values can agree, so that an error leads back to the right answer
        written = _chain(task, rng, rng.randint(1, len(task.links)))
        if written.answer != task.columns["answer"]:
            return written


def _chain(task: Task, rng: random.Random, error: int | None) -> Written:
    steps, value = [], task.start
    for place, link in enumerate(task.links, start=1):
        after = follow(task.domain, link, value)
        if place == error:
            after = _slip(task.domain, link, after, rng)
        steps.append(step(task.domain, place, link, value, after))
        value = after
    return Written(tuple(steps), value, error)


def _line(task: Task, rng: random.Random, misread: int) -> Written:
    """A line that obeys the plan, in which so many of the three constraints are not those of the prompt."""
    count, include, last = task.columns["words"], task.columns["include"], task.columns["last"]
    others = [w for w in THEMES if w not in (include, last)]
    spoilt = rng.sample(range(3), misread)
    if 0 in spoilt:
        count = rng.choice([str(n) for n in WORD_COUNTS if str(n) != count])
    if 1 in spoilt:
        include = rng.choice(others)
    if 2 in spoilt:
        last = rng.choice([w for w in others if w != include])
    words = [rng.choice(others) for _ in range(int(count) - 1)]
    words[rng.randrange(len(words))] = include
    plan = f"plan {count} words with {include} end {last}"
    return Written((plan,), " ".join([*words, last]), 1 if misread else None)


def constraints_met(words: list[str], count: str, include: str, last: str) -> int:
    """How many of an instruction's three constraints a line obeys."""
    return (len(words) == int(count)) + (include in words) + (bool(words) and words[-1] == last)


def tasks(config: LabConfig, domain: str) -> list[Task]:
    """Distinct tasks of a domain in an order that the seed decides, as many as the settings ask for where there are so many."""
    rng = random.Random(f"{config.seed} {domain} tasks")
    if domain == "science":
        return _science()
    make: Callable[[random.Random], Task] = {
        "math": lambda rng: _math(rng, _count(config.steps, rng)),
        "coding": lambda rng: _coding(rng, _count(config.steps, rng)),
        "instruction": _instruction,
    }[domain]
    wanted = config.train_prompts + config.heldout_prompts
    if domain == "instruction":  # several names ask one question, and questions are split as wholes
        wanted *= 2
    found: dict[str, Task] = {}
    for _ in range(20 * wanted):  # enough unless there are hardly more than so many
        task = make(rng)
        found.setdefault(task.prompt, task)
        if len(found) == wanted:
            break
    return list(found.values())


def question(task: Task) -> str:
    """What is asked, whoever asks: prompts that differ in the name alone have one answer.

    >>> question(_instruction(random.Random(0))) == question(_instruction(random.Random(0)))
    True
    """
    words = task.prompt.split()
    return " ".join(words[:2] + words[3:]) if task.domain in ("science", "instruction") else task.prompt


def _count(steps: float, rng: random.Random) -> int:
    """A whole number of steps with this mean."""
    return math.floor(steps) + (rng.random() < steps - math.floor(steps))


def _solved(domain: str, prompt: str, start: str, links: Iterable[str]) -> Task:
    chain, value = tuple(links), start
    for link in chain:
        value = follow(domain, link, value)
    return Task(domain, prompt, {"answer": value}, start, chain)


def _math(rng: random.Random, count: int) -> Task:
    start, links = (
        str(rng.randrange(10)),
        [f"{rng.choice(('plus', 'minus'))} {rng.choice(NUMBERS)}" for _ in range(count)],
    )
    return _solved("math", f"math : {start} {_labelled(links)}", start, links)


def _coding(rng: random.Random, count: int) -> Task:
    start, links = " ".join(rng.sample(LETTERS, 3)), [rng.choice(list(OPERATIONS)) for _ in range(count)]
    return _solved("coding", f"coding : {start} {_labelled(links)}", start, links)


def _labelled(links: list[str]) -> str:
    """Links with the labels of their places, by which a small model finds the one whose turn it is."""
    return " ".join(f"s{place} {link}" for place, link in enumerate(links, start=1))


def _science() -> list[Task]:
    return [
        _solved("science", f"science : {name} asks the {second} of the {first} of {thing}", thing, (first, second))
        for name in NAMES
        for second in PROPERTIES
        for first, facts in FACTS.items()
        for thing in facts
    ]


def _instruction(rng: random.Random) -> Task:
    include, last = rng.sample(THEMES, 2)
    name, count = rng.choice(NAMES), str(rng.choice(WORD_COUNTS))
    prompt = f"instruction : {name} wants {count} words with {include} end {last}"
    return Task("instruction", prompt, {"words": count, "include": include, "last": last})


def vocabulary(config: LabConfig) -> list[str]:
    """Every word that a prompt or a response can hold, sorted."""
    words = {*OPENINGS, *MARKERS, *ENDINGS, *NAMES, *LETTERS, *THEMES, *OPERATIONS, *FACTS, *PROPERTIES, *DOMAINS}
    words.update(str(n) for n in range(10))
    words.update(f"s{place}" for place in range(1, math.ceil(config.steps) + 1))
    for facts in (FACTS | PROPERTIES).values():
        words.update(facts, facts.values())
    words.update([";", ":", "plus", "minus", "is", "of", "asks", "the", "wants", "words", "with", "end", "plan"])
    return sorted(words)


def longest_prompt(config: LabConfig) -> int:
    """Tokens of the longest prompt of any domain."""
    return max(5 + 3 * math.ceil(config.steps), 11)
