"""Survey: the weight-space geometry of N tuned models against their base, tensor by tensor, resumable.

Every tensor leaves a file in the run's folder when it is done; an interrupted survey goes on with the next one. The tables are
made of these files at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file

from interference.checkpoint import Checkpoint
from interference.errors import InputError
from interference.geometry import audits, neurons, spectral, tables
from interference.geometry.labels import Part, outline
from interference.geometry.projection import DIMS, Projection
from interference.geometry.settings import Settings
from interference.geometry.stream import READ, Source, tensor_sums
from interference.geometry.sums import Array, Sums
from interference.geometry.tables import Counted
from interference.pairing import Base, Finding, Pair, stop_at_fatal
from interference.tree import LowRank

Say = Callable[[str], None]
_KINDS = ("channel", "head")


@dataclass(frozen=True)
class Survey:
    """A survey being made: checkpoints, the tensors they share and where these belong, and what was found about the pairs."""

    base: Base
    tuned: Mapping[str, Pair]
    parts: Mapping[str, Part]
    notes: tuple[str, ...]
    settings: Settings
    findings: list[tuple[str, Finding]]

    @classmethod
    def of(cls, base: Checkpoint, tuned: Mapping[str, Checkpoint], settings: Settings) -> Survey:
        """Check the pairs and lay out the model.

        Raises InputError for no tuned model and for pairs that cannot be compared.
        """
        if not tuned:
            raise InputError(got="no tuned model", expected="at least one", remedy="give BASE and one or more TUNED")
        opened = Base.of(base)
        pairs = {name: opened.pair(c) for name, c in tuned.items()}
        findings = [(name, f) for name, pair in pairs.items() for f in pair.findings]
        stop_at_fatal(f for _, f in findings)
        stored = opened.parameters
        numbers = {
            n: stored.dtype(n).startswith(("F", "BF")) and bool(np.prod(stored.shape(n))) for n in stored.names()
        }
        names = [n for n, taken in numbers.items() if taken and stored.shape(n)]
        parts, notes = outline(opened, names)
        left_out = [n for n in stored.names() if n not in parts]
        if left_out:
            notes = (*notes, f"left out, being no arrays of floating-point numbers: {', '.join(left_out)}"[:500])
        return cls(opened, pairs, parts, notes, settings, findings)

    @property
    def models(self) -> list[str]:
        """Names of the tuned models."""
        return list(self.tuned)

    def tables(self, folder: Path, say: Say = lambda _: None) -> dict[str, pd.DataFrame]:
        """Every table of the survey by name (`records.GEOMETRY`), made of the files in `folder`, which are added where missing.

        Raises InputError for weights that are not finite and for a model that does not differ from the base.
        """
        counted, projected = self._stream(folder, say)
        found = [*self.findings, *audits.of_models(self.models, counted)]
        stop_at_fatal(f for _, f in found)
        out = {"norms": tables.norms(self.models, counted)}
        out["masks"], out["consensus"] = tables.overlaps(self.models, counted)
        out["cosines"] = tables.cosines(self.models, counted, projected)
        out["neurons"] = units(self.models, counted)
        out["neuron_overlap"] = _top_sets(self.models, out["neurons"], self.settings.top)
        shapes = {n: self.base.parameters.shape(n) for n in self.parts}
        out |= spectral.survey(self.parts, shapes, self._whole, self.settings, folder, say)
        out["audits"] = pd.DataFrame(
            [
                {"model": m, "check": f.check, "severity": f.severity, "tensor": f.tensor, "message": f.message}
                for m, f in found
            ],
            columns=["model", "check", "severity", "tensor", "message"],
        )
        return out

    def _stream(self, folder: Path, say: Say) -> tuple[list[Counted], Array]:
        """Every tensor's sums, and the cosines after projection (seeds, N, N)."""
        paths = {name: folder / "tensors" / f"sums-{i:05d}.safetensors" for i, name in enumerate(self.parts)}
        size = {n: int(np.prod(self.base.parameters.shape(n), dtype=int)) for n in self.parts}
        done, whole = sum(size[n] for n, path in paths.items() if path.is_file()), max(1, sum(size.values()))
        numbers = (
            READ // torch.get_num_threads() // (1 + len(self.tuned))
        )  # so that memory does not grow with cores or models
        for name in _at_once(
            partial(self._make, numbers), {n: path for n, path in paths.items() if not path.is_file()}
        ):
            done += size[name]
            say(f"{100 * done // whole:3d} %  {name}")
        counted, projected = [], np.zeros((self.settings.projections, len(self.tuned), DIMS))
        for name, path in paths.items():
            arrays = load_file(path)
            projected += arrays.pop("projected")
            counted.append(Counted(name, self.parts[name], _unpacked(arrays)))
            stop_at_fatal(audits.not_finite(name, counted[-1].sums, self.models))
        return counted, _cosines(projected)

    def _make(self, numbers: int, name: str, path: Path) -> None:
        save(path, self._sums(name, self.parts[name], numbers))

    def _sums(self, name: str, part: Part, numbers: int) -> dict[str, Array]:
        seeds = range(self.settings.seed, self.settings.seed + self.settings.projections)
        projection = Projection(seeds) if seeds else None
        stored = self.base.parameters
        sources = [_source(pair, name) for pair in self.tuned.values()]
        sums = tensor_sums(name, stored.shape(name), stored.reader(name), sources, part.axes, projection, numbers)
        arrays = {f.name: np.asarray(getattr(sums, f.name)) for f in fields(Sums)}
        empty = np.zeros((len(seeds), len(self.tuned), DIMS))
        return arrays | {"projected": projection.sums.numpy() if projection and projection.sums is not None else empty}

    def _whole(self, name: str) -> tuple[torch.Tensor, dict[str, spectral.Moved]]:
        """A parameter of the base, and how to read that of every tuned model, or make the factors of its change."""
        before = self.base.parameters.tensor(name)
        return before, {model: partial(_moved, pair, name, before) for model, pair in self.tuned.items()}


def _at_once(make: Callable[[str, Path], None], work: Mapping[str, Path]) -> Iterator[str]:
    """Make the files, as many at once as torch may use threads; gives the name of each when it is done."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        jobs = {pool.submit(make, name, path): name for name, path in work.items()}
        for job in as_completed(jobs):
            job.result()
            yield jobs[job]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _source(pair: Pair, name: str) -> Source:
    """A tuned model's side of a parameter: its values, or an adapter's change."""
    if pair.after is not None:
        return Source(pair.after.reader(name))
    if name not in pair.terms:
        shape = pair.before.shape(name)
        return Source(lambda start, stop: torch.zeros(stop - start, *shape[1:]), change=True)
    change = pair.change(name)
    if isinstance(change, LowRank):
        return Source(lambda start, stop: LowRank(change.up[start:stop], change.down).dense(), change=True)
    return Source(lambda start, stop: change[start:stop], change=True)


def _moved(pair: Pair, name: str, before: torch.Tensor) -> torch.Tensor | LowRank:
    if pair.after is not None:
        return pair.after.tensor(name)
    if name not in pair.terms:
        return before
    change = pair.change(name)
    return (
        change if isinstance(change, LowRank) else before.to(torch.promote_types(before.dtype, torch.float32)) + change
    )


def _top_sets(models: Sequence[str], found: pd.DataFrame, top: Sequence[float]) -> pd.DataFrame:
    """The table `neuron_overlap`."""
    wide = found.pivot_table(index=["kind", "layer", "expert", "unit"], columns="model", values="change", sort=False)
    kinds, layers = (wide.index.get_level_values(level).to_numpy() for level in ("kind", "layer"))
    changes = wide.reindex(columns=list(models)).to_numpy().T if len(wide) else np.zeros((len(models), 0))
    return neurons.neuron_overlap(models, changes, kinds, layers, top)


def save(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays so that a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part)
    part.replace(path)


def _unpacked(arrays: dict[str, Array]) -> Sums:
    shape = arrays.pop("shape")
    plain = {"numel": int(arrays.pop("numel").item()), "base_square": float(arrays.pop("base_square").item())}
    return Sums(shape=(int(shape[0]), int(shape[1])), **plain, **arrays)  # type: ignore[arg-type]


def _cosines(projected: Array) -> Array:
    if not len(projected):
        return np.zeros((0, projected.shape[1], projected.shape[1]))
    whole = Projection(range(len(projected)))
    whole.sums = torch.from_numpy(projected)
    return whole.cosines()


def units(models: Sequence[str], counted: Sequence[Counted]) -> pd.DataFrame:
    """The table `neurons`: how far every MLP channel and attention head moved, over all the tensors it runs through."""
    frames = []
    for c in counted:
        for kind in _KINDS:
            number = c.part.units[kind]
            if (number < 0).all():
                continue
            about = pd.DataFrame({"layer": c.part.units["layer"], "expert": c.part.units["expert"], "unit": number})
            about["kind"] = kind if kind == "channel" else np.where(c.part.units["kind"] == 1, "key_value head", "head")
            for k, model in enumerate(models):
                frames.append(about.assign(model=model, square=c.sums.units[k], base=c.sums.base_units))
    columns = ["kind", "layer", "expert", "unit", "model"]
    if not frames:
        return pd.DataFrame(columns=[*columns, "change", "relative"])
    whole = pd.concat(frames)
    whole = whole[whole["unit"] >= 0].groupby(columns, sort=False)[["square", "base"]].sum().reset_index()
    change = np.sqrt(whole.pop("square"))
    base = np.sqrt(whole.pop("base"))
    return whole.assign(change=change, relative=change / base.where(base > 0))
