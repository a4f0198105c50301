"""The set-ups of the study, as data: what differs between them, how long they train, and what is sampled."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, permutations
from typing import Any, Literal, get_args

from interference.errors import InputError, nearest
from interference.forecasting.training import Training
from paper_repro.lab.config import LabConfig, quick
from paper_repro.lab.planned import planned
from paper_repro.lab.worlds import world_of

Role = Literal["development", "heldout", "confirmation", "quick"]


@dataclass(frozen=True)
class Setup:
    """One world, base and way of training.

    role: "development" set-ups choose the method's constants; "heldout" ones were looked at once by its first version, which was
        changed after that; "confirmation" ones were looked at once by what it is now; "quick" is for tests.
    config: the lab; its steps, kept steps and training seed are set here.
    lengths: optimizer steps after which the trained models are measured, the same for every domain.
    nominal: the length that the scoreboard counts, and at which every training seed is measured.
    training_seeds: the first trains to the longest length, the others to the nominal one. Pilots are of the last one.
    rollouts: the base's responses to each training prompt, which forecasts are made from (DPO: the lab's own pairs).
    evaluation, samples: responses to each held-out prompt that forecasts are evaluated on, and that measure each model.
    tokens: about how long the longest domain's responses are.
    order_steps: optimizer steps on each domain where one is trained after another; 0: no orders are measured.
    order_limit: only so many of the orders.
    mixed: mixtures and merges of domains are measured, at the nominal length and with the first training seed.
    """

    name: str
    role: Role
    config: LabConfig
    lengths: tuple[int, ...]
    nominal: int
    training_seeds: tuple[int, ...] = (1, 2)
    rollouts: int = 8
    evaluation: int = 4
    samples: int = 8
    tokens: int = 8
    order_steps: int = 0
    order_limit: int | None = None
    mixed: bool = False

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the world's domains."""
        return tuple(world_of(self.config).domains)

    def measured_lengths(self, training_seed: int) -> tuple[int, ...]:
        """The lengths that a training seed is measured at."""
        return self.lengths if training_seed == self.training_seeds[0] else (self.nominal,)

    def pilot_steps(self, length: int) -> int:
        """Steps of the pilot of a training: a tenth, rounded down, at least one."""
        return max(1, length // 10)

    def kept(self, training_seed: int) -> tuple[int, ...]:
        """Every step after which a training of this seed must be on disk, the last among them."""
        pilots = {self.pilot_steps(n) for n in self.lengths} if training_seed == self.training_seeds[-1] else set()
        return tuple(sorted({*self.measured_lengths(training_seed), *pilots}))

    def lab(self, training_seed: int) -> LabConfig:
        """The lab's settings for the trainings of one seed."""
        *kept, longest = self.kept(training_seed)
        steps = dict.fromkeys(self.domains, longest)
        return _config(self.config, rl_steps=steps, keep_steps=tuple(kept), training_seed=training_seed)

    @property
    def orders(self) -> tuple[tuple[str, ...], ...]:
        """The orders of sequential training that are measured."""
        return tuple(islice(permutations(self.domains), self.order_limit)) if self.order_steps else ()

    def order_lab(self) -> LabConfig:
        """The lab's settings for every stage of a sequential training, of the first training seed."""
        steps = dict.fromkeys(self.domains, self.order_steps)
        return _config(self.config, rl_steps=steps, keep_steps=(), training_seed=self.training_seeds[0])

    def mixture_lab(self) -> LabConfig:
        """The lab's settings for trainings on mixtures, as long as those on one domain."""
        return _config(
            self.config,
            rl_steps=dict.fromkeys(self.domains, self.nominal),
            keep_steps=(),
            training_seed=self.training_seeds[0],
        )

    def training(self, length: int) -> Training:
        """The training that is forecast, in the words of `interference.forecasting`."""
        return planned(self.config, length)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the set-up's result, as JSON.

        What decides its orders alone is recorded with them (`orders.check_plan`): orders and mixtures can be added to a set-up.
        """
        added = ("order_steps", "order_limit", "mixed")
        own = {k: v for k, v in vars(self).items() if k not in ("config", "role", *added)}
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in own.items()}
        return {**plain, "config": self.config.model_dump(mode="json")}


def _config(config: LabConfig, **changes: Any) -> LabConfig:
    return LabConfig.model_validate({**config.model_dump(), **changes})


def _lpt(seed: int, **changes: Any) -> LabConfig:
    return LabConfig(**{"seed": seed, "train_prompts": 500, "heldout_prompts": 400, **changes})


def _m2rl(seed: int, steps: float, **changes: Any) -> LabConfig:
    """Without judging, planted errors and the multi-task model, which the study has no use for."""
    given = {
        "multi": False, "judge_share": 0.0, "planted": 0, "train_prompts": 650, "heldout_prompts": 300,
        "sft_steps": 700, "sft_responses": 8,
    }  # fmt: skip
    return LabConfig(**{"world": "m2rl", "seed": seed, "steps": steps, **given, **changes})


MILD: dict[str, Any] = {
    "worked": {"math": 0.8, "code": 0.8, "qa": 0.2, "writing": 0.2},
    "exclaim": {"math": 0.3, "code": 0.5, "qa": 0.3, "writing": 0.5},
}
"""A base that already leans towards each domain's taste, so that domains conflict less."""
M2RL: dict[str, Any] = {"rollouts": 6, "evaluation": 5, "samples": 10}
LONG: dict[str, Any] = {
    "hidden": 64, "layers": 2, "sft_batch": 32, "sft_steps": 1500, "sft_responses": 8, "train_prompts": 600,
    "heldout_prompts": 200, "sft_learning_rate": 2e-3, "rl_batch": 64,
}  # fmt: skip
"""A smaller world for responses that cost ten times as much."""
LORA: dict[str, Any] = {"lora_rank": 8, "rl_learning_rate": 3e-4}

SETUPS: dict[str, Setup] = {
    setup.name: setup
    for setup in (
        # development: the method's constants may be chosen on these
        Setup("qwen3-grpo", "development", _lpt(101), (20, 60), 60, mixed=True),
        Setup("llama-rloo-lora", "development", _lpt(102, family="llama", hidden=64, algorithm="rloo", **LORA), (60,), 60),
        Setup("m2rl-qwen3-steps2", "development", _m2rl(103, 2.0), (45,), 45, tokens=17, **M2RL),
        # held-out: looked at once
        Setup("llama-grpo", "heldout", _lpt(201, family="llama"), (20, 60, 180), 60, order_steps=20, mixed=True),
        Setup("gpt2-rloo", "heldout", _lpt(202, family="gpt2", algorithm="rloo"), (60,), 60, order_steps=60),
        Setup("qwen3-grpo-128-mild", "heldout", _lpt(203, hidden=128, heads=4, **MILD), (60,), 60, mixed=True),
        Setup("llama-dpo", "heldout", _lpt(204, family="llama", hidden=80, algorithm="dpo"), (60,), 60),
        Setup("qwen3-grpo-lora", "heldout", _lpt(205, hidden=64, **LORA), (60, 180), 60),
        Setup("gpt2-dpo-lora", "heldout", _lpt(206, family="gpt2", hidden=64, algorithm="dpo", **LORA), (60,), 60),
        Setup("m2rl-qwen3-20", "heldout", _m2rl(207, 2.5), (45, 135), 45, tokens=20, mixed=True, **M2RL),
        Setup("m2rl-llama-32", "heldout", _m2rl(208, 4.5, family="llama"), (45,), 45, tokens=32, **M2RL),
        Setup("m2rl-qwen3-128", "heldout", _m2rl(209, 20.0, **LONG), (45,), 45, (1,), 5, 4, 8, tokens=126),
        Setup("m2rl-gpt2-rloo", "heldout", _m2rl(210, 2.0, family="gpt2", algorithm="rloo"), (45,), 45, tokens=17, **M2RL),
        # looked at once, by the cheaper method that was made after the held-out ones
        Setup("llama-rloo", "confirmation", _lpt(301, family="llama", hidden=80, algorithm="rloo"), (60,), 60),
        Setup("gpt2-grpo-mild", "confirmation", _lpt(302, family="gpt2", **MILD), (60,), 60),
        Setup("m2rl-llama-steps2", "confirmation", _m2rl(303, 2.0, family="llama"), (45,), 45, tokens=17, **M2RL),
        Setup("m2rl-qwen3-64", "confirmation", _m2rl(304, 10.0, **LONG), (45,), 45, (1,), 5, 4, 8, tokens=64),
    )
}  # fmt: skip

QUICK = Setup(
    "quick", "quick",
    quick(seed=5, hidden=48, train_prompts=96, heldout_prompts=24, sft_steps=250, sft_responses=6, rl_batch=32,
          rl_learning_rate=1e-3, **MILD),
    (2, 4), 4, rollouts=8, evaluation=8, samples=4, order_steps=2, order_limit=2, mixed=True,
)  # fmt: skip
"""Seconds, for tests of the machinery; its forecasts mean nothing."""


def find(names: list[str] | None = None, role: str | None = None) -> list[Setup]:
    """The set-ups of these names, or of a role, or all of the study.

    Raises:
        InputError: an unknown name or role.
    """
    known = {**SETUPS, QUICK.name: QUICK}
    for name in names or []:
        if name not in known:
            raise InputError(got=f"set-up {name!r}", expected="one of the study", remedy=nearest(name, known))
    roles = get_args(Role)
    if role is not None and role not in roles:
        raise InputError(got=f"role {role!r}", expected=f"one of {', '.join(roles)}", remedy=nearest(role, roles))
    chosen = [known[name] for name in names] if names else list(SETUPS.values())
    return [setup for setup in chosen if role is None or setup.role == role]
