"""Draw the figures of a run and fill the page of its kind."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from interference.errors import InputError, nearest
from interference.records import Run, write_text
from interference.report import behaviour, diagnosis, forecast, geometry
from interference.report.examples import style_sheet

_PAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "diagnose": diagnosis.page,
    "geometry": geometry.page,
    "probe": behaviour.page,
    "forecast": forecast.page,
}
"""What fills COMMAND.html, by the command that made the run."""


def write(run_dir: Path) -> Path:
    """See `interference.report.write_report`."""
    run = Run.open(run_dir)
    command = str(run.results.get("command", "diagnose"))
    if command not in _PAGES:
        raise InputError(
            got=f"{run_dir}, a run of `interference {command}`",
            expected="a run of a command that has a report",
            remedy=nearest(command, _PAGES),
        )
    style = Markup(_resource("style.css") + style_sheet())
    page = _environment().get_template(f"{command}.html").render(style=style, **_PAGES[command](run))
    return write_text(run.path / "report.html", page)


def _environment() -> Environment:
    look: dict[str, Any] = {
        "autoescape": True,
        "undefined": StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
    }
    return Environment(loader=FunctionLoader(_resource), **look)


def _resource(name: str) -> str:
    return files("interference.report").joinpath(name).read_text(encoding="utf-8")
