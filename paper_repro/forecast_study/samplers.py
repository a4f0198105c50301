"""Fresh rollouts for forecasts that have used theirs up: a domain's prompts and verifier, on the model as it is at the time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from interference import Domain
from interference.rollouts import sample
from paper_repro.forecast_study.work import Work
from paper_repro.lab.data import prompt_rows, rewarded
from paper_repro.lab.worlds import world_of


def sampler(work: Work, domain: str) -> Callable[[Sequence[str], int], Domain]:
    """What samples one response of `work.model` for every prompt id given (training or held-out), with rewards."""
    config = work.setup.config
    rows = {row["prompt_id"]: row for heldout in (False, True) for row in prompt_rows(config, domain, heldout=heldout)}
    tokenizer = work.base.tokenizer()

    def resample(prompt_ids: Sequence[str], seed: int) -> Domain:
        asked = [rows[prompt_id] for prompt_id in prompt_ids]
        found = sample(
            work.model.module, tokenizer, [row["prompt"] for row in asked], samples=1,
            max_new_tokens=config.max_new_tokens, batch_size=512, seed=seed,
        )  # fmt: skip
        answered = [
            {
                **row,
                "response": rollout.response,
                "eos": rollout.eos,
                "prompt_token_ids": list(rollout.prompt_token_ids),
                "response_token_ids": list(rollout.response_token_ids),
            }
            for row, rollout in zip(asked, found, strict=True)
        ]
        rewards = rewarded(world_of(config), domain, answered)
        final = [{**row, "reward": reward} for row, reward in zip(answered, rewards, strict=True)]
        return Domain.from_rows(final, tokenizer=tokenizer, name=domain)

    return resample
