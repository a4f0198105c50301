"""Prompts whose responses are all rewarded alike are evaluated in part; nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from interference.domain import Domain, Sequence
from interference.forecasting.outcomes import LEAST_SILENT, moved_reward, telling
from interference.statistics import effective_sample_size


def rollouts(prompts: int = 240, responses: int = 4) -> Domain:
    """Two thirds of the prompts are never solved, or always; a reward of the others is drawn."""
    rng = np.random.default_rng(0)
    rows = []
    for p in range(prompts):
        reward = rng.integers(0, 2, responses) if p % 3 == 0 else np.full(responses, int(p % 6 == 1))
        rows += [Sequence((1, 2), (3, r), f"p{p}", float(x)) for r, x in enumerate(reward)]
    return Domain("d", tuple(rows))


def log_ratios(of: Domain, scale: float = 0.5) -> np.ndarray:
    """One of each sequence, wherever it stands."""
    return np.array([scale * np.random.default_rng(hash_of(s)).normal() - scale**2 / 2 for s in of.sequences])


def hash_of(row: Sequence) -> int:
    return int(row.prompt_id[1:]) * 10 + row.response[1]


def test_all_that_differ_and_a_share_of_the_others() -> None:
    domain = rollouts()
    found = telling("reward", domain)
    reward = {p: {s.reward for s in domain.sequences if s.prompt_id == p} for p in domain.prompt_ids}
    kept = set(found.domain.prompt_ids)
    assert {p for p in reward if len(reward[p]) > 1} <= kept
    silent = [p for p in reward if len(reward[p]) == 1]
    assert len([p for p in silent if p in kept]) == round(0.25 * len(silent))
    assert found.stands.sum() == pytest.approx(len(domain.sequences))
    assert telling("nll", domain).domain is domain


def test_parts_are_whole_by_themselves() -> None:
    domain = rollouts()
    parts = {p: int(p[1:]) < 90 for p in domain.prompt_ids}
    found = telling("reward", domain, parts)
    for part in (True, False):
        places = [i for i, p in enumerate(found.domain.prompt_ids) if parts[p] == part]
        whole = sum(parts[p] == part for p in domain.prompt_ids)
        assert found.take(places).stands.sum() == pytest.approx(whole)


def test_few_silent_prompts_are_all_kept() -> None:
    domain = rollouts(prompts=LEAST_SILENT)
    assert len(telling("reward", domain).domain.sequences) == len(domain.sequences)


def test_value_error_and_effective_share_are_those_of_all_sequences() -> None:
    """The numerator is exact; what is left is the error of the total weight, which multiplies a small number."""
    domain = rollouts()
    every, some = telling("reward", domain, silent_share=1.0), telling("reward", domain)
    log = log_ratios(domain)
    whole, part = moved_reward(every, log, 0), moved_reward(some, log_ratios(some.domain), 0)
    assert len(some.domain.sequences) < 0.6 * len(domain.sequences)
    assert part.value == pytest.approx(whole.value, rel=0.05)
    assert part.replicates.std() == pytest.approx(whole.replicates.std(), rel=0.1)
    assert whole.ess == pytest.approx(effective_sample_size(log) / len(log))
    assert part.ess == pytest.approx(whole.ess, abs=0.1)
    # A planted bug: forgetting that kept prompts stand for others makes every change larger.
    wrong = moved_reward(replace(some, stands=np.ones(len(some.stands))), log_ratios(some.domain), 0)
    assert abs(wrong.value / whole.value - 1) > 0.5


def test_a_single_response_is_compared_with_the_whole_domain() -> None:
    """Its baseline is the mean over the other prompts, whether these are evaluated or not."""
    lone = Sequence((9,), (3, 0), "p9999", 1.0)
    domain = Domain("d", (*rollouts().sequences, lone))
    found = telling("reward", domain)
    place = found.domain.prompt_ids.index("p9999")
    means: dict[str, list[float]] = {}
    for s in rollouts().sequences:
        means.setdefault(s.prompt_id, []).append(s.reward or 0.0)
    assert found.advantage is not None
    assert found.advantage[place] == pytest.approx(1 - np.mean([np.mean(m) for m in means.values()]))
