"""`python -m paper_repro.forecast_study run --out runs/forecast-study [--role development] [--setup NAME ...]`, then `score`."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Optional

import typer

from interference.errors import InputError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Forecasts against real trainings on many set-ups.")
OUT = Path("runs/forecast-study")
Names = Annotated[Optional[list[str]], typer.Option("--setup", help="Only these set-ups.")]  # noqa: UP045  typer reads it
Role = Annotated[str | None, typer.Option(help="Only the set-ups of this role: development, heldout or confirmation.")]


@app.callback()
def _main() -> None:
    # Before torch and transformers are imported, which read these once. One thread for trainings and forecasts alike.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Where set-ups leave their stages; finished ones are reused.")] = OUT,
    setup: Names = None,
    role: Role = None,
    trainings_only: Annotated[bool, typer.Option(help="Train and measure; forecast in a later run.")] = False,
) -> None:
    """Train, measure and forecast. May be interrupted, and run by several processes at once."""
    import torch
    import transformers

    from paper_repro.forecast_study.run import run as run_setups
    from paper_repro.forecast_study.setups import find

    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    try:
        finished = run_setups(
            find(setup, role), out, lambda text: _say(f"{time.perf_counter() - started:6.0f} s  {text}"),
            trainings_only=trainings_only,
        )  # fmt: skip
    except InputError as error:
        raise _refused(error) from None
    except KeyboardInterrupt:
        _say(f"interrupted; the same command goes on from the finished stages in {out}")
        raise typer.Exit(130) from None
    _say(f"finished: {', '.join(finished) or 'nothing'}")


@app.command()
def score(
    out: Annotated[Path, typer.Option(help="The folder given to `run`.")] = OUT,
    results: Annotated[Path, typer.Option(help="Where the tables go.")] = Path(__file__).parent / "results",
    setup: Names = None,
    role: Role = None,
) -> None:
    """Tables and figures of all finished set-ups."""
    from figures import save
    from figures.forecast_study import forecast_study_pages
    from paper_repro.forecast_study.report import write_results

    command = shlex.join(["python", "-m", "paper_repro.forecast_study", *sys.argv[1:]])
    try:
        tables = write_results(out, results, names=setup, role=role, command=command)
    except InputError as error:
        raise _refused(error) from None
    for name, figure in forecast_study_pages(tables).items():
        save(figure, results, name)
    _say(f"tables and figures: {results}")


@app.command(name="list")
def show() -> None:
    """Names and roles of the set-ups."""
    from paper_repro.forecast_study.setups import SETUPS

    for name, setup in SETUPS.items():
        typer.echo(f"{name:24} {setup.role:12} lengths {', '.join(map(str, setup.lengths))}")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _refused(error: InputError) -> typer.Exit:
    _say(f"error: {error}")
    return typer.Exit(2)


if __name__ == "__main__":
    app()
