"""Responses of one policy on one domain's prompts, with token log-probabilities under it and others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from interference.domain import Domain, prompt_key, read_jsonl
from interference.errors import InputError, nearest
from interference.model import Model
from interference.probes.log_probabilities import PerToken, state_divergences, token_log_probabilities


@dataclass(frozen=True)
class Trajectories:
    """Responses y ~ policy(. | x) at temperature 1 to a domain's prompts.

    prompt_ids: one per response. logps[model]: log-probabilities of the response tokens, one array (T,) per response; holds
    the policy itself. exact[reference]: KL(policy || reference) at every visited state, where the models were at hand.

    Raises InputError for log-probabilities that are positive, not finite, or not of one length per response.
    """

    policy: str
    domain: str
    prompt_ids: tuple[str, ...]
    logps: Mapping[str, PerToken]
    exact: Mapping[str, PerToken] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy not in self.logps or not self.prompt_ids:
            raise InputError(
                got=f"{len(self.prompt_ids)} responses on {self.domain!r} with log-probabilities under {sorted(self.logps)}",
                expected=f"responses with log-probabilities under the policy that gave them, {self.policy!r}",
                remedy=f"add them; {nearest(self.policy, self.logps)}",
            )
        lengths = [len(x) for x in self.logps[self.policy]]
        for name, values in [*self.logps.items(), *self.exact.items()]:
            if [len(x) for x in values] != lengths or len(values) != len(self.prompt_ids) or 0 in lengths:
                raise InputError(
                    got=f"{name!r} on {self.domain!r}: token values that do not fit the {len(self.prompt_ids)} responses",
                    expected="one number per response token, the same tokens for every model",
                    remedy="score the very same token ids under every model",
                )
        for name, values in self.logps.items():
            flat = np.concatenate(values)
            if not np.isfinite(flat).all() or flat.max() > 1e-4:
                raise InputError(
                    got=f"log-probabilities under {name!r} on {self.domain!r} from {flat.min():g} to {flat.max():g}",
                    expected="finite natural logarithms of probabilities",
                    remedy="give log-probabilities of whole distributions (no top-k, no top-p), in nats",
                )

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(x) for x in self.logps[self.policy])


def score_trajectories(
    models: Mapping[str, Model],
    policy: str,
    domain: Domain,
    *,
    exact: bool = True,
    cache: str | os.PathLike[str] | None = None,
    batch_tokens: int = 16384,
) -> Trajectories:
    """Score the responses of `domain`, which `policy` gave, under every model, and their exact divergences from it.

    Args:
        models: {name: Model}, the policy among them.
        domain: responses sampled from the policy at temperature 1; a response to one prompt_id counts within its prompt.
        exact: also the divergence at every state, by sums over the vocabulary.
        cache: a folder that keeps what was computed.

    Raises:
        InputError: a policy that is none of the models, and what `token_log_probabilities` raises.
    """
    if policy not in models:
        raise InputError(got=f"policy {policy!r}", expected="one of the models", remedy=nearest(policy, models))
    logps = {
        name: token_log_probabilities(model, domain, cache=cache, batch_tokens=batch_tokens)
        for name, model in models.items()
    }
    divergences = {
        name: state_divergences(models[policy], model, domain, cache=cache, batch_tokens=batch_tokens)
        for name, model in models.items()
        if exact and name != policy
    }
    return Trajectories(policy, domain.name, tuple(domain.prompt_ids), logps, divergences)


def read_scored(path: str | os.PathLike[str], *, policy: str, domain: str) -> Trajectories:
    """Read scored responses from JSONL rows {prompt, prompt_id?, response, logps: {model: [one per token]}}.

    So that another server can have sampled and scored them.

    Raises:
        InputError: a row without logps, with other models than the first row has, or with values that are no numbers.
    """
    return scored_from_rows(read_jsonl(path), policy=policy, domain=domain, source=str(path))


def scored_from_rows(
    rows: Iterable[Mapping[str, Any]], *, policy: str, domain: str, source: str = "rows"
) -> Trajectories:
    """The same from dictionaries in memory."""
    prompt_ids, logps = [], dict[str, list[Any]]()
    for number, row in enumerate(rows, start=1):
        where, given = f"{source}, row {number}", row.get("logps")
        if not isinstance(given, Mapping) or (logps and set(given) != set(logps)):
            raise InputError(
                got=f"{where}: logps " + (f"of {sorted(given)}" if isinstance(given, Mapping) else repr(given)),
                expected=f"`logps` of {sorted(logps)}" if logps else "`logps`: {model: [one per response token]}",
                remedy="score every response under the same models",
            )
        for name, values in given.items():
            logps.setdefault(name, []).append(_numbers(values, f"{where}: logps of {name!r}"))
        prompt_ids.append(prompt_key(row, str(row.get("prompt", row.get("messages")))))
    return Trajectories(policy, domain, tuple(prompt_ids), {name: tuple(v) for name, v in logps.items()})


def _numbers(values: object, where: str) -> Any:
    if isinstance(values, list) and values and all(isinstance(v, (int, float)) for v in values):
        return np.asarray(values, dtype=np.float64)
    raise InputError(got=f"{where}: {str(values)[:60]}", expected="a list of numbers", remedy="mend the row")
