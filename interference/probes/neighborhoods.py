"""Policy neighborhoods: how far policies are from one another on each domain's prompts, with error bars.

From responses y ~ pi_E(. | x), with rho_t = pi_M(y_t | x, y_<t) / pi_E(y_t | x, y_<t), estimators of KL(pi_E || pi_M):

    k1             sum_t -log rho_t
    k3             sum_t (rho_t - 1 - log rho_t)        never negative; the same mean, since E[rho_t | y_<t] = 1; less variance
    k3_trajectory  rho - 1 - log rho, rho = prod_t rho_t, the ratio of whole responses; heavy-tailed for long ones
    exact          sum_t KL(pi_E(. | x, y_<t) || pi_M(. | x, y_<t)), summed over the vocabulary

per "sequence": the mean over prompts of a prompt's mean over its responses; per "token": that mean over the like mean of the
length, the ratio of the two. (k1 as in arXiv 2602.12566; k3 from Schulman, "Approximating KL divergence", 2020.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from interference import statistics
from interference.domain import Domain
from interference.errors import InputError, nearest
from interference.measurement import reward_change
from interference.probes.scored import Trajectories

Array = NDArray[np.float64]
ESTIMATORS = ("k1", "k3", "k3_trajectory", "exact")
PER = ("token", "sequence")
_COLUMNS = (
    "policy",
    "reference",
    "domain",
    "estimator",
    "per",
    "value",
    "stderr",
    "low",
    "high",
    "prompts",
    "sequences",
)


def k1(policy: Array, reference: Array) -> Array:
    """-log rho per token: unbiased, of either sign."""
    return policy - reference


def k3(policy: Array, reference: Array) -> Array:
    """rho - 1 - log rho per token, at least 0.

    >>> float(k3(np.array([-1.0]), np.array([-1.0]))[0])
    0.0
    """
    log_ratio = reference - policy
    return np.maximum(np.expm1(log_ratio) - log_ratio, 0.0)  # rounding alone could go below 0


def kl_matrix(
    trajectories: Iterable[Trajectories],
    references: Sequence[str] | None = None,
    *,
    estimators: Sequence[str] = ("k1", "k3", "exact"),
    interval: str = "t",
    seed: int = 0,
) -> pd.DataFrame:
    """KL(policy || reference) on each domain's prompts, one row per policy, reference, domain, estimator and unit.

    Args:
        trajectories: responses of each policy on each domain.
        references: models to compare with; all that scored the responses unless given.
        estimators: of ESTIMATORS; "exact" is left out where the trajectories have no exact divergences.
        interval: "t" (Student's t over prompts, the ratio per token linearised) or "bootstrap" (percentiles over prompts).

    Returns:
        policy, reference, domain, estimator, per, value (nats), stderr, low, high (90 %), prompts, sequences. With a single
        prompt stderr, low and high are NaN.

    Raises:
        InputError: an unknown estimator, interval or reference.
    """
    for word, known in [*((e, ESTIMATORS) for e in estimators), (interval, ("t", "bootstrap"))]:
        if word not in known:
            raise InputError(got=f"{word!r}", expected="one of " + ", ".join(known), remedy=nearest(word, known))
    rows = []
    for t in trajectories:
        for reference in references if references is not None else [m for m in t.logps if m != t.policy]:
            for estimator in estimators:
                if estimator == "exact" and reference not in t.exact:
                    continue
                ids, sums = prompt_means(t, reference, estimator)
                for per in PER:
                    rows.append(
                        {"policy": t.policy, "reference": reference, "domain": t.domain, "estimator": estimator}
                        | {"per": per, **_estimate(sums, per, ids, interval, seed)}
                        | {"prompts": len(ids), "sequences": len(t.prompt_ids)}
                    )
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def prompt_means(t: Trajectories, reference: str, estimator: str) -> tuple[list[str], Array]:
    """Prompts, and per prompt (P, 2) the mean over its responses of the summed divergence and of the length."""
    if reference not in t.logps:
        raise InputError(
            got=f"reference {reference!r}, which did not score the responses of {t.policy!r} on {t.domain!r}",
            expected="log-probabilities under every reference",
            remedy=nearest(reference, t.logps),
        )
    if estimator == "exact":
        if reference not in t.exact:
            raise InputError(
                got=f"no exact divergences of {t.policy!r} from {reference!r} on {t.domain!r}",
                expected="divergences summed over the vocabulary",
                remedy="score with the models at hand (exact=True), or use k3",
            )
        total = [float(x.sum()) for x in t.exact[reference]]
    else:
        form = k1 if estimator == "k1" else k3
        whole = estimator == "k3_trajectory"
        pairs = zip(t.logps[t.policy], t.logps[reference], strict=True)
        total = [float(np.sum(form(a.sum(), b.sum()) if whole else form(a, b))) for a, b in pairs]
    count = np.ones(len(total))
    ids, sums = statistics.group_sums(np.stack([total, np.asarray(t.lengths, float), count], axis=1), t.prompt_ids)
    return ids, sums[:, :2] / sums[:, 2:]


def _estimate(means: Array, per: str, ids: Sequence[str], interval: str, seed: int) -> dict[str, float]:
    """Mean over prompts of the first column, over that of the second where per token, with its 90 % interval."""
    over = means[:, 1] if per == "token" else np.ones(len(means))
    value = float(means[:, 0].sum() / over.sum())
    if interval == "bootstrap":
        replicates = statistics.ratio_replicates(means[:, 0], over, ids, seed)
        low, high = statistics.interval(replicates)
        return {"value": value, "stderr": float(statistics.stderr(replicates)), "low": low, "high": high}
    error = _stderr(means[:, 0] - value * over, float(over.mean()))
    half = _t(len(means)) * error
    return {"value": value, "stderr": error, "low": value - half, "high": value + half}


def _stderr(residual: Array, scale: float) -> float:
    """Standard error of a mean (or linearised ratio) over prompts; NaN for one prompt."""
    return float(residual.std(ddof=1) / len(residual) ** 0.5 / scale) if len(residual) > 1 else float("nan")


def _t(prompts: int) -> float:
    return float(stats.t.ppf(0.5 + statistics.LEVEL / 2, prompts - 1)) if prompts > 1 else float("nan")


def neighbors(
    trajectories: Iterable[Trajectories],
    reference: str,
    *,
    experts: Mapping[str, str] | None = None,
    eps: float | None = None,
    estimator: str = "k3",
    per: str = "token",
) -> pd.DataFrame:
    """The neighbor relation: B is a neighbor of A iff KL(pi_EB || reference) on A's prompts is below eps.

    Args:
        trajectories: of the experts, each on every domain's prompts.
        reference: the multi-task (or another) model.
        experts: {domain: its expert}; experts are named as their domains unless given.
        eps: threshold in nats; unless given, the one that arXiv 2602.12566 compares with: KL(pi_EA || reference) on the same
            prompts. Then the difference is paired over the prompts that both share, so that its error is smaller than
            that of either.

    Returns:
        domain (A), expert (of B), kl, eps, difference (kl - eps), stderr, low, high (90 %, by t over prompts), neighbor,
        certain (the interval excludes 0: no matter of sampling noise), prompts.

    Raises:
        InputError: a domain without its own expert's responses where eps needs them, or no prompt in common.
    """
    if per not in PER or not (eps is None or eps > 0):
        raise InputError(
            got=f"per {per!r}, eps {eps}",
            expected="per 'token' or 'sequence', and a positive eps or None",
            remedy="leave both at their defaults",
        )
    found = {(t.policy, t.domain): t for t in trajectories}
    own = dict(experts) if experts is not None else {d: d for _, d in found}
    rows = []
    for (policy, domain), t in found.items():
        if policy not in own.values() or own.get(domain) == policy:
            continue
        kl, each = _divergence(t, reference, estimator, per)
        threshold, residual = eps, np.array(list(each.values()))
        if eps is None:
            threshold, other = _divergence(_of_own(found, own, domain), reference, estimator, per)
            residual = _paired(each, other, policy, domain)
        assert threshold is not None
        difference, error = kl - threshold, _stderr(residual, 1.0)
        half = _t(len(residual)) * error
        rows.append(
            {"domain": domain, "expert": policy, "kl": kl, "eps": threshold, "difference": difference, "stderr": error}
            | {"low": difference - half, "high": difference + half, "neighbor": difference < 0}
            | {"certain": bool(abs(difference) > half), "prompts": len(residual)}
        )
    return pd.DataFrame(rows)


def _divergence(t: Trajectories, reference: str, estimator: str, per: str) -> tuple[float, dict[str, float]]:
    """KL of a policy from the reference, and its linearised residual of every prompt, whose mean is 0."""
    ids, means = prompt_means(t, reference, estimator)
    unit = means[:, 1] if per == "token" else np.ones(len(means))
    kl = float(means[:, 0].sum() / unit.sum())
    return kl, dict(zip(ids, ((means[:, 0] - kl * unit) / unit.mean()).tolist(), strict=True))


def _of_own(found: Mapping[tuple[str, str], Trajectories], own: Mapping[str, str], domain: str) -> Trajectories:
    mine = found.get((own.get(domain, ""), domain))
    if mine is None:
        raise InputError(
            got=f"no responses of the expert of {domain!r} on its own prompts",
            expected="them, since eps is that expert's own divergence from the reference",
            remedy="add them, name the domain's expert in `experts`, or give eps",
        )
    return mine


def _paired(one: dict[str, float], two: dict[str, float], policy: str, domain: str) -> Array:
    if set(one) != set(two):
        raise InputError(
            got=f"{policy!r} and the own expert of {domain!r} sampled on different prompts",
            expected="the same prompts (prompt_id), so that their divergences are paired",
            remedy="sample both on the same prompts, or give eps",
        )
    return np.array([one[i] - two[i] for i in one])


def with_performance(
    matrix: pd.DataFrame, rewards: Mapping[tuple[str, str], Domain], *, base: str = "base", seed: int = 0
) -> pd.DataFrame:
    """The KL matrix beside each policy's change of mean reward from the base on the same domain.

    Args:
        matrix: of `kl_matrix`.
        rewards: {(model, domain): rewarded rollouts}, the base's among them.

    Returns:
        The matrix with change, change_stderr, change_low, change_high (90 %, bootstrap over prompts); NaN where one of the
        two has no rewards.
    """
    changes = {}
    for policy, domain in dict.fromkeys(zip(matrix["policy"], matrix["domain"], strict=True)):
        before, after = rewards.get((base, domain)), rewards.get((policy, domain))
        if before is None or after is None:
            continue
        change = reward_change(before, after, seed)
        changes[policy, domain] = change.delta, change.stderr, *statistics.interval(change.replicates)
    nothing = (float("nan"),) * 4
    found = [changes.get(key, nothing) for key in zip(matrix["policy"], matrix["domain"], strict=True)]
    names = ["change", "change_stderr", "change_low", "change_high"]
    return matrix.assign(**{name: [f[k] for f in found] for k, name in enumerate(names)})
