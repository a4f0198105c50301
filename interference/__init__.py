"""Predict, explain and repair cross-domain interference in language-model post-training.

The public names are imported when first used, so that `import interference` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from interference import geometry
    from interference.checkpoint import Checkpoint
    from interference.checks import audit
    from interference.domain import Domain
    from interference.errors import InputError
    from interference.evaluation import evaluate
    from interference.expansion import expand
    from interference.forecasting.prediction import forecast
    from interference.measurement import measure
    from interference.quadratic import QuadraticModel
    from interference.update import Update

_HOME = {
    "Checkpoint": "checkpoint",
    "Update": "update",
    "Domain": "domain",
    "QuadraticModel": "quadratic",
    "InputError": "errors",
    "audit": "checks",
    "expand": "expansion",
    "measure": "measurement",
    "evaluate": "evaluation",
    "forecast": "forecasting.prediction",
}
_MODULES = ("geometry",)

__all__ = [
    "Checkpoint",
    "Domain",
    "InputError",
    "QuadraticModel",
    "Update",
    "audit",
    "evaluate",
    "expand",
    "forecast",
    "geometry",
    "measure",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"interference.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'interference' has no attribute {name!r}")
    value = getattr(import_module(f"interference.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
