"""The RUN.yaml files that a lab writes for `interference forecast`, `diagnose` and `probe`, and the judge's templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from interference.records import write_text
from paper_repro.lab.config import LabConfig
from paper_repro.lab.planned import planned
from paper_repro.lab.worlds import Judging, World, world_of

NOTE = "# Written by `python -m paper_repro.lab build`; paths are relative to this file's folder.\n"
MERGED = ("average", "sum")
"""merged_average is the mean of the experts, merged_sum the base plus the sum of their updates (task arithmetic)."""
FORECAST_PROMPTS = 256
"""Prompts of a domain that the lab's forecast is made from."""
PROBED_PROMPTS = 128
"""Prompts of a domain that the lab's probe asks about, so that all models' pairs take minutes."""


def write_diagnose(path: Path, config: LabConfig) -> None:
    """`diagnose.yaml`: the base, the experts and their domains."""
    world = world_of(config)
    domains = [
        {
            "name": domain,
            "data": {"nll": f"data/{domain}_reference.jsonl", "reward": f"data/{domain}_rollouts.jsonl"},
            "prompts": f"data/{domain}_heldout.jsonl",
            "verifier": world.verifier(domain),
        }
        for domain in world.domains
    ]
    run = {
        "base_model": "base",
        "models": [{"name": domain, "model": f"rl_{domain}"} for domain in world.domains],
        "domains": domains,
        "objective": ["nll", "reward"],
        "sampling": {
            "samples": config.fresh_rollouts,
            "max_new_tokens": config.max_new_tokens,
            "batch_size": 2048,
        },
        "alphas": [0.25, 0.5, 1.0, 1.5],
        "seed": config.seed,
        "output": "../demo" if world.name == "lpt" else f"../{world.name}-diagnose",
    }
    _write(path / "diagnose.yaml", run)


def write_forecast(path: Path, config: LabConfig) -> None:
    """`forecast.yaml`: what the base's rollouts say of the RL stages, which it does not see."""
    world = world_of(config)
    first, *_ = steps = [config.rl_steps[domain] for domain in world.domains]
    told = planned(config, first).model_dump(mode="json", exclude_defaults=True)
    run = {
        "base_model": "base",
        "domains": [
            {"name": domain, "data": f"data/{domain}_rollouts.jsonl", "training": {"steps": count}}
            for domain, count in zip(world.domains, steps, strict=True)
        ],
        "training": told,
        "tier": ["gradient", "virtual"],
        "limit": FORECAST_PROMPTS,
        "seed": config.seed,
        "output": f"../{'demo' if world.name == 'lpt' else world.name}-forecast",
    }
    _write(path / "forecast.yaml", run)


def write_probe(path: Path, config: LabConfig) -> None:
    """`probe.yaml`: the base, the experts, the multi-task and the merged models, and how they are judged."""
    world = world_of(config)
    models = [{"name": domain, "model": f"rl_{domain}", "kind": "expert"} for domain in world.domains]
    if config.multi:
        models.append({"name": "multi", "model": "rl_multi", "kind": "multi"})
        models += [{"name": f"merged_{how}", "model": f"merged_{how}", "kind": "merged"} for how in MERGED]
    run: dict[str, Any] = {
        "base_model": "base",
        "models": models,
        "domains": [
            {"name": domain, "prompts": f"data/{domain}_heldout.jsonl", "verifier": world.verifier(domain)}
            | ({"planted": f"data/{domain}_planted.jsonl"} if domain in world.reasoning else {})
            for domain in world.domains
        ],
        "sampling": {"samples": 8, "max_new_tokens": config.max_new_tokens, "batch_size": 2048},
        "limit": PROBED_PROMPTS,
        "seed": config.seed,
        "output": f"../{world.name}-probe",
    }
    if world.judging is None:
        run["probes"] = ["neighborhoods", "routes", "skills"]
    else:
        run["probes"] = ["neighborhoods", "routes", "skills", "self_verification", "locus"]
        run |= {"judge": _judge(world.judging), "locus": {"separator": world.judging.separator}}
    _write(path / "probe.yaml", run)


def write_templates(path: Path, world: World) -> None:
    """`data/judge_MODE.txt` for every mode, in a world with a judge format."""
    for mode, template in (world.judging.templates if world.judging else {}).items():
        assert isinstance(template.text, str)
        write_text(path / "data" / f"judge_{mode}.txt", template.text + "\n")


def _judge(judging: Judging) -> dict[str, Any]:
    return {
        "templates": {mode: f"data/judge_{mode}.txt" for mode in judging.templates},
        "answer": judging.answer,
        "yes": [judging.yes],
        "no": [judging.no],
    }


def _write(path: Path, run: Mapping[str, Any]) -> None:
    write_text(path, NOTE + yaml.safe_dump(dict(run), sort_keys=False))
