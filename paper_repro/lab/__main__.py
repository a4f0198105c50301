"""`python -m paper_repro.lab build --out DIR [--world lpt] [--seed 0] [--steps N] [--quick]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from interference.errors import InputError
from paper_repro.lab.config import LabConfig, WorldName

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Small worlds for multi-domain RL.")


@app.callback()
def _main() -> None:
    """Small worlds for multi-domain RL."""


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="The lab's folder; finished stages in it are reused.")],
    world: Annotated[WorldName, typer.Option(help="Which domains there are.")] = "lpt",
    seed: Annotated[int, typer.Option(help="Decides data, initial weights, training and rollouts.")] = 0,
    steps: Annotated[float | None, typer.Option(min=1, help="Mean reasoning steps (world m2rl).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny world in seconds, for tests.")] = False,
) -> None:
    """Train a base and one model per domain, and write what `interference diagnose` needs."""
    # Before transformers is imported: it reads these once. Nothing here needs a network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
    # Threads that sleep while they wait: small models have short kernels, and on busy cores spinning cost 10x in time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import transformers

    from paper_repro.lab.build import build as build_lab
    from paper_repro.lab.config import quick as quick_config

    transformers.utils.logging.disable_progress_bar()
    console = Console(stderr=True)
    given: dict[str, Any] = {"world": world, "seed": seed} | ({} if steps is None else {"steps": steps})
    config = quick_config(**given) if quick else LabConfig(**given)
    try:
        with _bars(console) as bars:
            lab = build_lab(out, config, lambda name: _reporter(bars, name))
    except InputError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command goes on from the finished stages in {out}")
        raise typer.Exit(130) from None
    _show(Console(), lab)


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _reporter(bars: Progress, name: str) -> Any:
    task = bars.add_task(name, total=None)
    return lambda done, total: bars.update(task, completed=done, total=total)


def _show(console: Console, lab: Any) -> None:
    total = sum(lab.seconds.values())
    console.print(f"lab: {lab.path} (this build {lab.spent:.0f} s; all stages {total:.0f} s)", soft_wrap=True)
    for command in ("diagnose", "probe"):
        if (lab.path / f"{command}.yaml").exists():
            console.print(f"next: interference {command} {lab.path / f'{command}.yaml'}", soft_wrap=True)


if __name__ == "__main__":
    sys.exit(app())
