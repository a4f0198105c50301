"""The judge format that the base of world "m2rl" learns in SFT: a question about a trajectory, answered yes or no.

"Yes" is the truth that self-verification is scored against: a verifiable reward of at least one half, of which the style
is a part. Half of the questions of a mode have the answer yes. Of the others about half show a wrong answer in an accepted
style, so that style alone does not tell. Process mode shows the whole response, or its first steps: then "yes" is that no
step shown is wrong and the opening is accepted. Short responses are what a small model learns to judge first.
"""

from __future__ import annotations

import random

from interference.probes.judge import JudgeTemplate
from interference.probes.trajectories import CORRECT, answer_extractor, split_steps
from paper_repro.lab import m2rl, verifiers_m2rl

TEMPLATES = {
    "outcome": JudgeTemplate("outcome", "judge outcome : {prompt} proposed {answer} verdict"),
    "process": JudgeTemplate("process", "judge process : {prompt} proposed {trajectory} verdict"),
}
WORDS = ("judge", "outcome", "process", "proposed", "verdict", "yes", "no")
YES, NO = "yes", "no"
WRONG, IN_TASTE, SHORTENED = 0.5, 0.6, 0.5
"""Shares of the trajectories drawn for questions: wrong ones, those in an accepted style, those shown in part."""

_cut = answer_extractor(m2rl.FINAL_ANSWER)


def reward(task: m2rl.Task, response: str) -> float:
    """The verifier's reward for one response."""
    verifier = getattr(verifiers_m2rl, task.domain)
    return float(verifier([task.prompt], [response], **{key: [value] for key, value in task.columns.items()})[0])


def holds(task: m2rl.Task, written: m2rl.Written, style: m2rl.Style, shown: int) -> bool:
    """Whether the first so many steps of a response are right; the last of them, the answer, counts as a step."""
    if shown > len(written.steps):
        return reward(task, written.text(style)) >= CORRECT
    taste = m2rl.TASTES[task.domain]
    if taste.opening not in (None, style.opening):
        return False
    # Whether what a wrong step leads to is forgiven (one of an instruction's three constraints is).
    seen = written.error_step is not None and written.error_step <= shown
    return not seen or reward(task, written.text(taste.draw(random.Random(0)))) >= CORRECT


def question(task: m2rl.Task, rng: random.Random) -> tuple[str, str]:
    """A judge's prompt about a trajectory of the task, in a mode drawn half and half, and the true verdict."""
    mode, verdict = rng.choice(("outcome", "process")), rng.random() < 0.5
    while True:
        written = (m2rl.wrong if rng.random() < WRONG else m2rl.right)(task, rng)
        style = (m2rl.TASTES[task.domain] if rng.random() < IN_TASTE else m2rl.ANY).draw(rng)
        steps = split_steps(written.text(style), m2rl.SEPARATOR)
        shortened = mode == "process" and rng.random() < SHORTENED
        shown = rng.randint(1, len(steps)) if shortened else len(steps)
        if holds(task, written, style, shown) == verdict:
            response = "".join(steps[:shown])
            filled = TEMPLATES[mode].fill(task.prompt, _cut(response), response)
            return " ".join(str(filled).split()), YES if verdict else NO
