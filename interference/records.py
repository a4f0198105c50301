"""The run directory: what compute writes and what reports, figures and analyses read.

    config.yaml  manifest.json  results.json  report.html  figures/  rollouts/DOMAIN/MODEL.jsonl
    tables/   cells, curves, attribution_*, or geometry_*, probe_*, forecast_*.parquet; audit.json, gradient_cosines-*.json
    tensors/  jets-*, scores-*, attribution-*.safetensors; tokens-*.parquet; updates/, quadratic/ of a forecast

Every file is written beside its place as `NAME.part` and renamed, so a file that exists is whole. A run works in
`RUN.part/`, which an interrupted command finds again, and becomes `RUN/` in one rename when it is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from interference.errors import InputError, nearest
from interference.schemas import ATTRIBUTION as ATTRIBUTION
from interference.schemas import FORECAST as FORECAST
from interference.schemas import GEOMETRY as GEOMETRY
from interference.schemas import MODULES as MODULES
from interference.schemas import PROBES as PROBES

SCHEMA = 1
_VERSIONED = ("interference", "torch", "transformers", "numpy", "scipy", "pandas", "safetensors", "trl")


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path` so that a reader sees the old file or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def write_json(path: Path, value: object) -> Path:
    """Write strict JSON (NaN is an error: a record says null where there is no number)."""
    return write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a table as parquet, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    table.to_parquet(part, index=False)
    part.replace(path)
    return path


def digest(value: object) -> str:
    """A short, stable name of a JSON-able value.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """A short name of a file's content."""
    with path.open("rb") as file:
        sha = hashlib.sha256()
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:16]


@dataclass(frozen=True)
class Run:
    """A finished run directory, read only.

    Raises InputError (on `open`) for a folder that is not a finished run.
    """

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    results: dict[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        folder = Path(path)
        missing = [n for n in ("config.yaml", "manifest.json", "results.json") if not (folder / n).is_file()]
        if missing:
            resume = "run the same `interference` command again to finish it, it resumes"
            other = "give the `output` folder of a finished `interference diagnose`, `geometry`, `probe` or `forecast`"
            raise InputError(
                got=f"{folder}, which has no {missing[0]}",
                expected="the directory of a finished run",
                remedy=resume if folder.with_name(folder.name + ".part").is_dir() else other,
            )
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            return cls(folder, config, read_json(folder / "manifest.json"), read_json(folder / "results.json"))
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(
                got=f"{folder} with an unreadable record ({error})",
                expected="records as `interference` wrote them",
                remedy="delete the folder and run the command again",
            ) from error

    def cells(self) -> pd.DataFrame:
        """One row per (objective, update, domain)."""
        return pd.DataFrame(self.results["cells"])

    def curves(self) -> pd.DataFrame:
        """One row per (objective, update, domain, alpha)."""
        return pd.read_parquet(self.path / "tables" / "curves.parquet")

    def attribution(self, part: str, objective: str | None = None) -> pd.DataFrame:
        """The predicted changes split into their parts, one row each; empty where the run has no such table.

        `first` and `second` are a part's contributions at coefficient 1, in the objective's unit; a part's predicted change
        is their sum, and a cell's is the sum over "modules".

        Args:
            part: "modules", "heads", "channels" or "tokens" (of example responses); `ATTRIBUTION` has the columns.
            objective: read the rows of this one alone, since tables of channels can be long.

        Raises:
            InputError: an unknown part.
        """
        _check_known("part", part, ATTRIBUTION, "a part into which changes are split")
        path = self.path / "tables" / f"attribution_{part}.parquet"
        if not path.is_file():
            return pd.DataFrame(columns=["objective", "update", "domain", *ATTRIBUTION[part]])
        return pd.read_parquet(path, filters=None if objective is None else [("objective", "==", objective)])

    def geometry(self, name: str) -> pd.DataFrame:
        """One table of a run of `interference geometry`; empty where the run has no such table.

        Args:
            name: such as "norms", "masks" or "cosines"; `GEOMETRY` has all of them and their columns.

        Raises:
            InputError: an unknown table.
        """
        return self._table("geometry", name, GEOMETRY)

    def probe(self, name: str) -> pd.DataFrame:
        """One table of a run of `interference probe`; empty where the run has no such table.

        Args:
            name: such as "kl", "gains" or "verification"; `PROBES` has all of them and their columns.

        Raises:
            InputError: an unknown table.
        """
        return self._table("probe", name, PROBES)

    def forecast(self, name: str) -> pd.DataFrame:
        """One table of a run of `interference forecast` ("path": of the virtual trainings); InputError for an unknown one."""
        return self._table("forecast", name, FORECAST)

    def _table(self, command: str, name: str, known: Mapping[str, tuple[str, ...]]) -> pd.DataFrame:
        _check_known("table", name, known, f"a table of `interference {command}`")
        path = self.path / "tables" / f"{command}_{name}.parquet"
        return pd.read_parquet(path) if path.is_file() else pd.DataFrame(columns=list(known[name]))


def _check_known(what: str, name: str, known: Mapping[str, object], expected: str) -> None:
    if name not in known:
        raise InputError(got=f"{what} {name!r}", expected=expected, remedy=nearest(name, known))


@dataclass
class Workspace:
    """A run being made: `RUN.part/` with a cache of finished stages, renamed to `RUN/` at the end.

    `identity` is everything that decides the result (configuration and fingerprints of all inputs); `stages`, the part of it
    that decides the cached stages. A run of another identity is refused, so neither a finished nor a half-finished run is
    ever silently reused for another request.
    """

    final: Path
    identity: Mapping[str, Any]
    stages: Mapping[str, Any]
    overwrite: bool = False

    @property
    def path(self) -> Path:
        return self.final.with_name(self.final.name + ".part")

    def finished(self) -> bool:
        """True when the very same run is already there; InputError when another one is."""
        if not self.final.exists():
            return False
        known = self.final / "manifest.json"
        same = known.is_file() and read_json(known).get("identity") == digest(self.identity)
        if same and not self.overwrite:
            return True
        if self.overwrite and (known.is_file() or not any(self.final.iterdir())):
            return False
        raise InputError(
            got=f"output {self.final}, which holds " + ("another run" if known.is_file() else "something else"),
            expected="a new folder, or the folder of this very configuration and these very inputs",
            remedy="choose another `output`" + (", or pass --overwrite" if known.is_file() else ""),
        )

    def begin(self) -> bool:
        """Make or resume `RUN.part/`; returns True when it resumes.

        Raises InputError for an unfinished run of another request, and for an output that cannot be written.
        """
        mark = self.path / "stages.json"
        if self.path.exists():
            if mark.is_file() and read_json(mark)["digest"] == digest(self.stages):
                return True
            if not mark.is_file() or not self.overwrite:
                raise InputError(
                    got=f"{self.path}, an unfinished run of another configuration or of inputs that changed since",
                    expected="nothing there, or this very run interrupted",
                    remedy="delete that folder or choose another `output`" + (", or pass --overwrite" * mark.is_file()),
                )
            shutil.rmtree(self.path)
        try:
            write_json(mark, {"digest": digest(self.stages), "started": time.time(), "of": dict(self.stages)})
        except OSError as error:
            raise InputError(
                got=f"output {self.final}, where nothing can be written ({error.strerror})",
                expected="a place for a new folder",
                remedy="choose another `output`",
            ) from error
        return False

    @property
    def started(self) -> float:
        """When the run was first begun, in seconds since the epoch."""
        return float(read_json(self.path / "stages.json")["started"])

    def describe(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, which makes the folder a run that can be opened."""
        write_json(self.path / "manifest.json", {**manifest, "identity": digest(self.identity)})

    def finish(self) -> Path:
        """Move the run to its place."""
        replaced = None
        if self.final.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f"{self.final.name}.replaced-", dir=self.final.parent))
            self.final.rename(replaced / self.final.name)
        self.path.rename(self.final)
        if replaced is not None:
            shutil.rmtree(replaced)
        return self.final


def provenance() -> dict[str, Any]:
    """Versions, git state and host, for the manifest."""
    versions = {}
    for name in _VERSIONED:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "package": "interference",
        "version": versions.get("interference", "unknown"),
        "git": _git(),
        "versions": versions,
        "host": {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()},
    }


def timing(started: float, seconds: float) -> dict[str, Any]:
    """When a run was begun and finished, and how long its last session took, for the manifest."""
    form = "%Y-%m-%dT%H:%M:%SZ"
    return {
        "status": "finished",
        "started": time.strftime(form, time.gmtime(started)),
        "finished": time.strftime(form, time.gmtime()),
        "seconds": round(seconds, 1),
    }


def _git() -> dict[str, Any] | None:
    """The commit of this package's own checkout, if it runs from one."""
    here = Path(__file__).resolve().parent
    try:
        run = lambda *a: subprocess.run(  # noqa: E731
            ["git", "-C", str(here), *a], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        if Path(run("rev-parse", "--show-toplevel")) != here.parent:
            return None
        return {"sha": run("rev-parse", "HEAD"), "dirty": bool(run("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
