"""Time, memory and precision of the token jets beside every other way to the same numbers, in one process and one run.

    python -m benchmarks.jets [--size medium] [--rounds 3] [--threads 1] [--device auto] [--out runs/bench/jets-medium.json]

Methods are interleaved in rounds and the minimum over rounds is taken; the unit is the fastest no-grad forward pass of the same
run. docs/benchmarks.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

if not __package__:  # called as a file: the repository's root is not on the path then
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import memory
from benchmarks.methods import Method, errors, methods, reference
from benchmarks.models import SIZES, lora_update, make
from benchmarks.table import show
from interference.model import pick_device
from interference.records import provenance, write_json

Row = dict[str, Any]


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def time_rounds(chosen: list[Method], state: str, rounds: int, device: torch.device) -> dict[str, Row]:
    """For each method its fastest of `rounds` calls in a state, and the wall time of all of them."""
    memory.enter(state, device)
    samples: dict[str, list[memory.Sample]] = {m.name: [] for m in chosen}
    for number in range(rounds + (state != "fresh")):
        say(f"{state}, round {number + (state == 'fresh')} of {rounds}")
        shift = number % len(chosen)  # so that no method always follows the same one
        for method in chosen[shift:] + chosen[:shift]:
            one = memory.sample(method.run, state, device)
            if state == "fresh" or number > 0:  # the first round of the others brings the pages
                samples[method.name].append(one)
    return {
        name: {
            "wall_s": min(s.wall_s for s in taken),
            "cpu_s": min(s.cpu_s for s in taken),
            "page_faults": min((s.page_faults for s in taken if s.page_faults is not None), default=None),
            "rounds_wall_s": [s.wall_s for s in taken],
        }
        for name, taken in samples.items()
    }


def relate(rows: list[Row], states: tuple[str, ...]) -> dict[str, Row]:
    """Add ratios to rows, by wall and by CPU time: forwards, times the fastest forward pass of the run in any state;
    times_faster_than_hvp, against the fastest HVP in the same state.

    Returns what they refer to. A family that was left out gives no ratios.
    """
    found: dict[str, Row] = {}
    for clock in ("wall_s", "cpu_s"):
        forward = min(
            ((r[s][clock], r["method"], s) for r in rows if r["family"] == "forward" for s in states), default=None
        )
        if forward is not None:
            found[f"forward, {clock}"] = {clock: forward[0], "method": forward[1], "state": forward[2]}
        for state in states:
            rival = min(((r[state][clock], r["method"]) for r in rows if r["family"] == "hvp"), default=None)
            if rival is not None:
                found[f"HVP, {clock}, {state}"] = {clock: rival[0], "method": rival[1]}
            for timed in (row[state] for row in rows):
                name = clock.removesuffix("_s")
                timed[f"forwards_{name}"] = None if forward is None else timed[clock] / forward[0]
                timed[f"times_faster_than_hvp_{name}"] = None if rival is None else rival[0] / timed[clock]
    peaks = {f: [r["peak_extra_bytes"] for r in rows if r["family"] == f] for f in ("forward", "hvp")}
    for family, values in peaks.items():
        least = min((v for v in values if v), default=None)  # zero is below what the kernel counts
        for row in rows:
            own = row["peak_extra_bytes"]
            row[f"peak_over_{family}"] = own / least if least and own is not None else None
    return found


def benchmark(arguments: argparse.Namespace) -> Row:
    """The whole measurement of one size."""
    device = pick_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    case = make(SIZES[arguments.size], device)
    lora = lora_update(case.model, arguments.rank)
    chosen = [m for m in methods(case, lora) if not arguments.only or any(o in m.name for o in arguments.only)]
    states = memory.states(device)
    timed = {state: time_rounds(chosen, state, arguments.rounds, device) for state in states}
    memory.enter(states[-1], device)
    rows: list[Row] = []
    say(f"reference: {arguments.reference}")
    truth = reference(case, lora) if arguments.reference == "nested" else None
    for m in chosen:
        row: Row = {"method": m.name, "family": m.family, "updates": m.updates}
        row |= {state: timed[state][m.name] for state in states}
        say(f"memory and precision: {m.name}")
        row["peak_extra_bytes"], result = memory.peak_extra(m.run, device)
        row["relative_error"] = {} if truth is None else errors(m.read(result), truth)
        del result
        rows.append(row)
    fastest = relate(rows, states)
    return {
        "settings": describe(arguments, case.model.parameters, device, states),
        "fastest": fastest,
        "methods": rows,
        **provenance(),
        "peer": peer(),
    }


def describe(
    arguments: argparse.Namespace, parameters: dict[str, torch.Tensor], device: torch.device, states: Any
) -> Row:
    """Everything that decides the numbers."""
    return {
        "size": arguments.size,
        "shape": asdict(SIZES[arguments.size]),
        "parameters": sum(p.numel() for p in parameters.values()),
        "dtype": "float32",
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "rank": arguments.rank,
        "reference": "nested jvp in float64" if arguments.reference == "nested" else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor(),
        "states": list(states),
        "allocator": memory.allocator(),
        "huge_pages": memory.huge_pages(),
        "load_average": memory.load(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "command": " ".join(["python -m benchmarks.jets", *sys.argv[1:]]),
    }


def processor() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return None


def peer() -> str | None:
    try:
        return "curvlinops-for-pytorch " + metadata.version("curvlinops-for-pytorch")
    except metadata.PackageNotFoundError:
        return None


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each method in each state")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, or auto")
    parser.add_argument("--rank", type=int, default=16, help="rank of the factored update")
    parser.add_argument(
        "--reference", choices=("nested", "none"), default="nested", help="what numbers are held against"
    )
    parser.add_argument("--only", action="append", help="only methods whose name holds this text (repeatable)")
    parser.add_argument("--out", type=Path, help="default: runs/bench/jets-SIZE.json")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> Path:
    arguments = parse(words)
    record = benchmark(arguments)
    show(record)
    out: Path = arguments.out or Path(f"runs/bench/jets-{arguments.size}.json")
    write_json(out, record)
    print(out)
    return out


if __name__ == "__main__":
    main()
