"""Fresh rollouts of the model as it is at the time, for virtual trainings that have used up theirs."""

from __future__ import annotations

from collections.abc import Sequence

from interference.config import Sampling
from interference.domain import Domain
from interference.domain import Sequence as Row
from interference.forecasting.frozen import Resample
from interference.inputs import Prompts
from interference.model import Model
from interference.rollouts import sample


def sampler(model: Model, tokenizer: object, name: str, prompts: Prompts, settings: Sampling) -> Resample:
    """What samples and rewards a response of `model` to every prompt of a domain that is named, by its id."""
    place = {prompt_id: i for i, prompt_id in enumerate(prompts.prompt_ids)}

    def fresh(prompt_ids: Sequence[str], seed: int) -> Domain:
        places = [place[p] for p in prompt_ids]
        found = sample(
            model.module, tokenizer, [prompts.ids[i] for i in places], samples=1,
            max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, seed=seed,
        )  # fmt: skip
        asked = [places[r.prompt_index] for r in found]
        rewards = prompts.rewards(asked, [r.response for r in found])
        rows = zip(found, asked, rewards, strict=True)
        return Domain(
            name,
            tuple(Row(r.prompt_token_ids, r.response_token_ids, prompts.prompt_ids[i], x) for r, i, x in rows),
        )

    return fresh
