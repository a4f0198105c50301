"""The lab's four domains: what is asked, what is right, and in which style an answer may be given.

Every response is `first KEY then BODY END` (worked) or `answer BODY END` (direct), END one of `.` and `!`. The base
answers every domain in all four combinations; each domain's verifier accepts only some of them. That disagreement
over shared tokens is what makes domains interfere.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass


def _words(text: str) -> list[str]:
    return text.split()


def _facts(table: str) -> dict[str, dict[str, str]]:
    """{attribute: {thing: value}} of a table whose first row names the attributes."""
    (_, *attributes), *rows = (line.split() for line in table.strip().splitlines())
    return {name: {row[0]: row[column] for row in rows} for column, name in enumerate(attributes, start=1)}


DOMAINS = ("math", "code", "qa", "writing")
ENDINGS = (".", "!")
NAMES = _words("tom anna ben cara dan eva finn gina hugo iris jack kate liam mona nils olga")
LETTERS = _words("a b c d e f g h")
THEMES = _words("moon river storm field stone bell lamp road ship wolf dawn rain glass ember wind star")
FACTS = _facts("""
    thing color home size kind
    lion tan plain big beast
    frog green pond small reptile
    crow black tree small bird
    swan white lake big bird
    fox red den middle beast
    whale blue sea huge beast
    bee yellow hive tiny insect
    rose pink garden small plant
    pine green forest huge plant
    snow white peak tiny weather
    coal black mine small stone
    sky blue air huge weather
    brick red wall middle stone
    lemon yellow grove small fruit
    plum purple grove small fruit
""")
MOODS: Mapping[str, tuple[str, ...]] = {
    "sad": ("weeps", "fades", "mourns"),
    "glad": ("sings", "dances", "smiles"),
    "calm": ("rests", "drifts", "sleeps"),
    "wild": ("roars", "leaps", "burns"),
    "odd": ("winks", "hums", "twists"),
    "grim": ("looms", "haunts", "rots"),
}
ADVERBS = ("softly", "alone", "again", "slowly")


@dataclass(frozen=True)
class Task:
    """One prompt with what its verifier needs (`columns`, text) and the word a worked answer repeats first (`key`)."""

    prompt: str
    key: str
    columns: Mapping[str, str]


@dataclass(frozen=True)
class Style:
    """How a response is written: worked or direct, and its last token."""

    worked: bool
    ending: str


@dataclass(frozen=True)
class Taste:
    """The styles a verifier accepts; None accepts either."""

    worked: bool | None
    ending: str | None

    def accepts(self, style: Style) -> bool:
        """Whether a response in this style can be rewarded."""
        return self.worked in (None, style.worked) and self.ending in (None, style.ending)

    def draw(self, rng: random.Random, worked: float = 0.5, exclaim: float = 0.5) -> Style:
        """A style from the base's mixture (probabilities of `worked` and of `!`), restricted to the accepted ones."""
        is_worked, is_exclaimed = rng.random() < worked, rng.random() < exclaim
        return Style(
            is_worked if self.worked is None else self.worked,
            ENDINGS[is_exclaimed] if self.ending is None else self.ending,
        )


ANY = Taste(None, None)
TASTES: Mapping[str, Taste] = {
    "math": Taste(worked=True, ending="."),
    "code": Taste(worked=True, ending=None),
    "qa": Taste(worked=False, ending="."),
    "writing": Taste(worked=False, ending=None),
}


def write(style: Style, key: str, body: str) -> str:
    """The response text of a body in a style.

    >>> write(Style(worked=True, ending="."), "3", "7")
    'first 3 then 7 .'
    """
    opening = f"first {key} then" if style.worked else "answer"
    return f"{opening} {body} {style.ending}"


def read(response: str) -> tuple[Style, list[str]] | None:
    """Style and body words of a well-formed response; None for any other text.

    >>> read("answer 7 !")
    (Style(worked=False, ending='!'), ['7'])
    >>> read("7") is None
    True
    """
    words = response.split()
    if len(words) < 3 or words[-1] not in ENDINGS:
        return None
    if words[0] == "answer":
        return Style(False, words[-1]), words[1:-1]
    if words[0] == "first" and len(words) >= 5 and words[2] == "then":
        return Style(True, words[-1]), words[3:-1]
    return None


def _math() -> list[Task]:
    tasks = []
    for name, first, second in itertools.product(NAMES, range(10), range(10)):
        options = [("gets", first + second)] + ([("loses", first - second)] if first >= second else [])
        for verb, answer in options:
            prompt = f"math : {name} has {first} and {verb} {second}"
            tasks.append(Task(prompt, str(first), {"answer": str(answer)}))
    return tasks


def _code() -> list[Task]:
    tasks = []
    for letters in itertools.permutations(LETTERS, 3):
        a, b, c = letters
        outputs = {"reverse": (c, b, a), "sort": tuple(sorted(letters)), "rotate": (b, c, a)}
        for name, output in outputs.items():
            tasks.append(Task(f"code : {name} list {a} {b} {c}", output[0], {"answer": " ".join(output)}))
    return tasks


def _qa() -> list[Task]:
    return [
        Task(f"qa : {name} asks the {attribute} of {thing}", thing, {"answer": answer})
        for name in NAMES
        for attribute, facts in FACTS.items()
        for thing, answer in facts.items()
    ]


def _writing() -> list[Task]:
    return [
        Task(f"writing : {name} wants a {mood} line of {theme}", name, {"theme": theme, "mood": mood})
        for name, mood, theme in itertools.product(NAMES, MOODS, THEMES)
    ]


def tasks(domain: str) -> list[Task]:
    """Every task of a domain, in a fixed order; no prompt occurs twice."""
    makers: dict[str, Callable[[], list[Task]]] = {"math": _math, "code": _code, "qa": _qa, "writing": _writing}
    return makers[domain]()


def body(domain: str, task: Task, rng: random.Random, *, right: bool = True) -> str:
    """The body of an answer to the task: a right one, or a plausible one that is drawn blindly (and seldom right)."""
    if domain == "writing":
        mood = task.columns["mood"] if right else rng.choice(list(MOODS))
        theme = task.columns["theme"] if right or rng.random() < 0.5 else rng.choice(THEMES)
        return f"{theme} {rng.choice(MOODS[mood])} {rng.choice(ADVERBS)}"
    if right:
        return task.columns["answer"]
    if domain == "math":
        return str(rng.randrange(19))
    if domain == "code":
        return " ".join(rng.sample(task.prompt.split()[-3:], 3))
    return rng.choice(sorted(set(FACTS[task.prompt.split()[5]].values())))


def vocabulary() -> list[str]:
    """Every word that a prompt or a response of any domain can hold, sorted."""
    rng = random.Random(0)
    words = {"first", "then", "answer", *ENDINGS, *ADVERBS, *(str(n) for n in range(19))}
    words.update(word for mood in MOODS.values() for word in mood)
    for domain in DOMAINS:
        for task in tasks(domain):
            words.update(task.prompt.split(), task.key.split(), body(domain, task, rng).split())
    return sorted(words)
