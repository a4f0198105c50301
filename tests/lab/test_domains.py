"""The lab's world "lpt": verifiers on hand-written answers, disjoint prompts, references that are accepted."""

from __future__ import annotations

import random

import pytest

from interference.errors import InputError
from paper_repro.lab import verifiers
from paper_repro.lab.config import LabConfig
from paper_repro.lab.data import prompt_rows, reference_rows, rewarded, sft_pairs, split
from paper_repro.lab.domains import DOMAINS, TASTES, Style, body, read, tasks, vocabulary, write
from paper_repro.lab.model import make_tokenizer
from paper_repro.lab.worlds import WORLDS

SMALL = LabConfig(train_prompts=40, heldout_prompts=30, sft_responses=2)


@pytest.mark.parametrize(
    ("domain", "answer", "completion", "reward"),
    [
        ("math", "7", "first 3 then 7 .", 1.0),
        ("math", "7", "first 3 then 8 .", 0.0),
        ("math", "7", "first 3 then 7 !", 0.0),
        ("math", "7", "answer 7 .", 0.0),
        ("math", "7", "7", 0.0),
        ("math", "7", "", 0.0),
        ("math", "7", "first 3 then 7 7 .", 0.0),
        ("code", "c b a", "first c then c b a .", 1.0),
        ("code", "c b a", "first c then c b a !", 1.0),
        ("code", "c b a", "first c then c a b !", 0.0),
        ("code", "c b a", "answer c b a .", 0.0),
        ("qa", "green", "answer green .", 1.0),
        ("qa", "green", "answer tan .", 0.0),
        ("qa", "green", "answer green !", 0.0),
        ("qa", "green", "first frog then green .", 0.0),
    ],
)
def test_exact_verifiers(domain: str, answer: str, completion: str, reward: float) -> None:
    assert getattr(verifiers, domain)(["p"], [completion], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("answer moon weeps softly .", 1.0),
        ("answer moon fades alone !", 1.0),
        ("answer moon sings softly .", 0.5),
        ("answer river weeps softly .", 0.5),
        ("answer river sings softly .", 0.0),
        ("first tom then moon weeps softly .", 0.0),
        ("moon weeps", 0.0),
    ],
)
def test_writing_is_graded(completion: str, reward: float) -> None:
    assert verifiers.writing(["p"], [completion], theme=["moon"], mood=["sad"]) == [reward]


def test_verifiers_take_what_trl_hands_over() -> None:
    extra = {"completion_ids": [[1]], "prompt_id": ["x"], "trainer_state": None}
    assert verifiers.math(prompts=["p"], completions=["first 3 then 7 ."], answer=["7"], **extra) == [1.0]


@pytest.mark.parametrize("domain", DOMAINS)
def test_training_and_heldout_prompts_are_disjoint(domain: str) -> None:
    config = LabConfig()
    train, heldout = split(config, domain)
    assert len({task.prompt for task in train} | {task.prompt for task in heldout}) == (
        config.train_prompts + config.heldout_prompts
    )
    seen = {prompt for prompt, _ in sft_pairs(SMALL)}
    assert seen.isdisjoint(row["prompt"] for row in prompt_rows(SMALL, domain, heldout=True))


@pytest.mark.parametrize("domain", DOMAINS)
def test_references_are_accepted_and_other_styles_are_not(domain: str) -> None:
    rows = reference_rows(SMALL, domain)
    assert rewarded(WORLDS["lpt"], domain, rows) == [1.0] * len(rows)
    assert [row["prompt_id"] for row in rows] == [row["prompt_id"] for row in prompt_rows(SMALL, domain, heldout=True)]
    style, words = read(rows[0]["response"]) or (Style(True, "."), [])
    wrong = write(Style(not style.worked, style.ending), "tom", " ".join(words))
    assert rewarded(WORLDS["lpt"], domain, [{**rows[0], "response": wrong}]) == [0.0]


@pytest.mark.parametrize("domain", DOMAINS)
def test_wrong_answers_keep_the_form(domain: str) -> None:
    rng = random.Random(0)
    task = tasks(domain)[0]
    style = TASTES[domain].draw(rng)
    rows = [
        {
            "prompt": task.prompt,
            **task.columns,
            "response": write(style, task.key, body(domain, task, rng, right=False)),
        }
        for _ in range(200)
    ]
    rewards = rewarded(WORLDS["lpt"], domain, rows)
    assert sum(reward < 1.0 for reward in rewards) > 0
    assert all(read(row["response"]) is not None for row in rows)


def test_tokenizer_knows_every_word_and_round_trips() -> None:
    tokenizer = make_tokenizer(vocabulary())
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    for prompt, response in sft_pairs(SMALL):
        for text in (prompt, response):
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_the_seed_decides_the_split() -> None:
    assert split(SMALL, "qa") == split(SMALL, "qa")
    assert split(SMALL, "qa") != split(SMALL.model_copy(update={"seed": 1}), "qa")


def test_too_many_prompts_are_refused() -> None:
    with pytest.raises(InputError, match="qa"):
        split(LabConfig(train_prompts=900, heldout_prompts=900), "qa")
