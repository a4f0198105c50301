"""RUN.yaml of `interference forecast`: how training would go on which domains, and what to forecast of it by which tiers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from interference.config import LocalPath, ModelPath, Sampling, Strict, check_names, check_verifiable, read_request
from interference.errors import nearest
from interference.forecast_run.asked_plans import Mixtures, Orders, Plans, check_alike, mixtures_of, orders_of
from interference.forecasting.estimation import Tier
from interference.forecasting.training import Training

Objective = Literal["reward", "nll"]
TIERS: tuple[Tier, ...] = get_args(Tier)
"""Cheapest first."""


class ForecastDomain(Strict):
    """A domain that would be trained on: `data`, rollouts of the base with rewards, or `prompts` to sample them here and a
    `verifier` ("module:function", TRL's reward-function signature).  training: what is other there than in the request's."""

    name: str = Field(min_length=1)
    data: LocalPath | None = None
    prompts: LocalPath | None = None
    verifier: str | None = None
    training: dict[str, Any] = Field({})

    @model_validator(mode="after")
    def _one_source(self) -> ForecastDomain:
        check_verifiable(self.prompts, self.verifier)
        if (self.data is None) == (self.prompts is None):
            raise ValueError("give either `data` (rollouts with rewards) or `prompts` and a `verifier`")
        return self


class Evaluated(Strict):
    """Sequences that an objective is forecast on: one file for every objective, or {objective: file}."""

    name: str = Field(min_length=1)
    data: LocalPath | dict[Objective, LocalPath]

    def path(self, objective: str) -> str | None:
        """The file for an objective, if there is one."""
        return self.data if isinstance(self.data, str) else self.data.get(objective)  # type: ignore[call-overload]


class PilotEntry(Strict):
    """A checkpoint of a short real training on a domain, after `steps` optimizer steps."""

    domain: str
    model: ModelPath
    steps: int = Field(ge=1)


class ForecastConfig(Strict):
    """A whole RUN.yaml of `interference forecast`. Paths are absolute after `load_config`.

    effort: {tier: responses whose gradients are computed, as a share of those that training would generate}; a number is of
    all tiers.  renew: sample new rollouts of domains with a verifier where virtual training has used up the base's, and moved
    policies where importance weights fail.  expanded: prompts of each domain that quadratic models are made on, 0 for none;
    pairs: along several updates at once, too.  plans: mixtures and orders of the trainings to compare, by virtual training.
    """

    base_model: ModelPath
    domains: list[ForecastDomain] = Field(min_length=1)
    training: Training
    tier: list[Tier] = Field(["virtual"], min_length=1)
    pilots: list[PilotEntry] = Field([])
    objective: list[Objective] = Field(["reward"], min_length=1)
    evaluation: list[Evaluated] = Field([])
    sampling: Sampling = Sampling()
    effort: dict[Tier, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field({})
    expanded: int = Field(64, ge=0)
    pairs: bool = False
    renew: bool = False
    plans: Plans | None = None
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    seed: int = Field(0, ge=0)
    limit: int | None = Field(512, ge=2)
    batch_tokens: int = Field(16384, ge=1)
    output: LocalPath

    @field_validator("tier", "objective", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("effort", mode="before")
    @classmethod
    def _of_all_tiers(cls, value: Any) -> Any:
        return dict.fromkeys(TIERS, value) if isinstance(value, (int, float)) else value

    def planned(self, domain: str) -> Training:
        """How the training on a domain would go."""
        entry = next(d for d in self.domains if d.name == domain)
        return _changed(self.training, entry)

    def evaluated(self, objective: str) -> dict[str, str]:
        """{name: file} of the sequences that an objective is forecast on; none where it is on the domains' own rollouts."""
        return {e.name: path for e in self.evaluation if (path := e.path(objective)) is not None}

    @property
    def mixtures(self) -> Mixtures:
        """The mixtures that plans ask for."""
        return mixtures_of(self.plans, [d.name for d in self.domains])

    @property
    def orders(self) -> Orders:
        """The orders that plans ask for."""
        return orders_of(self.plans, [d.name for d in self.domains])

    @model_validator(mode="after")
    def _consistent(self) -> ForecastConfig:
        names = [d.name for d in self.domains]
        check_names([], names)
        check_names([], [e.name for e in self.evaluation], "evaluation")
        for what, several in (("tier", self.tier), ("objective", self.objective)):
            if len(set(several)) != len(several):
                raise ValueError(f"{what}: give one, or a list of different ones")
        for entry in self.domains:
            _changed(self.training, entry)
            if entry.prompts and self.sampling.samples < 2:
                raise ValueError(
                    "sampling.samples: 1 for each prompt, where training compares several responses to one prompt"
                )
        if "nll" in self.objective and not self.evaluated("nll"):
            raise ValueError(
                "objective nll: it needs `evaluation`, sequences whose likelihood matters, such as reference answers"
            )
        self._check_pilots(names)
        if self.plans and "reward" not in self.objective:
            raise ValueError("plans compare expected rewards: add reward to `objective`, or leave `plans` out")
        check_alike(self.mixtures, {name: self.planned(name) for name in names})
        _ = self.orders
        return self

    def _check_pilots(self, names: list[str]) -> None:
        given = [p.domain for p in self.pilots]
        if self.pilots and "pilot" not in self.tier:
            raise ValueError("pilots are read by the tier pilot, which is not among the tiers")
        for name in given:
            if name not in names:
                raise ValueError(f"pilots: unknown domain {name!r} ({nearest(name, names)})")
            if given.count(name) > 1:
                raise ValueError(f"pilots: domain {name!r} occurs twice")
        for name in names if "pilot" in self.tier else ():
            if name not in given:
                raise ValueError(f"tier pilot: domain {name!r} has no checkpoint of a short training in `pilots`")
        for entry in self.pilots:
            steps = self.planned(entry.domain).steps
            if entry.steps >= steps:
                raise ValueError(
                    f"pilots: {entry.steps} steps on {entry.domain!r}, where the training that is forecast has {steps}; "
                    "give a checkpoint from before its end"
                )


def _changed(training: Training, entry: ForecastDomain) -> Training:
    """A domain's own training; ValueError for an unknown key or a wrong value in what it changes."""
    where = f"domains: training of {entry.name!r}"
    for key in entry.training:
        if key not in Training.model_fields:
            raise ValueError(f"{where}: unknown key {key!r} ({nearest(key, Training.model_fields)})")
    try:
        return Training.model_validate(training.model_dump() | entry.training)
    except ValidationError as error:
        first = error.errors()[0]
        place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {place}{': ' * bool(place)}{message}") from error


def load_config(path: str | Path) -> ForecastConfig:
    """Read and validate the RUN.yaml of a forecast; relative paths are taken from its folder.

    Raises InputError for an unreadable file, an unknown key (with the nearest known one), a missing key, a wrong value.
    """
    return read_request(path, ForecastConfig, "base_model, domains, training, output")
