"""The tables of a probe, by the probe that makes them. A further probe is a further entry of `PROBE_TABLES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

import numpy as np
import pandas as pd

from interference import measurement, statistics
from interference.domain import Domain
from interference.probes.neighborhoods import kl_matrix, neighbors, with_performance
from interference.probes.samples import ItemRewards, success_rates
from interference.probes.skills import Skills
from interference.probing import judged_tables, stages
from interference.probing.routing import route_tables
from interference.probing.stages import Work
from interference.records import PROBES

Tables = dict[str, pd.DataFrame]


def all_tables(work: Work) -> Tables:
    """Every table that the request asks for, with the columns of `records.PROBES`."""
    for model in work.config.names:  # a model at a time, since it is loaded for that
        for domain in work.config.answered:
            answers = stages.responses(work, model, domain)
            if "skills" in work.config.probes:
                ItemRewards.of({model: answers.domain})  # a reward outside [0, 1] is refused before more is sampled
    found = {"performance": performance(work)}
    for probe in work.config.probes:
        found |= PROBE_TABLES[probe](work)
    return {name: _with_columns(name, table) for name, table in found.items()}


def performance(work: Work) -> pd.DataFrame:
    """Mean reward of every model on every domain, and its change from the base's; no rows where there are no rewards."""
    rows = []
    for domain in work.config.answered:
        before = stages.responses(work, "base", domain)
        for model in work.config.names:
            after = stages.responses(work, model, domain)
            if not (before.rewarded and after.rewarded):
                continue
            change = measurement.reward_change(before.domain, after.domain, work.config.seed)
            reward = np.asarray(after.domain.rewards())
            ids, sums = statistics.group_sums(np.stack([reward, np.ones_like(reward)], 1), after.domain.prompt_ids)
            drawn = statistics.ratio_replicates(sums[:, 0] / sums[:, 1], np.ones(len(ids)), ids, work.config.seed)
            row = {"model": model, "domain": domain, "value": change.after, "stderr": float(statistics.stderr(drawn))}
            row |= _ends("", drawn) | {"prompts": len(ids), "sequences": len(reward)}
            if model != "base":
                row |= {"change": change.delta} | _ends("change_", change.replicates)
            rows.append(row)
    return pd.DataFrame(rows)


def neighborhoods(work: Work) -> Tables:
    """Divergences of every policy from every other model on every domain, and whose experts are neighbors."""
    config, names = work.config, work.config.names
    todo = [(p, d) for p in names for d in work.domains if (p, d) not in work.inputs.scored]
    for model in names:
        for policy, domain in todo:
            stages.log_probabilities(work, model, policy, domain)
    pairs = [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]] if config.neighborhoods.exact else []
    for a, b in pairs:  # both directions of a pair while both are in memory
        for policy, reference in ((a, b), (b, a)):
            for domain in work.domains:
                if (policy, domain) in todo:
                    stages.divergence(work, policy, reference, domain)
    found = {(p, d): stages.scored(work, p, d) for p in names for d in work.domains}
    rewards: dict[tuple[str, str], Domain] = {
        key: stages.responses(work, *key).domain for key in found if stages.responses(work, *key).rewarded
    }
    matrix = with_performance(kl_matrix(found.values(), seed=config.seed), rewards, seed=config.seed)
    mine = [t for (policy, domain), t in found.items() if policy in config.experts and domain in config.experts]
    parts = [
        neighbors(mine, reference, experts={e: e for e in config.experts}, eps=config.neighborhoods.eps).assign(
            reference=reference
        )
        for reference in config.others
        if len(config.experts) > 1
    ]
    relation = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(PROBES["neighbors"]))
    changes = ["change", "change_low", "change_high"]
    known = matrix.drop_duplicates(["policy", "domain"])[["policy", "domain", *changes]]
    relation = relation.drop(columns=changes, errors="ignore")
    relation = relation.merge(known.rename(columns={"policy": "expert"}), on=["expert", "domain"], how="left")
    return {"kl": matrix, "neighbors": relation, "kl_forecast": kl_forecast(work)}


def kl_forecast(work: Work) -> pd.DataFrame:
    """KL(base || tuned) on the base's own responses, forecast from the update by the jets, beside the measured one."""
    parts = [stages.forecast(work, model) for model in work.config.forecast_models]
    if not parts:
        return pd.DataFrame(columns=list(PROBES["kl_forecast"]))
    found = pd.concat(parts, ignore_index=True).assign(policy="base")
    names = {"update": "reference", "forecast_stderr": "stderr", "measured_low": "low", "measured_high": "high"}
    found = found.rename(columns=names)
    return found.drop(columns=[c for c in found if c not in PROBES["kl_forecast"]])


def skill_tables(work: Work) -> Tables:
    """Skills of every domain's items."""
    parts: dict[str, list[pd.DataFrame]] = {f.name: [] for f in fields(Skills)}
    for domain in work.domains:
        found = stages.skills_of(work, domain)
        for name in ("gains", "consistency", "shared"):
            parts[name].append(getattr(found, name).assign(domain=domain))
        rates = stages.item_rewards(work, domain).rewards
        for model in ("base", *work.config.experts, *work.config.others, "union"):
            table = pd.DataFrame({"item": found.items["item"], "domain": domain, "model": model})
            table["rate"] = success_rates(rates[model]) if model in rates else np.nan
            table["gain"] = found.items[model] if model != "base" else np.nan
            parts["items"].append(table)
    return {name: pd.concat(several, ignore_index=True) for name, several in parts.items()}


PROBE_TABLES: Mapping[str, Callable[[Work], Tables]] = {
    "neighborhoods": neighborhoods,
    "routes": route_tables,
    "skills": skill_tables,
    "self_verification": judged_tables.verification,
    "locus": judged_tables.locus,
}
"""What makes the tables of each probe of the request (`config.ProbeName`)."""


def _ends(prefix: str, replicates: statistics.Array) -> dict[str, float]:
    low, high = statistics.interval(replicates)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _with_columns(name: str, table: pd.DataFrame) -> pd.DataFrame:
    """The columns of a table in their order; one that it does not have is empty, one that is not declared an error."""
    odd = set(table.columns) - set(PROBES[name])
    assert not odd, f"table {name!r} with undeclared columns {sorted(odd)}"
    return table.reindex(columns=list(PROBES[name]))
