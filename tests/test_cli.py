"""The command line's exits: codes, usage errors and interrupts."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from interference.cli import app


@pytest.mark.parametrize(
    "error", ["KeyboardInterrupt", "interference.cli.InputError(got='x', expected='y', remedy='z')"]
)
def test_an_interrupt_says_how_to_go_on(error: str) -> None:
    code = (
        "import sys, interference.cli, interference.report\n"
        f"def stop(folder): raise {error}\n"
        "interference.report.write_report = stop\n"
        "sys.argv = ['interference', 'report', 'somewhere']\n"
        "interference.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    interrupted = error == "KeyboardInterrupt"
    assert done.returncode == (130 if interrupted else 2)
    assert ("run the same command again to go on" in done.stderr) == interrupted
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "geometry"),
        (["report", "--help"], 0, "RUN_DIR"),
        (["--version"], 0, "."),
        (["nothing"], 2, "No such command"),
        (["report"], 2, "Missing argument"),
        ([], 2, "Usage"),
    ],
)
def test_exit_codes(arguments: list[str], code: int, text: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == code
    assert text in done.output
