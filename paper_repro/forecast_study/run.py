"""Run set-ups. Forecasts read nothing that trainings left (but pilots theirs), so either may be made first."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

from interference import records
from interference.errors import InputError
from paper_repro.forecast_study import mixes, orders, predictions, tables, trainings
from paper_repro.forecast_study.setups import Setup
from paper_repro.forecast_study.work import Say, Work, claimed


def run(setups: Sequence[Setup], out: Path, say: Say = lambda _: None, *, trainings_only: bool = False) -> list[str]:
    """Work on set-ups one after another; the names of those that are finished now.

    Finished stages are reused. A set-up that cannot go on leaves its error in `stopped.json`, and the next one follows.
    Several processes can run the same command: each takes set-ups that no other works on.
    trainings_only: train and measure, and leave forecasts to another run; finished is then what is trained.

    Raises:
        InputError: a folder in `out` holds a set-up of other settings.
    """
    finished = []
    for setup in setups:
        with claimed(setup, out, say) as work:
            if work is None:
                say(f"{setup.name}: another process is at it")
                continue
            try:
                train_setup(work)
                if not trainings_only:
                    forecast_setup(work)
                    (work.folder / "stopped.json").unlink(missing_ok=True)
                finished.append(setup.name)
            except InputError as error:  # such as a base without any reward on a domain: reported, and the others go on
                say(f"{setup.name} stopped: {error}")
                records.write_json(work.folder / "stopped.json", {"error": str(error)})
        gc.collect()
    return finished


def train_setup(work: Work) -> None:
    """The base, its rollouts, all trainings (alone, in order, mixed), what fresh rollouts measure of them, and what is known once
    updates are: their quadratic models and the baselines."""
    setup = work.setup
    trainings.make_base(work)
    for domain in setup.domains:
        trainings.sample_base(work, domain)
    trainings.measure_model(work, None, "", 0)
    for seed in setup.training_seeds:
        for domain in setup.domains:
            trainings.train_domain(work, seed, domain)
        for length in setup.measured_lengths(seed):
            for update in setup.domains:
                trainings.measure_model(work, seed, update, length)
    predictions.gradient_cosines(work)
    for seed in setup.training_seeds:
        for length in setup.measured_lengths(seed):
            predictions.known_update(work, seed, length)
    if setup.order_steps:
        orders.train_orders(work)
    if setup.mixed:
        mixes.measure_mixes(work)


def forecast_setup(work: Work) -> None:
    """Forecasts of every tier, of orders and of mixtures, compared with the real updates; then the tables."""
    setup = work.setup
    for tier in predictions.TIERS:
        for length in setup.lengths:
            predictions.make_forecast(work, tier, length)
    for seed in setup.training_seeds:
        for length in setup.measured_lengths(seed):
            predictions.compare_updates(work, seed, length)
    if setup.order_steps:
        orders.forecast_orders(work)
        orders.write(work)
    if setup.mixed:
        mixes.forecast_mixes(work)
        mixes.write(work)
    tables.write(work)
