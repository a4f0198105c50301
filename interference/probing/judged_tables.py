"""The tables of judging: how well models tell right from wrong, how early, and whether they see where it went wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd

from interference.probes.locus_agreement import locus_scores
from interference.probes.verdicts import Judged
from interference.probes.verification import JudgeScores, difference, score
from interference.probing import judging, stages
from interference.probing.stages import Work
from interference.records import PROBES

Tables = dict[str, pd.DataFrame]


def verification(work: Work) -> Tables:
    """How well every model judges its own responses, in each mode, against the base and mode against mode; the horizon."""
    modes = [str(mode) for mode in work.config.judge.modes]
    found: dict[tuple[str, str, str], JudgeScores] = {}
    scores, verdicts, horizons = [], [], []
    for model in work.config.names:
        for domain in work.domains:
            for mode in modes:
                found[model, domain, mode], table, rows = _judged(work, model, domain, mode)
                scores.append(table)
                verdicts.append(rows)
            judged_here = (model, domain, "process") not in work.inputs.verdicts
            if "process" in modes and work.config.horizon and judged_here:
                horizons.append(judging.horizon_of(work, model, domain))
    changes = []
    for (model, domain, mode), after in found.items():
        if model != "base":
            labels = {"comparison": "model - base", "model": model, "domain": domain, "mode": mode}
            changes.append(difference(found["base", domain, mode], after, **labels))
    if set(modes) == {"outcome", "process"}:
        for model in work.config.names:
            for domain in work.domains:
                labels = {"comparison": "process - outcome", "model": model, "domain": domain, "mode": "both"}
                changes.append(difference(found[model, domain, "outcome"], found[model, domain, "process"], **labels))
    tables = {"verification": scores, "verification_changes": changes, "verdicts": verdicts, "horizon": horizons}
    return {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items() if parts}


def _judged(work: Work, model: str, domain: str, mode: str) -> tuple[JudgeScores, pd.DataFrame, pd.DataFrame]:
    """Scores of a model's verdicts on its own responses, the same as a table, and the verdicts one by one."""
    responses, verdicts = stages.responses(work, model, domain).domain, judging.verdicts(work, model, domain, mode)
    labels = {"model": model, "domain": domain, "mode": mode}
    rewards = responses.rewards()
    judged = Judged(tuple(responses.prompt_ids), tuple(rewards), tuple(verdicts))
    scores = score(judged, threshold=work.config.judge.threshold, seed=work.config.seed)
    columns = {name: [getattr(v, name) for v in verdicts] for name in ("yes", "score", "probability", "log_mass")}
    rows = pd.DataFrame({**labels, "prompt_id": responses.prompt_ids, "reward": rewards, **columns})
    rows.insert(4, "index", rows.groupby("prompt_id").cumcount())
    return scores, scores.table(**labels).assign(mass=float(np.exp(rows["log_mass"]).mean())), rows


def locus(work: Work) -> Tables:
    """From which step on every model holds wrong responses for wrong, against the step where they went wrong."""
    found, agreement = [], []
    for model in work.config.names:
        for domain in work.domains:
            rows = judging.locus_of(work, model, domain)
            found.append(rows)
            known = rows[rows["step"].notna()]
            if len(known):
                labels = {"model": model, "domain": domain, "source": known["source"].iloc[0]}
                agreement.append(_agreement(known, work.config.seed).assign(**labels))
    tables = {"locus": found, "locus_agreement": agreement}
    return {name: _joined(name, parts) for name, parts in tables.items()}


def _agreement(known: pd.DataFrame, seed: int) -> pd.DataFrame:
    """`locus_scores` of trajectories whose true step is known."""
    steps = [None if np.isnan(step) else int(step) for step in known["locus"]]
    truth, sizes = known["step"].astype(int).tolist(), known["steps"].astype(int).tolist()
    return locus_scores(steps, truth, sizes, known["prompt_id"].tolist(), seed)


def _joined(name: str, parts: list[pd.DataFrame]) -> pd.DataFrame:
    kept = [part for part in parts if len(part)]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame(columns=list(PROBES[name]))
