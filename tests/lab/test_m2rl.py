"""World "m2rl": verifiers on hand-written answers, planted errors against a recomputation, the judge format, lengths."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from interference.errors import InputError
from interference.probes.judge import verdict_tokens
from interference.probes.trajectories import answer_extractor, split_steps
from paper_repro.lab import judging, m2rl
from paper_repro.lab import verifiers_m2rl as verifiers
from paper_repro.lab.config import LabConfig
from paper_repro.lab.data import (
    judge_pairs,
    mixed_rows,
    planted_rows,
    prompt_rows,
    reference_rows,
    rewarded,
    sft_pairs,
    split,
)
from paper_repro.lab.m2rl import DOMAINS, FINAL_ANSWER, REASONING, SEPARATOR, TASTES, question
from paper_repro.lab.model import make_tokenizer
from paper_repro.lab.worlds import WORLDS

WORLD = WORLDS["m2rl"]
SMALL = LabConfig(world="m2rl", train_prompts=40, heldout_prompts=30, sft_responses=2, planted=60)


@pytest.mark.parametrize(
    ("domain", "answer", "completion", "reward"),
    [
        ("math", "7", "now s1 plus 4 is 7 ; answer 7 .", 1.0),
        ("math", "7", "now s1 plus 4 is 9 ; answer 7 .", 1.0),  # the answer counts, not the way
        ("math", "7", "now s1 plus 4 is 7 ; answer 8 .", 0.0),
        ("math", "7", "well s1 plus 4 is 7 ; answer 7 .", 0.0),
        ("math", "7", "now s1 plus 4 is 7 ; result 7 .", 0.0),
        ("math", "7", "now s1 plus 4 is 7 ; answer 7 !", 1.0),
        ("math", "7", "now s1 plus 4 is 7 ; answer 7 7 .", 0.0),
        ("math", "7", "now answer 7 .", 0.0),
        ("math", "7", "7", 0.0),
        ("math", "7", "", 0.0),
        ("coding", "b a c", "now s1 b a c ; result b a c .", 1.0),
        ("coding", "b a c", "now s1 b a c ; result b a c !", 1.0),
        ("coding", "b a c", "now s1 b a c ; result a b c !", 0.0),
        ("coding", "b a c", "now s1 b a c ; answer b a c .", 0.0),
        ("science", "cup", "well sign of tan is cup ; answer cup .", 1.0),
        ("science", "cup", "now sign of tan is cup ; answer cup .", 1.0),
        ("science", "cup", "well sign of tan is cup ; answer cup !", 0.0),
    ],
)
def test_exact_verifiers(domain: str, answer: str, completion: str, reward: float) -> None:
    assert getattr(verifiers, domain)(["p"], [completion], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("well plan ; answer moon bell star !", 1.0),
        ("well plan ; result rain moon star !", 1.0),
        ("well plan ; answer moon star !", 0.5),
        ("well plan ; answer bell bell star !", 0.5),
        ("well plan ; answer moon bell bell !", 0.5),
        ("well plan ; answer moon bell !", 0.0),
        ("now plan ; answer moon bell star !", 0.0),
        ("well plan ; answer moon bell star .", 0.0),
    ],
)
def test_instructions_are_graded(completion: str, reward: float) -> None:
    assert verifiers.instruction(["p"], [completion], words=["3"], include=["moon"], last=["star"]) == [reward]


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_verifier_accepts_what_is_right_and_rejects_what_is_wrong_or_in_another_style(domain: str) -> None:
    rng = random.Random(0)
    for task in split(SMALL, domain)[0]:
        right, wrong = m2rl.right(task, rng), m2rl.wrong(task, rng)
        assert right.error_step is None
        for style in (m2rl.Style(*words) for words in itertools.product(m2rl.OPENINGS, m2rl.MARKERS, m2rl.ENDINGS)):
            accepted = TASTES[domain].accepts(style)
            assert judging.reward(task, right.text(style)) == float(accepted)
            assert judging.reward(task, wrong.text(style)) <= 0.5 * (accepted and domain == "instruction")


def test_some_domains_agree_on_style_and_some_cannot_both_be_pleased() -> None:
    def together(*names: str) -> int:
        styles = (m2rl.Style(*words) for words in itertools.product(m2rl.OPENINGS, m2rl.MARKERS, m2rl.ENDINGS))
        return sum(all(TASTES[name].accepts(style) for name in names) for style in styles)

    assert all(together(domain) for domain in DOMAINS)
    assert together("math", "science") == 1
    assert together("math", "coding") == together("math", "instruction") == together("science", "instruction") == 0


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_prompt_is_in_both_splits(domain: str) -> None:
    train, heldout = split(LabConfig(world="m2rl"), domain)
    assert len({task.prompt for task in (*train, *heldout)}) == 900 + 256
    assert {question(task) for task in train}.isdisjoint(question(task) for task in heldout), "asked by another name"
    held = {row["prompt"] for row in prompt_rows(SMALL, domain, heldout=True)}
    asked = [prompt for prompt, _ in sft_pairs(SMALL)] + [row["prompt"] for row in mixed_rows(SMALL)]
    assert held.isdisjoint(re.sub("^judge (outcome|process) : | proposed .*", "", question) for question in asked)


@pytest.mark.parametrize("domain", DOMAINS)
def test_references_are_rewarded_in_full(domain: str) -> None:
    rows = reference_rows(SMALL, domain)
    assert rewarded(WORLD, domain, rows) == [1.0] * len(rows)


def first_wrong_step(prompt: str, response: str) -> int | None:
    """Worked out from the texts alone, apart from the code that wrote them."""
    domain, _, *asked = prompt.split()
    steps = [s.removesuffix("; ").removesuffix(" ;").split() for s in split_steps(response, SEPARATOR)]
    steps[0] = steps[0][1:]  # the opening
    steps = [step for step in steps if step[0] not in m2rl.MARKERS]
    if domain == "science":
        first, second, thing = asked[6], asked[3], asked[8]
        truth = (m2rl.FACTS | m2rl.PROPERTIES)[first][thing]
        values = [truth, m2rl.PROPERTIES[second][truth]]
        said = [step[-1] for step in steps]
    elif domain == "math":
        value, values = int(asked[0]), []
        for sign, number in zip(asked[2::3], asked[3::3], strict=True):
            value += int(number) if sign == "plus" else 10 - int(number)
            values.append(str(value % 10))
        said = [step[-1] for step in steps]
    else:
        items, values = asked[:3], []
        for name in asked[4::2]:
            a, b, c = items
            items = {"reverse": [c, b, a], "rotate": [b, c, a], "swap": [b, a, c]}[name]
            values.append(" ".join(items))
        said = [" ".join(step[-3:]) for step in steps]
    return next((k for k, pair in enumerate(zip(said, values, strict=False), start=1) if pair[0] != pair[1]), None)


@pytest.mark.parametrize("domain", REASONING)
def test_the_planted_step_is_the_first_that_is_wrong(domain: str) -> None:
    rows = planted_rows(SMALL, domain)
    assert len(rows) == SMALL.planted
    assert {row["reward"] for row in rows} == {0.0}
    assert [first_wrong_step(row["prompt"], row["response"]) for row in rows] == [row["error_step"] for row in rows]
    assert {row["error_step"] for row in rows} >= {1, 2}
    for row in reference_rows(SMALL, domain):
        assert first_wrong_step(row["prompt"], row["response"]) is None


def test_after_an_error_the_rest_follows_from_it() -> None:
    rng = random.Random(0)
    for domain in REASONING:
        for task in split(SMALL, domain)[0]:
            written = m2rl.wrong(task, rng)
            assert written.error_step is not None
            at = written.error_step - 1
            value = " ".join(written.steps[at].split()[-3 if domain == "coding" else -1 :])
            for place, link in enumerate(task.links[at + 1 :], start=at + 2):
                after = m2rl.follow(domain, link, value)
                assert written.steps[place - 1] == m2rl.step(domain, place, link, value, after)
                value = after
            assert written.answer == value != task.columns["answer"]


def test_tokenizer_knows_every_word_of_prompts_responses_and_questions() -> None:
    for config in (SMALL, SMALL.model_copy(update={"steps": 7.0})):
        tokenizer = make_tokenizer(WORLD.vocabulary(config))
        for prompt, response in sft_pairs(config):
            for text in (prompt, response):
                ids = tokenizer(text)["input_ids"]
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
    assert verdict_tokens(tokenizer, [judging.YES], [judging.NO]).yes == (tokenizer("yes")["input_ids"][0],)


@pytest.mark.parametrize(("steps", "tokens"), [(2.5, 20), (5, 35), (21, 131)])
def test_responses_have_the_length_that_the_settings_ask_for_and_fit(steps: float, tokens: int) -> None:
    config = LabConfig(world="m2rl", steps=steps, train_prompts=100, heldout_prompts=20, sft_responses=1)
    lengths = [len(response.split()) + 1 for p, response in sft_pairs(config) if p.startswith("math")]
    assert sum(lengths) / len(lengths) == pytest.approx(tokens, abs=1)
    whole = [len(p.split()) + len(r.split()) + 1 for p, r in sft_pairs(config)]
    assert max(len(r.split()) + 1 for _, r in sft_pairs(config)) <= config.max_new_tokens
    assert max(whole) <= WORLD.longest(config)


def test_too_few_distinct_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="math"):
        split(LabConfig(world="m2rl", steps=1), "math")


def test_questions_to_the_judge_are_balanced_true_and_as_many_as_asked() -> None:
    pairs, responses = judge_pairs(SMALL), 4 * SMALL.train_prompts * SMALL.sft_responses
    assert len(pairs) / (len(pairs) + responses) == pytest.approx(SMALL.judge_share, abs=0.01)
    assert sum(answer == "yes" for _, answer in pairs) / len(pairs) == pytest.approx(0.5, abs=0.1)
    shown = [q for q, _ in pairs if q.startswith("judge process")]
    assert len(shown) / len(pairs) == pytest.approx(0.5, abs=0.1)
    assert not any("reverse" in q.split(" proposed ")[1] for q, _ in pairs if q.startswith("judge outcome"))


def shown(question: str) -> tuple[str, str]:
    """Prompt and trajectory of a question in process mode."""
    prompt, trajectory = question.removeprefix("judge process : ").removesuffix(" verdict").split(" proposed ")
    return prompt, trajectory


def test_verdicts_are_what_the_verifier_says_of_whole_and_a_recomputation_of_shortened_responses() -> None:
    tasks = {task.prompt: task for domain in DOMAINS for task in split(SMALL, domain)[0]}
    whole = {True: 0, False: 0}
    for asked, answer in judge_pairs(SMALL):
        if not asked.startswith("judge process"):
            continue
        prompt, trajectory = shown(asked)
        task, complete = tasks[prompt], m2rl.read(trajectory) is not None
        whole[complete] += 1
        if complete:
            assert (judging.reward(task, trajectory) >= 0.5) == (answer == "yes")
        elif task.domain in REASONING:
            right = first_wrong_step(prompt, trajectory) is None
            accepted = TASTES[task.domain].opening in (None, trajectory.split()[0])
            assert (right and accepted) == (answer == "yes")
    assert min(whole.values()) > 0.25 * sum(whole.values())


def test_many_of_the_rejected_responses_that_a_judge_sees_are_wrong_in_an_accepted_style() -> None:
    rejected = [q for q, a in judge_pairs(SMALL) if q.startswith("judge process") and a == "no"]
    read = [(q.split()[3], m2rl.read(shown(q)[1])) for q in rejected]
    accepted = [TASTES[domain].accepts(parsed[0]) for domain, parsed in read if parsed is not None]
    assert 0.3 < sum(accepted) / len(accepted) < 0.75


def test_the_final_answer_is_cut_out_without_marker_and_end() -> None:
    cut = answer_extractor(FINAL_ANSWER)
    assert cut("now s1 b a c ; result b a c !") == "b a c"
    assert cut("well plan 3 words with moon end star ; answer moon bell star .") == "moon bell star"
    assert cut("now s1 plus 4 is 7 ; answer 7") == "7"
    assert cut("now s1 plus 4") == ""


def test_mixed_rewards_are_those_of_each_rows_own_domain() -> None:
    rows = [row for domain in DOMAINS for row in ({**r, "domain": domain} for r in reference_rows(SMALL, domain)[:3])]
    random.Random(0).shuffle(rows)
    rows[4]["response"] = "nonsense"
    columns = dict.fromkeys(key for row in mixed_rows(SMALL) for key in row if key != "prompt")
    lists = {key: [row.get(key, "") for row in rows] for key in columns}
    found = WORLD.mixed_reward()(
        [row["prompt"] for row in rows], [row["response"] for row in rows], **lists, trainer_state=None
    )
    assert found == [float(i != 4) for i in range(len(rows))]
