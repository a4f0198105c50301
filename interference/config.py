"""RUN.yaml: what a run is asked to do, validated; unknown keys are errors that name the nearest known key.

Here is the request of `diagnose`, and what requests of other commands share with it: how they are read, paths, names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from interference.errors import InputError, nearest

ObjectiveName = Literal["nll", "reward", "surrogate", "kl"]


class Strict(BaseModel):
    """Entries of a request: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Request = TypeVar("Request", bound=Strict)


def _local(path: str, info: ValidationInfo) -> str:
    """A path relative to the request's folder, made absolute; as it is where the request comes from no file."""
    folder = (info.context or {}).get("folder")
    return path if folder is None or not path else str((folder / Path(path).expanduser()).resolve())


def _local_or_hub(path: str, info: ValidationInfo) -> str:
    """The same for a model, which may be a hub id where no such directory is there."""
    folder = (info.context or {}).get("folder")
    if folder is None or not ((folder / path).exists() or path.count("/") != 1 or path.startswith(".")):
        return path
    return _local(path, info)


LocalPath = Annotated[str, AfterValidator(_local)]
ModelPath = Annotated[str, AfterValidator(_local_or_hub)]


class ModelEntry(Strict):
    """A tuned checkpoint; `name` is the domain that it was trained on, where there is one of that name."""

    name: str = Field(min_length=1)
    model: ModelPath


class DomainEntry(Strict):
    """A domain: `data` is a JSONL path for every objective, or {objective: path}. With `prompts` and a `verifier`
    ("module:function", TRL's reward-function signature) reward is measured by fresh rollouts sampled here."""

    name: str = Field(min_length=1)
    data: LocalPath | dict[ObjectiveName, LocalPath]
    prompts: LocalPath | None = None
    verifier: str | None = None

    @model_validator(mode="after")
    def _both(self) -> DomainEntry:
        check_verifiable(self.prompts, self.verifier)
        return self

    def path(self, objective: str) -> str | None:
        """The data file for an objective."""
        return self.data if isinstance(self.data, str) else self.data.get(objective)  # type: ignore[call-overload]


class Measurement(Strict):
    """Fresh rollouts with rewards of a model (a name from `models`, or "base") on a domain's held-out prompts."""

    model: str
    domain: str
    data: LocalPath


class Sampling(Strict):
    """How fresh rollouts are sampled: `samples` responses per prompt, from the full softmax."""

    samples: int = Field(8, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    temperature: float = 1.0
    batch_size: int = Field(64, ge=1)

    @field_validator("temperature")
    @classmethod
    def _policy(cls, value: float) -> float:
        if value != 1.0:
            raise ValueError("what is computed is of the policy at temperature 1, so rollouts must be sampled there")
        return value


class RunConfig(Strict):
    """A whole RUN.yaml. Paths are absolute after `load_config`."""

    base_model: ModelPath
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
    output: LocalPath

    @field_validator("objective", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        check_names([m.name for m in self.models], [d.name for d in self.domains])
        if not self.objective or len(set(self.objective)) != len(self.objective):
            raise ValueError("objective: give one, or a list of different ones")
        for domain in self.domains:
            for objective in self.objective:
                if domain.path(objective) is None:
                    raise ValueError(f"domains: {domain.name!r} has no data for objective {objective!r}")
        check_files("measurements", self.measurements, [m.name for m in self.models], [d.name for d in self.domains])
        if self.measurements and not {"reward", "surrogate"} & set(self.objective):
            raise ValueError("measurements are of rewards: they need the objective reward or surrogate")
        return self


def check_verifiable(prompts: str | None, verifier: str | None) -> None:
    """ValueError for prompts without a verifier, or the reverse."""
    if (prompts is None) != (verifier is None):
        raise ValueError("`prompts` and `verifier` belong together: give both or neither")


def check_names(models: list[str], domains: list[str], key: str = "domains") -> None:
    """ValueError for names that occur twice or cannot name a file, and for a model called "base".

    key: under which the request has the domains.
    """
    for what, names in (("models", models), (key, domains)):
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"{what}: the name {twice[0]!r} occurs twice")
        odd = [n for n in names if "/" in n or n.startswith(".") or len(n) > 80]
        if odd:
            raise ValueError(
                f"{what}: the name {odd[0][:80]!r} cannot name a file (no '/', no leading '.', 80 characters)"
            )
    if "base" in models:
        raise ValueError("models: the name 'base' is taken by base_model")


def check_files(what: str, files: list[Measurement], models: list[str], domains: list[str]) -> None:
    """ValueError for rollouts of a model or domain that is not in the request, or given twice."""
    pairs = [(m.model, m.domain) for m in files]
    if len(set(pairs)) != len(pairs):
        raise ValueError(f"{what}: give one file for each model and domain")
    for kind, asked, known in (
        ("model", [m.model for m in files], ["base", *models]),
        ("domain", [m.domain for m in files], domains),
    ):
        for name in asked:
            if name not in known:
                raise ValueError(f"{what}: unknown {kind} {name!r} ({nearest(name, known)})")


def load_config(path: str | Path) -> RunConfig:
    """Read and validate the RUN.yaml of `diagnose`; see `read_request`."""
    return read_request(path, RunConfig, "base_model, models, domains, output")


def read_request(path: str | Path, kind: type[Request], keys: str) -> Request:
    """Read and validate a RUN.yaml as a request of some kind; relative paths are taken from its folder.

    keys: those that every such request has, named where the file holds none.

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
        raise InputError(got=f"{file} holding no keys", expected=keys, remedy="see README")
    try:
        return kind.model_validate(raw, context={"folder": file.resolve().parent})
    except ValidationError as error:
        raise _translate(error, file, kind) from error


def _translate(error: ValidationError, file: Path, kind: type[BaseModel]) -> InputError:
    """The first problem, unknown keys first (a misspelt key often shows as a missing one too)."""
    problems = sorted(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    problem = problems[0]
    # Branches of unions (the type's name, or "function-after[...]") are no part of where it stands in the file.
    where = ".".join(str(p) for p in problem["loc"] if p != "str" and not str(p).startswith("function-"))
    if problem["type"] == "extra_forbidden":
        key, known = str(problem["loc"][-1]), _fields_at(kind, problem["loc"][:-1])
        return InputError(got=f"unknown key {where!r} in {file}", expected="a known key", remedy=nearest(key, known))
    if problem["type"] == "missing":
        return InputError(got=f"{file} without {where!r}", expected=f"a value for {where!r}", remedy="add it")
    inner = problem.get("ctx", {}).get("error")
    if isinstance(inner, InputError):  # of the library itself, which says all
        return InputError(got=f"{inner.got} in {file}", expected=inner.expected, remedy=inner.remedy)
    message = problem["msg"].removeprefix("Value error, ")
    shown = f"{where}: {problem['input']!r}"[:160] if where else "inconsistent entries"
    return InputError(got=f"{shown} in {file}", expected=message, remedy="mend that entry")


def _fields_at(here: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in here.model_fields:
            annotation = here.model_fields[part].annotation
            inner = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel)]
            here = inner[0] if inner else here
    return list(here.model_fields)
