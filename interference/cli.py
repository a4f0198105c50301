"""The command line: `interference forecast`, `diagnose` or `probe RUN.yaml`, `audit MODEL`, `geometry BASE TUNED...`,
`report DIR`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from typer.core import TyperGroup

from interference import __version__
from interference.errors import InputError
from interference.printing import console, plain, print_audit, print_forecast, print_notes, print_scores

Dtype = Literal["float32", "float64"]
Attention = Literal["eager", "sdpa"]
Spectra = Literal["auto", "svd", "gram", "randomized", "none"]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what the run directory holds.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the report's path.")]
_INTERRUPTED = 130  # the exit code of a command that the keyboard stopped


class _Commands(TyperGroup):
    """The commands; an interrupt says how to go on. typer itself would end with exit code 130 and no word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            _say_interrupted()
            raise typer.Exit(_INTERRUPTED) from interrupt


app = typer.Typer(
    cls=_Commands,
    name="interference",
    help="Predict, explain and repair cross-domain interference in language-model post-training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Entry point: a mistake in the input ends with one clear line and exit code 2."""
    # Before torch is imported: threads that sleep while they wait. On busy cores spinning ones cost ten times the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except InputError as error:
        console.print(f"[bold red]error:[/] {plain(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(_INTERRUPTED)


def _say_interrupted() -> None:
    console.print("interrupted; run the same command again to go on")


def _version(show: bool) -> None:
    if show:
        Console().print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Print the version.")] = False,
) -> None:
    pass


def _carried_out(work: Callable[..., Path], config: object, run: Path, overwrite: bool, quiet: bool) -> Path:
    """Do what a RUN.yaml asks; verifiers are looked up beside it and in the working directory."""
    _quieten()
    return work(config, search_path=(run.resolve().parent, Path.cwd()), overwrite=overwrite, say=_speaker(quiet))


@app.command()
def diagnose(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN.yaml", help="What to expand, on which domains, and where to write it."),
    ],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """How did each checkpoint's update change each domain, and does the local theory explain it?"""
    from interference.config import load_config

    config = load_config(run)
    from interference.diagnose import diagnose as work

    folder = _carried_out(work, config, run, overwrite, quiet)
    print_scores(folder, quiet)


@app.command()
def probe(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN.yaml", help="Which models, on which domains, and where to write it."),
    ],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """What did the models learn: which skills, how far from one another, how well do they judge themselves?"""
    from interference.probing.config import load_config

    config = load_config(run)
    from interference.probing.run import probe as work

    folder = _carried_out(work, config, run, overwrite, quiet)
    print_notes(folder, quiet)


@app.command()
def forecast(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN.yaml", help="Which trainings, on which domains, and where to write it."),
    ],
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """How would training on each domain change every domain, before any of it is trained?"""
    from interference.forecast_run.config import load_config

    config = load_config(run)
    from interference.forecast_run.run import forecast as work

    folder = _carried_out(work, config, run, overwrite, quiet)
    if not quiet:
        print_forecast(folder)
    print_notes(folder, quiet)


@app.command()
def audit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory, or a hub id.")],
    data: Annotated[Path | None, typer.Option("--data", metavar="JSONL", help="Sequences to check on.")] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="In which the model computes.")] = "float32",
    attention: Annotated[Attention, typer.Option("--attention", help="How the model computes it.")] = "eager",
    device: Annotated[str, typer.Option("--device", help="Such as cpu or cuda:0.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Only the cheap part, which `diagnose` runs.")] = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the record there.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sequences and directions.")] = 0,
) -> None:
    """Are the derivatives of this model right? Exit code 0 when every derivative mode is trusted, 2 when one is refused."""
    from interference.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(model)
    import torch

    from interference.checks import audit as check
    from interference.domain import Domain
    from interference.model import load

    _quieten()
    sequences = Domain.from_jsonl(data, tokenizer=checkpoint.tokenizer()) if data else None
    ready = load(checkpoint, dtype=getattr(torch, dtype), device=device, attention=attention)
    found = check(ready, sequences=sequences, level="quick" if quick else "full", seed=seed)
    if json:
        from interference.records import write_json

        write_json(json, found.to_dict())
    print_audit(found)
    found.raise_if_failed()


@app.command()
def geometry(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before training.")],
    tuned: Annotated[list[str], typer.Argument(metavar="TUNED...", help="Tuned models: NAME=PATH, or a path.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The run directory.")],
    projections: Annotated[
        int, typer.Option(help="Random projections for the replicated cosine; 0 leaves them out.")
    ] = 4,
    spectra: Annotated[Spectra, typer.Option(help="How matrices are decomposed; auto goes by size.")] = "auto",
    k: Annotated[int, typer.Option("--subspace", "-k", help="Dimensions of the subspaces that are compared.")] = 16,
    alpha: Annotated[float, typer.Option(help="Share of the base's weights in its principal and low masks.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Where did each model's weights move, do models move the same ones, and is that more than chance?"""
    from pydantic import ValidationError

    from interference.geometry.settings import Settings
    from interference.weight_shift import named, weight_shift

    try:
        settings = Settings(projections=projections, spectra=spectra, k=k, alpha=alpha, seed=seed)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            got=f"{first['loc'][0]} = {first['input']!r}",
            expected=first["msg"],
            remedy="see interference geometry --help",
        ) from error
    _quieten()
    folder = weight_shift(base, named(tuned), output, settings=settings, overwrite=overwrite, say=_speaker(quiet))
    Console().print(str(folder / "report.html"), soft_wrap=True, highlight=False)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished run directory.")],
) -> None:
    """Draw the figures and the report of a finished run again, from its records."""
    from interference.report import write_report

    Console().print(str(write_report(run_dir)), soft_wrap=True, highlight=False)


def _quieten() -> None:
    """Let transformers say nothing but errors."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _speaker(quiet: bool) -> Callable[[str], None]:
    started = time.time()

    def say(text: str) -> None:
        if not quiet:
            console.print(f"[dim]{time.time() - started:6.1f} s[/]  {plain(text)}", highlight=False)

    return say


if __name__ == "__main__":
    main()
