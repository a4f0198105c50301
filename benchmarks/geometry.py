"""Time and memory of the streamed geometry beside those of reading the same files, on generated sharded bf16 checkpoints.

    python -m benchmarks.geometry [--size 1.2b] [--models 4] [--threads 1] [--folder runs/bench/geometry] [--out FILE.json]

Each side runs in a process of its own, so that its peak resident memory is its own: reading base and one tuned model through
safetensors into float32; norms, masks, cosines and neurons of one, and of N tuned models in one pass, and of N one after the
other; the same with the command's four random projections; the spectral part on one layer. docs/benchmarks.md has the rest.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # called as a file: the repository's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

SHAPES = {  # layers, hidden, intermediate, query heads, key-value heads, vocabulary
    "tiny": (2, 64, 128, 4, 2, 256),
    "0.1b": (6, 768, 2048, 12, 4, 32768),
    "1.2b": (16, 2048, 8192, 32, 8, 128256),
}
SHARD = 5 * 10**8  # bytes
SIDES = ("read", "one", "all", "separate", "projected", "all_projected", "separate_projected", "spectra")


def generate(folder: Path, size: str, models: int) -> None:
    """A random base in bf16 shards, and tuned models in which three weights in ten moved by a unit or two in the last place."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, hidden, wide, heads, groups, vocabulary = SHAPES[size]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, dtype=torch.bfloat16) * 0.02)
    original = [p.detach().clone() for p in model.parameters()]
    for number in range(models + 1):
        name = "base" if number == 0 else f"tuned{number}"
        generator = torch.Generator().manual_seed(number)
        for p, first in zip(model.parameters(), original, strict=True):
            p.data.copy_(first)
            if number:
                _nudge(p.data, generator)
        model.save_pretrained(folder / f"{name}.part", max_shard_size=SHARD)
        (folder / f"{name}.part").rename(folder / name)


def _nudge(x: Any, generator: Any) -> None:
    import torch

    for part in x.reshape(-1).split(1 << 24):
        moved = torch.rand(part.shape, generator=generator) < 0.3
        part.mul_(
            torch.where(moved, 1.0 + 0.008 * torch.sign(torch.rand(part.shape, generator=generator) - 0.5), 1.0).to(
                part
            )
        )


def read(folder: Path) -> None:
    """The unit: base and one tuned model through safetensors into float32, a tensor at a time."""
    from safetensors import safe_open

    for name in ("base", "tuned1"):
        for shard in sorted((folder / name).glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    file.get_tensor(key).float()


def survey(folder: Path, numbers: list[int], **settings: Any) -> None:
    """Our side: every table but the spectral ones, unless asked."""
    from interference.checkpoint import Checkpoint
    from interference.geometry import Settings, Survey

    tuned = {f"tuned{i}": Checkpoint.open(folder / f"tuned{i}") for i in numbers}
    made = Survey.of(
        Checkpoint.open(folder / "base"), tuned, Settings(**{"projections": 0, "spectra": "none"} | settings)
    )
    if made.settings.spectra != "none":
        made = replace(made, parts={n: part for n, part in made.parts.items() if part.layer == 0})
    with tempfile.TemporaryDirectory() as scratch:
        made.tables(Path(scratch))


def separately(folder: Path, numbers: list[int], **settings: Any) -> None:
    """One survey for each tuned model."""
    for number in numbers:
        survey(folder, [number], **settings)


def side(name: str, folder: Path, models: int, threads: int) -> dict[str, Any]:
    """Run one side here and measure it; imports do not count, those of transformers' model code included."""
    import numpy  # noqa: F401
    import pandas  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    import interference.geometry  # noqa: F401

    with torch.device("meta"):
        AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1))

    torch.set_num_threads(threads)
    every = list(range(1, models + 1))
    sides: dict[str, Callable[[], None]] = {
        "read": lambda: read(folder),
        "one": lambda: survey(folder, [1]),
        "all": lambda: survey(folder, every),
        "separate": lambda: separately(folder, every),
        "projected": lambda: survey(folder, [1], projections=4),
        "all_projected": lambda: survey(folder, every, projections=4),
        "separate_projected": lambda: separately(folder, every, projections=4),
        "spectra": lambda: survey(folder, [1], spectra="auto"),
    }
    work = sides[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"wall_s": wall, "cpu_s": cpu, "peak_mib": peak / 1024, "imports_mib": before / 1024}


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """All sides, interleaved in rounds; the fastest round of each counts."""
    from interference.records import provenance

    folder = arguments.folder / arguments.size
    if not (folder / f"tuned{arguments.models}").is_dir():
        print("generating", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        generate(folder, arguments.size, arguments.models)
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only or SIDES}
    for number in range(arguments.rounds):
        for name, taken in samples.items():
            print(f"round {number + 1} of {arguments.rounds}: {name}", file=sys.stderr, flush=True)
            taken.append(_in_process(name, folder, arguments))
    best = {name: min(taken, key=lambda s: s["wall_s"]) | {"rounds": taken} for name, taken in samples.items()}
    for row in best.values():
        row["times_reading"] = row["wall_s"] / best["read"]["wall_s"] if "read" in best else None
    size = sum(p.stat().st_size for p in (folder / "base").glob("*.safetensors"))
    settings = {k: str(v) for k, v in vars(arguments).items()} | {
        "bytes_per_model": size,
        "shape": SHAPES[arguments.size],
    }
    return {"settings": settings, "sides": best, **provenance()}


def _in_process(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.geometry", "--side", name, "--folder", str(folder)]
    command += ["--models", str(arguments.models), "--threads", str(arguments.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", choices=SHAPES, default="1.2b")
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/geometry"))
    parser.add_argument("--only", action="append", choices=SIDES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(side(arguments.side, arguments.folder, arguments.models, arguments.threads)))
        return
    from interference.records import write_json

    found = benchmark(arguments)
    for name, row in found["sides"].items():
        print(
            f"{name:10s} {row['wall_s']:8.2f} s  {row['times_reading'] or 0:6.2f} x reading  peak {row['peak_mib']:7.0f} MiB"
        )
    print(write_json(arguments.out or Path(f"runs/bench/geometry-{arguments.size}.json"), found))


if __name__ == "__main__":
    main()
