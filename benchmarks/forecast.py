"""What a forecast costs beside the trainings that it forecasts, both in this process, one after the other.

    python -m benchmarks.forecast [--setup qwen3-grpo] [--trained 2] [--folder runs/bench/forecast] [--out FILE.json]

A set-up of paper_repro/forecast_study: the first domains are trained for real, the mean of their processor seconds stands for
each of the others; then the gradient and the virtual tier forecast all domains. The base and its rollouts are made once and
not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any


def measure(name: str, folder: Path, trained: int) -> dict[str, Any]:
    """Processor seconds of training all domains to the nominal length, and of each tier with its share of them."""
    import torch

    from interference.records import provenance
    from paper_repro.forecast_study import predictions, trainings
    from paper_repro.forecast_study.setups import find
    from paper_repro.forecast_study.work import Work

    torch.set_num_threads(1)
    (setup,) = find([name])
    work = Work(setup, folder.resolve() / name, print)
    work.folder.mkdir(parents=True, exist_ok=True)
    trainings.make_base(work)
    for domain in setup.domains:
        trainings.sample_base(work, domain)
    seed, length = setup.training_seeds[-1], setup.nominal
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "lab").symlink_to(work.lab)
        real = Work(setup, Path(place), print)
        for domain in setup.domains[:trained]:
            trainings.train_domain(real, seed, domain)
        done = [record["training_cpu_seconds"] for record in real.finished().values()]
    steps = setup.kept(seed)[-1]
    training = sum(done) / len(done) * len(setup.domains) * length / steps
    out: dict[str, Any] = {"setup": name, "steps": length, "domains": len(setup.domains), "training_cpu": training}
    for tier in ("gradient", "virtual"):
        _, seconds, _ = predictions.timed_forecast(work, tier, length)
        out[tier] = {**seconds, "share_cpu": seconds["forecast_cpu"] / training}
    return {**out, "git": provenance()["git"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", default="qwen3-grpo")
    parser.add_argument("--trained", type=int, default=2, help="domains that are trained for real")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/forecast"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench/forecast.json"))
    given = parser.parse_args()
    found = measure(given.setup, given.folder, given.trained)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
