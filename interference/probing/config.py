"""RUN.yaml of `interference probe`: which models, on which domains, judged and sampled how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from interference.config import (
    LocalPath,
    Measurement,
    ModelPath,
    Sampling,
    Strict,
    check_files,
    check_names,
    check_verifiable,
    read_request,
)
from interference.errors import InputError, nearest
from interference.probes.trajectories import STEPS, pattern

Kind = Literal["expert", "multi", "merged"]
ProbeName = Literal["neighborhoods", "routes", "skills", "self_verification", "locus"]
Mode = Literal["outcome", "process"]
LEAST = {"base": 2, "expert": 3, "multi": 2, "merged": 2}
"""Samples of a prompt that skills need of a model, so that sampling noise can be told from skill."""


class ProbedModel(Strict):
    """A tuned model. An expert bears the name of the domain that it was trained on; "multi" was trained on several together,
    "merged" was made from experts. Without `model`, its weights are not at hand, and all that it did is in given rollouts."""

    name: str = Field(min_length=1)
    model: ModelPath | None = None
    kind: Kind


class ProbedDomain(Strict):
    """A domain: `prompts` to sample from and a `verifier` ("module:function", TRL's reward-function signature), or rollouts
    made elsewhere: in `data`, whose rows name who gave them in `model` ("base" unless they do), or in `rollouts`. `planted`:
    wrong responses with the step of their error in `error_step`, for the probe locus."""

    name: str = Field(min_length=1)
    data: LocalPath | None = None
    prompts: LocalPath | None = None
    verifier: str | None = None
    planted: LocalPath | None = None

    @model_validator(mode="after")
    def _both(self) -> ProbedDomain:
        check_verifiable(self.prompts, self.verifier)
        return self


class Neighborhoods(Strict):
    """`eps`: threshold of the neighbor relation in nats per token (unless given, the own expert's divergence); `exact`: also
    divergences summed over the vocabulary, which need two models in memory at once; `forecast`: also the jets' forecast of
    every tuned model's divergence from the base, beside the one measured."""

    eps: float | None = Field(None, gt=0)
    exact: bool = True
    forecast: bool = True


class GivenVerdicts(Strict):
    """Verdicts of a model on its own responses to a domain that were made elsewhere (`probes.given.match` has the rows)."""

    model: str
    domain: str
    mode: Mode
    data: LocalPath


class Locus(Strict):
    """Where responses go wrong. separator: what ends a step, a regular expression.  limit: wrong responses of a model on a
    domain.  samples: continuations of each of their prefixes, of at most `max_new_tokens` (those of `sampling` unless given),
    by which the step is estimated where the domain has no `planted` ones."""

    separator: str = STEPS
    limit: int = Field(64, ge=1)
    samples: int = Field(16, ge=2)
    max_new_tokens: int | None = Field(None, ge=1)

    @field_validator("separator")
    @classmethod
    def _expression(cls, value: str) -> str:
        try:
            pattern(value, "locus.separator")
        except InputError as error:
            raise ValueError(f"{error.expected} ({error.got})") from error
        return value


class Routes(Strict):
    """Active routes. variant: what makes a channel or head active (`probes.activity`). tops: shares that count as active.
    gradients: of which objective the domains' gradients at the base are compared, "reward" (the policy gradient) or "nll", whose
    gradient is zero in expectation on a model's own samples and so tells of given rollouts alone; null for none."""

    variant: Literal["magnitude", "gradient"] = "magnitude"
    tops: list[Annotated[float, Field(gt=0, le=1)]] = Field([0.05, 0.1, 0.2], min_length=1)
    gradients: Literal["reward", "nll"] | None = "reward"

    @model_validator(mode="after")
    def _distinct(self) -> Routes:
        if len(set(self.tops)) != len(self.tops):
            raise ValueError("routes.tops: give each share once")
        return self


class Judging(Strict):
    """How a model judges its own responses.

    templates: {mode: file}, text or .json messages; the built-in ones unless given, as a chat where `chat`.  answer: how the
    final answer is cut out (`trajectories.answer_extractor`).  yes, no: spellings of the verdict.  verdicts: log-odds of the
    next token, or `samples` sampled verdicts of up to `max_new_tokens`, found by the regular expression `pattern` if given.
    threshold: the reward from which on a response counts as correct.
    """

    modes: list[Mode] = Field(["outcome", "process"], min_length=1)
    templates: dict[Mode, LocalPath] = Field({})
    chat: bool = False
    answer: str = "last_line"
    yes: list[str] | None = Field(None, min_length=1)
    no: list[str] | None = Field(None, min_length=1)
    verdicts: Literal["log_odds", "sampled"] = "log_odds"
    samples: int = Field(1, ge=1)
    max_new_tokens: int = Field(16, ge=1)
    pattern: str | None = None
    threshold: float = Field(0.5, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _yes_and_no_of_yaml(cls, value: Any) -> Any:
        """YAML reads an unquoted yes or no as true or false: as a key it is meant as the word, in a list it must be quoted."""
        if not isinstance(value, dict):
            return value
        named = {
            {True: "yes", False: "no"}.get(key, key) if isinstance(key, bool) else key: v for key, v in value.items()
        }
        for key in ("yes", "no"):
            if isinstance(named.get(key), list) and any(isinstance(word, bool) for word in named[key]):
                raise ValueError(
                    f"judge.{key}: quote the words, since YAML reads an unquoted Yes or No as true or false"
                )
        return named

    @model_validator(mode="after")
    def _consistent(self) -> Judging:
        if len(set(self.modes)) != len(self.modes):
            raise ValueError("judge.modes: give each mode once")
        for mode in self.templates:
            if mode not in self.modes:
                raise ValueError(f"judge.templates: one for mode {mode!r}, which is not among the modes {self.modes}")
        self._check_effect()
        return self

    def _check_effect(self) -> None:
        """Refuse settings that would change nothing; at their defaults they pass, since a run's config.yaml holds them all."""
        if self.chat and set(self.modes) <= set(self.templates):
            raise ValueError(
                "judge.chat is of the built-in templates, and every mode has one of its own: write those as .json messages"
            )
        if self.verdicts == "log_odds":
            for name in ("samples", "max_new_tokens", "pattern"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(
                        f"judge.{name} is of sampled verdicts: set judge.verdicts to sampled, or leave it out"
                    )


class ProbeConfig(Strict):
    """A whole RUN.yaml of `interference probe`. Paths are absolute after `load_config`."""

    base_model: ModelPath
    models: list[ProbedModel] = Field(min_length=1)
    domains: list[ProbedDomain] = Field(min_length=1)
    rollouts: list[Measurement] = Field([])
    probes: list[ProbeName] = Field(["neighborhoods", "routes", "skills", "self_verification"], min_length=1)
    sampling: Sampling = Sampling()
    neighborhoods: Neighborhoods = Neighborhoods()
    routes: Routes = Routes()
    judge: Judging = Judging()
    verdicts: list[GivenVerdicts] = Field([])
    locus: Locus = Locus()
    horizon: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.0, 0.25, 0.5, 0.75, 1.0])
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    seed: int = Field(0, ge=0)
    limit: int | None = Field(512, ge=1)
    batch_tokens: int = Field(16384, ge=1)
    output: LocalPath

    @property
    def names(self) -> list[str]:
        """The base, then the tuned models."""
        return ["base", *(m.name for m in self.models)]

    @property
    def kinds(self) -> dict[str, str]:
        """{model: base, expert, multi or merged}."""
        return {"base": "base", **{m.name: m.kind for m in self.models}}

    @property
    def experts(self) -> list[str]:
        return [m.name for m in self.models if m.kind == "expert"]

    @property
    def answered(self) -> list[str]:
        """Domains on which the models' own responses are used: all, but where errors alone are located none with planted ones."""
        located = self.probes == ["locus"]
        return [d.name for d in self.domains if not (located and d.planted)]

    @property
    def forecast_models(self) -> list[str]:
        """Tuned models whose divergence from the base is forecast: all whose weights are at hand, where that is asked for."""
        asked = "neighborhoods" in self.probes and self.neighborhoods.forecast
        return [m.name for m in self.models if asked and m.model is not None]

    @property
    def others(self) -> list[str]:
        """Multi-task and merged models."""
        return [m.name for m in self.models if m.kind != "expert"]

    @model_validator(mode="after")
    def _consistent(self) -> ProbeConfig:
        models, domains = self.names[1:], [d.name for d in self.domains]
        check_names(models, domains)
        check_files("rollouts", self.rollouts, models, domains)
        for name in self.experts:
            if name not in domains:
                raise ValueError(f"models: the expert {name!r} bears no domain's name ({nearest(name, domains)})")
        if len(set(self.probes)) != len(self.probes):
            raise ValueError("probes: give each probe once")
        if "skills" in self.probes:
            self._check_skills()
        self._check_verdicts(models, domains)
        if "locus" in self.probes:
            self._check_locus()
        asked = self.horizon and self.horizon != type(self).model_fields["horizon"].default
        if asked and "process" not in self.judge.modes:
            raise ValueError("horizon: parts of a response are judged in process mode, which is not among judge.modes")
        return self

    def _check_verdicts(self, models: list[str], domains: list[str]) -> None:
        if self.verdicts and "self_verification" not in self.probes:
            raise ValueError("verdicts are read by the probe self_verification, which is not among the probes")
        for mode in dict.fromkeys(v.mode for v in self.verdicts):
            if mode not in self.judge.modes:
                raise ValueError(f"verdicts: mode {mode!r} is not among judge.modes {self.judge.modes}")
            files = [Measurement(model=v.model, domain=v.domain, data=v.data) for v in self.verdicts if v.mode == mode]
            check_files(f"verdicts ({mode})", files, models, domains)

    def _check_locus(self) -> None:
        if "process" not in self.judge.modes:
            raise ValueError("locus: the judge reads prefixes of responses, so judge.modes must hold 'process'")
        for domain in self.domains:
            if not (domain.planted or domain.prompts):
                raise ValueError(
                    f"locus: domain {domain.name!r} has no `planted` responses, nor `prompts` and a `verifier` by which to find "
                    "out where its responses go wrong"
                )

    def _check_skills(self) -> None:
        if not self.experts:
            raise ValueError("skills are the experts' gains: give a model of kind expert, or leave the probe out")
        for name in {"union", "item"} & set(self.names):
            raise ValueError(f"models: the name {name!r} is taken in the tables of the probe skills, choose another")
        least = max(LEAST[kind] for kind in self.kinds.values())
        if self.sampling.samples < least and any(d.prompts for d in self.domains):
            raise ValueError(
                f"sampling.samples: {self.sampling.samples} for each prompt, where the probe 'skills' needs {least} to tell "
                "skill from sampling noise"
            )


def load_config(path: str | Path) -> ProbeConfig:
    """Read and validate the RUN.yaml of a probe; relative paths are taken from its folder.

    Raises InputError for an unreadable file, an unknown key (with the nearest known one), a missing key, a wrong value.
    """
    return read_request(path, ProbeConfig, "base_model, models, domains, output")
