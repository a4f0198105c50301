"""Build a lab: data, a base from scratch, one model per domain tuned by RL, the base's rollouts.

    <out>/lab.json  stages/*.json        the settings, and one record per finished stage
    <out>/base/  rl_<domain>/            Hugging Face checkpoints with tokenizer, float32; PEFT adapters with lora_rank
    <out>/rl_<domain>_step<k>/           the same after k steps, for k in keep_steps
    <out>/data/<domain>_{train,heldout,reference,rollouts}.jsonl, and _pairs.jsonl for DPO
    <out>/{forecast,diagnose}.yaml       RUN.yaml of `interference forecast` and `interference diagnose`

and where `multi` is set (world "m2rl"):

    <out>/rl_multi/  merged_{average,sum}/   RL on all domains; the mean of the experts; the base plus all their updates
    <out>/data/<domain>_planted.jsonl        responses with an error at a known step
    <out>/data/judge_{outcome,process}.txt   the judge format that the base learned
    <out>/probe.yaml                         RUN.yaml for `interference probe`

A stage writes to `.part` and renames; its record comes last. So an interrupted build goes on where it stopped, with the
same result, because no stage depends on the random state that another one left behind.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from interference.errors import InputError
from interference.records import read_json, write_json
from paper_repro.lab.config import LabConfig
from paper_repro.lab.data import planted_rows, prompt_rows, reference_rows, rollout_rows
from paper_repro.lab.files import load, save, write_rows
from paper_repro.lab.model import make_model, make_tokenizer
from paper_repro.lab.requests import MERGED, write_diagnose, write_forecast, write_probe, write_templates
from paper_repro.lab.train import sft
from paper_repro.lab.training import MULTI, make_pairs, train
from paper_repro.lab.worlds import WORLDS, world_of

WORLD = 1  # raised by hand when the code makes another world from the same settings
Progress = Callable[[int, int], None]
Report = Callable[[str], Progress]  # a stage's name -> its progress, called with (done, in all)


@dataclass(frozen=True)
class Lab:
    """A finished lab: its folder, its settings, and the seconds each stage took (0 for a reused one in `spent`)."""

    path: Path
    config: LabConfig
    seconds: Mapping[str, float]
    spent: float


def build(out: str | Path, config: LabConfig, report: Report | None = None, only: Collection[str] | None = None) -> Lab:
    """Build the lab in `out`, reusing the stages that are finished there.

    Args:
        out: the lab's folder; made if absent.
        config: the settings.
        report: called with each stage's name before it runs, returns what to call with its progress.
        only: the names of the stages to run; all of them unless given.

    Raises:
        InputError: `out` holds a lab of other settings, or other files.
    """
    path = Path(out)
    _claim(path, config)
    started = time.perf_counter()
    stages = {name: stage for name, stage in _stages(config).items() if only is None or name in only}
    for name, stage in stages.items():
        _run(path, config, name, stage, report)
    seconds = {name: float(read_json(_record(path, name))["seconds"]) for name in stages}
    return Lab(path, config, seconds, time.perf_counter() - started)


Stage = Callable[[Path, LabConfig, Progress], Mapping[str, Any]]


def _stages(config: LabConfig) -> dict[str, Stage]:
    """Every stage by name, in the order in which they run."""
    domains = world_of(config).domains
    stages: dict[str, Stage] = {"data": _data, "base": _base}
    stages |= {f"rollouts_{domain}": _rollouts(domain) for domain in domains}
    if config.algorithm == "dpo":
        stages |= {f"pairs_{domain}": _pairs(domain) for domain in domains}
    stages |= {f"rl_{domain}": _rl(domain) for domain in domains}
    if config.multi:
        stages |= {"rl_multi": _rl(MULTI)} | {f"merged_{how}": _merged(how) for how in MERGED}
    stages |= {"diagnose": _diagnose, "forecast": _forecast}
    return stages | ({"probe": _probe} if config.multi else {})


def _data(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
    counts: dict[str, int] = {}
    world = world_of(config)
    for done, domain in enumerate(world.domains):
        files = {
            "train": prompt_rows(config, domain, heldout=False),
            "heldout": prompt_rows(config, domain, heldout=True),
            "reference": reference_rows(config, domain),
        }
        if domain in world.reasoning:
            files["planted"] = planted_rows(config, domain)
        for kind, rows in files.items():
            write_rows(path / "data" / f"{domain}_{kind}.jsonl", rows)
            counts[f"{domain}_{kind}"] = len(rows)
        progress(done + 1, len(world.domains))
    write_templates(path, world)
    return {"rows": counts}


def _base(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
    world = world_of(config)
    tokenizer = make_tokenizer(world.vocabulary(config))
    model = make_model(
        config.family, len(tokenizer), hidden=config.hidden, layers=config.layers, heads=config.heads,
        seed=config.seed, positions=max(64, -(-world.longest(config) // 64) * 64),
    )  # fmt: skip
    loss = sft(config, model, tokenizer, progress)
    save(path / "base", model, tokenizer)
    return {"loss": loss, "parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(tokenizer)}


def _rollouts(domain: str) -> Stage:
    def stage(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
        model, tokenizer = load(path / "base")
        seed = _seed(config, f"rollouts {domain}")
        rows = rollout_rows(config, domain, model, tokenizer, seed=seed, progress=progress)
        write_rows(path / "data" / f"{domain}_rollouts.jsonl", rows)
        return {"rows": len(rows), "reward": float(np.mean([row["reward"] for row in rows]))}

    return stage


def _pairs(domain: str) -> Stage:
    def stage(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
        return make_pairs(path, config, domain, _seed(config, f"pairs {domain}"), progress)

    return stage


def _rl(name: str) -> Stage:
    def stage(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
        return train(path, config, name, progress)

    return stage


def _merged(how: str) -> Stage:
    def stage(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
        model, tokenizer = load(path / "base")
        base = model.state_dict()
        # Plain state dicts: Update.between would refuse an expert that got no reward and so is the base.
        experts = [load(path / f"rl_{domain}")[0].state_dict() for domain in world_of(config).domains]
        scale = 1.0 if how == "sum" else 1.0 / len(experts)
        merged = {name: b + scale * torch.stack([e[name] - b for e in experts]).sum(0) for name, b in base.items()}
        model.load_state_dict(merged)
        save(path / f"merged_{how}", model, tokenizer)
        progress(1, 1)
        return {}

    return stage


def _forecast(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
    write_forecast(path, config)
    progress(1, 1)
    return {}


def _diagnose(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
    write_diagnose(path, config)
    progress(1, 1)
    return {}


def _probe(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
    write_probe(path, config)
    progress(1, 1)
    return {}


def _claim(path: Path, config: LabConfig) -> None:
    """Make `path` this lab's folder, or refuse: another lab's or another program's files are never touched."""
    settings = {"version": WORLD, **config.model_dump(mode="json")}
    if (path / "lab.json").exists():
        found = _settings(read_json(path / "lab.json"))
        changed = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
        if changed:
            raise InputError(
                got="other settings than the lab in this folder was built with: "
                + ", ".join(f"{key} {settings.get(key)} (there {found.get(key)})" for key in changed),
                expected=f"the settings in {path / 'lab.json'}",
                remedy="build into another folder, or delete this one",
            )
        return
    if path.exists() and (not path.is_dir() or any(p.name != "lab.json.part" for p in path.iterdir())):
        raise InputError(
            got=f"{path}, which exists and is not a lab",
            expected="a new or an empty folder, or one that holds a lab",
            remedy="choose another --out",
        )
    write_json(path / "lab.json", settings)


def _settings(found: dict[str, Any]) -> dict[str, Any]:
    """What a lab.json says, with the defaults of settings that came after it was written.

    Until there was a second world, `world` held the version.
    """
    if isinstance(found.get("world"), int):
        found = {**found, "version": found["world"], "world": "lpt"}
    given = {"world": found["world"]} if found.get("world") in WORLDS else {}
    return {**LabConfig(**given).model_dump(mode="json"), **found}


def _run(path: Path, config: LabConfig, name: str, stage: Stage, report: Report | None) -> None:
    record = _record(path, name)
    if record.exists():
        return
    progress = report(name) if report is not None else _silent
    started = time.perf_counter()
    found = stage(path, config, progress)
    write_json(
        record,
        {
            "stage": name,
            "seconds": round(time.perf_counter() - started, 2),
            "threads": torch.get_num_threads(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__},
            **found,
        },
    )  # fmt: skip


def _record(path: Path, name: str) -> Path:
    return path / "stages" / f"{name}.json"


def _silent(done: int, total: int) -> None:
    pass


def _seed(config: LabConfig, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{config.seed} {purpose}".encode()).digest()[:4], "big")
