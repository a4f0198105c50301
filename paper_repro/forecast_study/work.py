"""A set-up being worked on: its folder, its finished stages, and what they left there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from interference import Checkpoint, Domain, Update, records, tree
from interference.errors import InputError
from interference.evaluation import number
from interference.model import Model, load
from paper_repro.forecast_study.setups import Setup

Say = Callable[[str], None]


@dataclass
class Work:
    """One set-up's folder:

    setup.json  records/<stage>.json         the settings, and one record per finished stage with its wall and CPU seconds
    lab/base  lab/data                       the base; the prompts, and the base's rollouts for forecasts and their evaluation
    seed<k>/rl_<domain>_step<n>, rl_<domain> what training with seed k gave after n steps and at its end
    orders/<a>_<b>/rl_<b>                    what training on b gave after training on a
    mixtures/rl_<a>+<b>                      what training on both at once gave
    updates/<tier>_<length>_<domain>.safetensors   the forecast updates
    """

    setup: Setup
    folder: Path
    say: Say = field(default=lambda _: None, repr=False)

    @property
    def lab(self) -> Path:
        return self.folder / "lab"

    def stage(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The record of a stage, which is run where it has none."""
        path = self.folder / "records" / f"{name}.json"
        if not path.is_file():
            self.say(f"{self.setup.name}: {name}")
            wall, cpu = time.perf_counter(), time.process_time()
            found = dict(make())
            seconds = {"wall_seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
            timing = {"stage": name, "threads": torch.get_num_threads(), **seconds, "git": records.provenance()["git"]}
            records.write_json(path, plain({**timing, **found}))
        record: dict[str, Any] = records.read_json(path)
        return record

    def finished(self) -> dict[str, dict[str, Any]]:
        """The records of all finished stages."""
        found = sorted((self.folder / "records").glob("*.json"))
        return {path.stem: records.read_json(path) for path in found}

    @cached_property
    def base(self) -> Checkpoint:
        return Checkpoint.open(self.lab / "base")

    @cached_property
    def model(self) -> Model:
        """The base, for derivatives and evaluations; on the CPU, where the trainings run whose time it is compared with."""
        return load(self.base, device="cpu", attention="fast")

    def data(self, kind: str) -> dict[str, Domain]:
        """{domain: rollouts of the base}; kind is "forecast" (training prompts) or "evaluation" (held-out prompts)."""
        tokenizer = self.base.tokenizer()
        files = {name: self.lab / "data" / f"{name}_{kind}.jsonl" for name in self.setup.domains}
        return {name: Domain.from_jsonl(path, tokenizer=tokenizer, name=name) for name, path in files.items()}

    def trained(self, training_seed: int, domain: str, steps: int) -> Path:
        """The checkpoint of a real training after so many steps."""
        last = self.setup.kept(training_seed)[-1]
        name = f"rl_{domain}" if steps == last else f"rl_{domain}_step{steps}"
        return self.folder / f"seed{training_seed}" / name

    def update(self, training_seed: int, domain: str, steps: int) -> dict[str, Tensor]:
        """What a real training changed after so many steps, under the model's parameter names."""
        return {name: tree.dense(change) for name, change in self.changes(training_seed, domain, steps).items()}

    def changes(self, training_seed: int, domain: str, steps: int) -> dict[str, tree.Change]:
        """The same, an adapter's as its factors."""
        return self.model.align(Update.between(self.base, Checkpoint.open(self.trained(training_seed, domain, steps))))

    def save_update(self, name: str, update: Mapping[str, tree.Change]) -> None:
        path = self.folder / "updates" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file({n: tree.dense(c).contiguous() for n, c in update.items()}, part)
        part.replace(path)

    def saved_update(self, name: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = load_file(self.folder / "updates" / f"{name}.safetensors")
        return found

    def seed(self, purpose: str) -> int:
        """A seed of sampling that no other purpose of any set-up shares."""
        text = f"{self.setup.name} {self.setup.config.seed} {purpose}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


@contextmanager
def claimed(setup: Setup, out: Path, say: Say) -> Iterator[Work | None]:
    """The set-up's folder, or None where another process works on it now (the lock ends with its process).

    Raises:
        InputError: the folder holds a set-up of other settings.
    """
    folder = out / setup.name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        lock.write(str(os.getpid()))
        _check(setup, folder / "setup.json")
        yield Work(setup, folder, say)


def _check(setup: Setup, path: Path) -> None:
    settings = setup.settings()
    if not path.is_file():
        records.write_json(path, settings)
        return
    found = records.read_json(path)
    changed = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
    if changed:
        raise InputError(
            got=f"other settings of set-up {setup.name!r} than {path} was made with: {', '.join(changed)}",
            expected="the same settings in every session",
            remedy="give the changed set-up another name, choose another --out, or delete that folder",
        )


def plain(value: Any) -> Any:
    """A JSON value, NaN as null, of nested lists and mappings."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return number(value)
