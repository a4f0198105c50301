"""How the analyses open the run that they read."""

from __future__ import annotations

import sys
from pathlib import Path

from interference.errors import InputError
from interference.records import Run


def open_run(path: Path, made_by: str) -> Run:
    """The run in a folder; where it cannot be opened, a message that ends the script instead of a traceback.

    made_by: the command that makes the run that is read by default.
    """
    try:
        return Run.open(path)
    except InputError as error:
        sys.exit(f"{error}\nThe run that this analysis reads by default is made by `{made_by}`.")
