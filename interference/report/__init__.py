"""The report: one self-contained HTML page from the records of a run, with the figures beside it."""

from __future__ import annotations

import os
from pathlib import Path


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Draw `RUN/figures/*.{svg,png}` and write `RUN/report.html` from the records of a finished run; returns the page's path.

    The page holds everything (style, vector figures, tables), needs no script and no network, and reads nothing but records:
    drawing it again changes no number. Each file is written whole or not at all.

    Raises:
        InputError: `run_dir` is not the directory of a finished run, or the run is of a command that has no report.
    """
    from interference.report.render import write  # matplotlib is not loaded before it is needed

    return write(Path(run_dir))


__all__ = ["write_report"]
