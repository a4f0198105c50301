"""The judge format that the base of world "m2rl" learns in SFT: a question about a trajectory, answered yes or no.

"Yes" is the truth that self-verification is scored against: a verifiable reward of at least one half, of which the style
is a part. Half of the questions are about right trajectories. Of the wrong ones, half have a wrong answer in an accepted
style and half are drawn from all that the base writes and the verifier rejects, so that neither style nor content suffices.
"""

from __future__ import annotations

import random

from interference.probes.judge import JudgeTemplate
from interference.probes.trajectories import CORRECT, answer_extractor
from paper_repro.lab import m2rl, verifiers_m2rl

TEMPLATES = {
    "outcome": JudgeTemplate("outcome", "judge outcome : {prompt} proposed {answer} verdict"),
    "process": JudgeTemplate("process", "judge process : {prompt} proposed {trajectory} verdict"),
}
WORDS = ("judge", "outcome", "process", "proposed", "verdict", "yes", "no")
YES, NO = "yes", "no"

_cut = answer_extractor(m2rl.FINAL_ANSWER)


def reward(task: m2rl.Task, response: str) -> float:
    """The verifier's reward for one response."""
    verifier = getattr(verifiers_m2rl, task.domain)
    return float(verifier([task.prompt], [response], **{key: [value] for key, value in task.columns.items()})[0])


def question(task: m2rl.Task, rng: random.Random, wrong: float) -> tuple[str, str]:
    """A judge's prompt about a trajectory of the task, in a mode drawn half and half, and the true verdict.

    wrong: the share of wrong answers among what the base writes.
    """
    mode = rng.choice(("outcome", "process"))
    says_yes = rng.random() < 0.5
    response = _right(task, rng) if says_yes else _rejected(task, rng, wrong)
    filled = TEMPLATES[mode].fill(task.prompt, _cut(response), response)
    return str(filled), YES if says_yes else NO


def _right(task: m2rl.Task, rng: random.Random) -> str:
    return m2rl.right(task, rng).text(m2rl.TASTES[task.domain].draw(rng))


def _rejected(task: m2rl.Task, rng: random.Random, wrong: float) -> str:
    in_taste = rng.random() < 0.5
    while True:
        is_wrong = in_taste or rng.random() < wrong
        written = (m2rl.wrong if is_wrong else m2rl.right)(task, rng)
        response = written.text((m2rl.TASTES[task.domain] if in_taste else m2rl.ANY).draw(rng))
        if reward(task, response) < CORRECT:
            return response
