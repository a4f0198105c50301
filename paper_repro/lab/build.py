"""Build a lab: data, a base from scratch, one model per domain tuned by RL, the base's rollouts.

    <out>/lab.json  stages/*.json        the settings, and one record per finished stage
    <out>/base/  rl_<domain>/            Hugging Face checkpoints with tokenizer, float32; PEFT adapters with lora_rank
    <out>/rl_<domain>_step<k>/           the same after k steps, for k in keep_steps
    <out>/data/<domain>_{train,heldout,reference,rollouts}.jsonl, and _pairs.jsonl for DPO
    <out>/diagnose.yaml                  RUN.yaml for `interference diagnose`

A stage writes to `.part` and renames; its record comes last. So an interrupted build goes on where it stopped, with the
same result, because no stage depends on the random state that another one left behind.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from interference.errors import InputError
from interference.records import read_json, write_json, write_text
from interference.rollouts import load_verifier
from paper_repro.lab.config import LabConfig
from paper_repro.lab.data import MODULE, Row, prompt_rows, reference_rows, rollout_rows
from paper_repro.lab.domains import DOMAINS, vocabulary
from paper_repro.lab.model import make_model, make_tokenizer
from paper_repro.lab.pairs import preference_pairs
from paper_repro.lab.reinforce import ALGORITHMS, save_weights
from paper_repro.lab.train import sft

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


def build(out: str | Path, config: LabConfig, report: Report | None = None) -> Lab:
    """Build the lab in `out`, reusing the stages that are finished there.

    Args:
        out: the lab's folder; made if absent.
        config: the settings.
        report: called with each stage's name before it runs, returns what to call with its progress.

    Raises:
        InputError: `out` holds a lab of other settings, or other files.
    """
    path = Path(out)
    _claim(path, config)
    started = time.perf_counter()
    for name, stage in _stages(config).items():
        _run(path, config, name, stage, report)
    seconds = {name: float(read_json(_record(path, name))["seconds"]) for name in _stages(config)}
    return Lab(path, config, seconds, time.perf_counter() - started)


Stage = Callable[[Path, LabConfig, Progress], Mapping[str, Any]]


def _stages(config: LabConfig) -> dict[str, Stage]:
    """Every stage by name, in the order in which they run."""
    stages: dict[str, Stage] = {"data": _data, "base": _base}
    stages |= {f"rollouts_{domain}": _rollouts(domain) for domain in DOMAINS}
    if config.algorithm == "dpo":
        stages |= {f"pairs_{domain}": _pairs(domain) for domain in DOMAINS}
    stages |= {f"rl_{domain}": _rl(domain) for domain in DOMAINS}
    return stages | {"diagnose": _diagnose}


def _data(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
    counts: dict[str, int] = {}
    for done, domain in enumerate(DOMAINS):
        files = {
            "train": prompt_rows(config, domain, heldout=False),
            "heldout": prompt_rows(config, domain, heldout=True),
            "reference": reference_rows(config, domain),
        }
        for kind, rows in files.items():
            _write_rows(path / "data" / f"{domain}_{kind}.jsonl", rows)
            counts[f"{domain}_{kind}"] = len(rows)
        progress(done + 1, len(DOMAINS))
    return {"rows": counts}


def _base(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
    tokenizer = make_tokenizer(vocabulary())
    model = make_model(
        config.family, len(tokenizer), hidden=config.hidden, layers=config.layers, heads=config.heads,
        seed=config.seed,
    )  # fmt: skip
    loss = sft(config, model, tokenizer, progress)
    _save(path / "base", model, tokenizer)
    return {"loss": loss, "parameters": sum(p.numel() for p in model.parameters()), "vocabulary": len(tokenizer)}


def _rollouts(domain: str) -> Stage:
    def stage(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
        model, tokenizer = _load(path / "base")
        seed = _seed(config, f"rollouts {domain}")
        rows = rollout_rows(config, domain, model, tokenizer, seed=seed, progress=progress)
        _write_rows(path / "data" / f"{domain}_rollouts.jsonl", rows)
        return {"rows": len(rows), "reward": float(np.mean([row["reward"] for row in rows]))}

    return stage


def _pairs(domain: str) -> Stage:
    def stage(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
        model, tokenizer = _load(path / "base")
        rows, reward = prompt_rows(config, domain, heldout=False), load_verifier(f"{MODULE}:{domain}")
        seed = _seed(config, f"pairs {domain}")
        pairs = preference_pairs(config, model, tokenizer, rows, reward=reward, seed=seed, progress=progress)
        _write_rows(path / "data" / f"{domain}_pairs.jsonl", pairs)
        return {"rows": len(pairs), "prompts": len({pair["prompt_id"] for pair in pairs})}

    return stage


def _rl(domain: str) -> Stage:
    def stage(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
        model, tokenizer = _load(path / "base")
        pairs = path / "data" / f"{domain}_pairs.jsonl"
        rows = _read_rows(pairs) if config.algorithm == "dpo" else prompt_rows(config, domain, heldout=False)
        kept: list[int] = []

        def keep(step: int, trained: Any) -> None:
            _save(path / f"rl_{domain}_step{step}", trained, tokenizer)
            kept.append(step)

        trained = ALGORITHMS[config.algorithm](
            config, model, tokenizer, rows, reward=load_verifier(f"{MODULE}:{domain}"), steps=config.rl_steps[domain],
            progress=progress, keep=keep,
        )  # fmt: skip
        _save(path / f"rl_{domain}", trained.model, tokenizer)
        return {**trained.curves, "training_seconds": round(trained.seconds, 3), "kept_steps": kept}

    return stage


def _diagnose(path: Path, config: LabConfig, progress: Progress) -> Mapping[str, Any]:
    domains = [
        {
            "name": domain,
            "data": {"nll": f"data/{domain}_reference.jsonl", "reward": f"data/{domain}_rollouts.jsonl"},
            "prompts": f"data/{domain}_heldout.jsonl",
            "verifier": f"{MODULE}:{domain}",
        }
        for domain in DOMAINS
    ]
    run = {
        "base_model": "base",
        "models": [{"name": domain, "model": f"rl_{domain}"} for domain in DOMAINS],
        "domains": domains,
        "objective": ["nll", "reward"],
        "sampling": {
            "samples": config.fresh_rollouts,
            "max_new_tokens": config.max_new_tokens,
            "batch_size": 2048,
        },
        "alphas": [0.25, 0.5, 1.0, 1.5],
        "seed": config.seed,
        "output": "../demo",
    }
    note = "# Written by `python -m paper_repro.lab build`; paths are relative to this file's folder.\n"
    write_text(path / "diagnose.yaml", note + yaml.safe_dump(run, sort_keys=False))
    progress(1, 1)
    return {}


def _claim(path: Path, config: LabConfig) -> None:
    """Make `path` this lab's folder, or refuse: another lab's or another program's files are never touched."""
    settings = {"world": WORLD, **config.model_dump(mode="json")}
    if (path / "lab.json").exists():
        # A lab from before a setting existed was built with what is now its default.
        found = {**LabConfig().model_dump(mode="json"), **read_json(path / "lab.json")}
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


def _write_rows(path: Path, rows: list[Row]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def _read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _save(path: Path, model: Any, tokenizer: Any) -> None:
    part = path.with_name(path.name + ".part")
    for left in (part, path):  # from an interruption before the stage's record
        if left.exists():
            shutil.rmtree(left)
    save_weights(model, part)
    tokenizer.save_pretrained(part)
    part.rename(path)


def _load(path: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)
