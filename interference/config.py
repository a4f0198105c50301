"""RUN.yaml: what a run is asked to do, validated; unknown keys are errors that name the nearest known key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from interference.errors import InputError, nearest

ObjectiveName = Literal["nll", "reward", "surrogate", "kl"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelEntry(_Strict):
    """A tuned checkpoint; `name` is the domain that it was trained on, where there is one of that name."""

    name: str = Field(min_length=1)
    model: str


class DomainEntry(_Strict):
    """A domain: `data` is a JSONL path for every objective, or {objective: path}. With `prompts` and a `verifier`
    ("module:function", TRL's reward-function signature) reward is measured by fresh rollouts sampled here."""

    name: str = Field(min_length=1)
    data: str | dict[ObjectiveName, str]
    prompts: str | None = None
    verifier: str | None = None

    @model_validator(mode="after")
    def _both(self) -> DomainEntry:
        if (self.prompts is None) != (self.verifier is None):
            raise ValueError("`prompts` and `verifier` belong together: give both or neither")
        return self

    def path(self, objective: str) -> str | None:
        """The data file for an objective."""
        return self.data if isinstance(self.data, str) else self.data.get(objective)  # type: ignore[call-overload]


class Measurement(_Strict):
    """Fresh rollouts with rewards of a model (a name from `models`, or "base") on a domain's held-out prompts."""

    model: str
    domain: str
    data: str


class Sampling(_Strict):
    """How fresh rollouts are sampled: `samples` responses per prompt, from the full softmax."""

    samples: int = Field(8, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = 1.0
    batch_size: int = Field(64, ge=1)

    @field_validator("temperature")
    @classmethod
    def _policy(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError("the predictor expands the policy at temperature 1, so rollouts must be sampled there")
        return value


class RunConfig(_Strict):
    """A whole RUN.yaml. Paths are absolute after `load_config`."""

    base_model: str
    models: list[ModelEntry] = Field(min_length=1)
    domains: list[DomainEntry] = Field(min_length=1)
    objective: list[ObjectiveName] = ["nll"]
    measurements: list[Measurement] = []
    sampling: Sampling = Sampling()
    alphas: list[Annotated[float, Field(allow_inf_nan=False)]] = [0.25, 0.5, 0.75, 1.0, 1.5]
    pairs: bool = False
    attribution: bool = True
    engine: Literal["taylor", "nested"] = "taylor"
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    seed: int = Field(0, ge=0)
    limit: int | None = Field(512, ge=1)
    batch_tokens: int = Field(4096, ge=1)
    output: str

    @field_validator("objective", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        for what, names in (
            ("models", [m.name for m in self.models]),
            ("domains", [d.name for d in self.domains]),
        ):
            twice = sorted({n for n in names if names.count(n) > 1})
            if twice:
                raise ValueError(f"{what}: the name {twice[0]!r} occurs twice")
            odd = [n for n in names if "/" in n or n.startswith(".") or len(n) > 80]
            if odd:
                raise ValueError(
                    f"{what}: the name {odd[0][:80]!r} cannot name a file (no '/', no leading '.', 80 characters)"
                )
        if "base" in {m.name for m in self.models}:
            raise ValueError("models: the name 'base' is taken by base_model")
        if not self.objective or len(set(self.objective)) != len(self.objective):
            raise ValueError("objective: give one, or a list of different ones")
        for domain in self.domains:
            for objective in self.objective:
                if domain.path(objective) is None:
                    raise ValueError(f"domains: {domain.name!r} has no data for objective {objective!r}")
        pairs = [(m.model, m.domain) for m in self.measurements]
        if len(set(pairs)) != len(pairs):
            raise ValueError("measurements: give one file for each model and domain")
        if self.measurements and not {"reward", "surrogate"} & set(self.objective):
            raise ValueError("measurements are of rewards: they need the objective reward or surrogate")
        for m in self.measurements:
            if m.model not in {"base", *(e.name for e in self.models)}:
                raise ValueError(f"measurements: unknown model {m.model!r}")
            if m.domain not in {e.name for e in self.domains}:
                raise ValueError(f"measurements: unknown domain {m.domain!r}")
        return self


def load_config(path: str | Path) -> RunConfig:
    """Read and validate RUN.yaml; relative paths are taken from its folder.

    Raises InputError for an unreadable file, an unknown key (with the nearest known one), a missing key, a wrong value.
    """
    file = Path(path)
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            got=f"{file}, which cannot be read ({type(error).__name__})",
            expected="a RUN.yaml",
            remedy="check the path",
        ) from error
    except yaml.YAMLError as error:
        raise InputError(
            got=f"{file}, which is not YAML ({' '.join(str(error).split())})",
            expected="a RUN.yaml",
            remedy="mend it",
        ) from error
    if not isinstance(raw, dict):
        raise InputError(
            got=f"{file} holding no keys", expected="base_model, models, domains, output", remedy="see README"
        )
    try:
        config = RunConfig.model_validate(raw)
    except ValidationError as error:
        raise _translate(error, file) from error
    return _absolute(config, file.resolve().parent)


def _translate(error: ValidationError, file: Path) -> InputError:
    """The first problem, unknown keys first (a misspelt key often shows as a missing one too)."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem = problems[0]
    where = ".".join(str(part) for part in problem["loc"] if part not in ("str",))
    if problem["type"] == "extra_forbidden":
        key, known = str(problem["loc"][-1]), _fields_at(problem["loc"][:-1])
        return InputError(got=f"unknown key {where!r} in {file}", expected="a known key", remedy=nearest(key, known))
    if problem["type"] == "missing":
        return InputError(got=f"{file} without {where!r}", expected=f"a value for {where!r}", remedy="add it")
    message = problem["msg"].removeprefix("Value error, ")
    shown = f"{where}: {problem['input']!r}"[:160] if where else "inconsistent entries"
    return InputError(got=f"{shown} in {file}", expected=message, remedy="mend that entry")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    here: type[BaseModel] = RunConfig
    for part in location:
        if isinstance(part, str) and part in here.model_fields:
            annotation = here.model_fields[part].annotation
            inner = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
            here = inner[0] if inner else here
    return list(here.model_fields)


def _absolute(config: RunConfig, folder: Path) -> RunConfig:
    """Paths relative to the RUN.yaml's folder, made absolute; a base that is no directory there may be a hub id."""

    def local(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    def model(path: str) -> str:
        return local(path) if (folder / path).exists() or path.count("/") != 1 or path.startswith(".") else path

    domains = [
        d.model_copy(
            update={
                "data": local(d.data) if isinstance(d.data, str) else {k: local(v) for k, v in d.data.items()},
                "prompts": local(d.prompts) if d.prompts else None,
            }
        )
        for d in config.domains
    ]
    return config.model_copy(
        update={
            "base_model": model(config.base_model),
            "models": [m.model_copy(update={"model": model(m.model)}) for m in config.models],
            "domains": domains,
            "measurements": [m.model_copy(update={"data": local(m.data)}) for m in config.measurements],
            "output": local(config.output),
        }
    )
