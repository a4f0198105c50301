"""Domains: rows to token ids, batches, and rows that must be refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import rows, tokenizer, write_jsonl

from interference.domain import Domain, Sequence, batches
from interference.errors import InputError


def test_rows_become_ids_with_the_end_token() -> None:
    tok = tokenizer()
    given_rows: list[dict[str, Any]] = [
        {"prompt": "w1 w2", "response": "w3"},
        {"prompt": "w1 w2", "response": "w3", "eos": False, "reward": 1},
        {"prompt": "other", "prompt_token_ids": [5, 6], "response_token_ids": [7, 1], "prompt_id": "x"},
    ]
    domain = Domain.from_rows(given_rows, tokenizer=tok, name="d")
    ids = tok.get_vocab()
    a, b, c = domain.sequences
    assert a.prompt == (ids["w1"], ids["w2"])
    assert a.response == (ids["w3"], tok.eos_token_id)
    assert b.response == (ids["w3"],)
    assert b.reward == 1.0
    assert a.prompt_id == b.prompt_id != c.prompt_id == "x"
    assert (c.prompt, c.response) == ((5, 6), (7, 1))


def test_messages_go_through_the_chat_template() -> None:
    tok = tokenizer()
    row = {"messages": [{"role": "user", "content": "w1"}], "response": "w2"}
    with pytest.raises(InputError, match="chat template"):
        Domain.from_rows([row], tokenizer=tok, name="d")
    tok.chat_template = (
        "{% for m in messages %}w9 {{ m.content }} {% endfor %}{% if add_generation_prompt %}w8{% endif %}"
    )
    (sequence,) = Domain.from_rows([row], tokenizer=tok, name="d").sequences
    assert tok.decode(sequence.prompt) == "w9 w1 w8"


def test_limit_counts_prompts_and_keeps_their_responses() -> None:
    domain = Domain.from_rows(rows(0, prompts=5, responses=3), tokenizer=tokenizer(), name="d", limit=2)
    assert len(domain.sequences) == 6
    assert len(set(domain.prompt_ids)) == 2


def test_distinct_pairs_expand_back() -> None:
    base = Domain.from_rows(rows(0), tokenizer=tokenizer(), name="d").sequences
    domain = Domain("d", base[:3] + base[:2])
    distinct, where = domain.distinct()
    assert len(distinct) == 3
    assert [(distinct[w].prompt, distinct[w].response) for w in where] == [
        (s.prompt, s.response) for s in domain.sequences
    ]


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20),
    tokens=st.integers(1, 60),
)
def test_batches_hold_every_sequence_once_within_the_budget(lengths: list[tuple[int, int]], tokens: int) -> None:
    sequences = [Sequence(tuple(range(1, p + 1)), tuple(range(50, 50 + r)), str(i)) for i, (p, r) in enumerate(lengths)]
    seen: list[int] = []
    for batch in batches(sequences, pad=0, tokens=tokens):
        assert batch.input_ids.numel() <= tokens or len(batch.index) == 1
        for b, i in enumerate(batch.index):
            assert tuple(batch.input_ids[b][batch.targets[b]].tolist()) == sequences[i].response
            assert int(batch.targets[b].nonzero()[0]) == len(sequences[i].prompt)
        seen += batch.index
    assert sorted(seen) == list(range(len(sequences)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "w1"}, "row 2.*`prompt`"),
        ({"prompt": "w1"}, "row 2.*`response`"),
        ({"prompt": "w1", "response": "w2", "reward": "good"}, "row 2: reward 'good'"),
        ({"prompt": "w1", "response": "w2", "reward": float("nan")}, "row 2: reward nan"),
        ({"prompt": "w1", "response": "w2", "reward": 10**400}, "row 2: reward 1000"),
        ({"prompt": "", "response": "w2"}, "row 2: an empty prompt"),
        ({"prompt": "w1", "response_token_ids": [999]}, "row 2: response_token_ids"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "w1", "response": "w2"}, row])
    with pytest.raises(InputError, match=message):
        Domain.from_jsonl(file, tokenizer=tokenizer())


def test_broken_and_empty_files(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "w1", "response": "w2"}\n{"prompt": \n')
    with pytest.raises(InputError, match=r"row 2.*not JSON"):
        Domain.from_jsonl(tmp_path / "broken.jsonl", tokenizer=tokenizer())
    text = '\ufeff{"prompt": "w1", "response": "w2\u2028w3"}\n{"prompt": "w1", "response": "w2"}\n'
    (tmp_path / "odd.jsonl").write_text(text)
    assert len(Domain.from_jsonl(tmp_path / "odd.jsonl", tokenizer=tokenizer()).sequences) == 2
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="empty"):
        Domain.from_jsonl(tmp_path / "empty.jsonl", tokenizer=tokenizer())
    with pytest.raises(InputError, match="cannot be read"):
        Domain.from_jsonl(tmp_path / "missing.jsonl", tokenizer=tokenizer())


def test_rewards_are_required_where_they_are_used() -> None:
    domain = Domain.from_rows(rows(0, rewards=False), tokenizer=tokenizer(), name="d")
    with pytest.raises(InputError, match="without a reward"):
        domain.rewards()
