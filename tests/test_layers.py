"""Imports point down, and importing the package is quick and loads nothing heavy."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lowest first. A module may import from strictly lower levels only; modules of one level do not know each other.
LEVELS: list[set[str]] = [
    {"errors", "schemas", "configurations"},
    {"records", "statistics", "config"},
    {"tree", "formats"},
    {"kernels", "checksum"},
    {"taylor", "layout"},
    {"checkpoint", "domain", "rollouts"},
    {"conversion"},
    {"tied"},
    {"adapter"},
    {"pairing"},
    {"update", "model"},
    {"jets", "probe", "shared_prompts"},
    {"objectives", "anatomy", "truncation"},
    {"derivatives", "products", "quadratic", "inputs"},
    {"checks"},
    {"expansion", "cells"},
    {"measurement", "evaluation", "attribution"},
    {"remainder"},
    {"geometry"},
    {"probes"},
    {"stages", "forecasting"},
    {"report", "explanation"},
    {"diagnose", "weight_shift", "probing", "forecast_run", "printing"},
    {"cli"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}


def unit(path: Path) -> str:
    return path.relative_to(ROOT / "interference").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, also inside functions."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            out.add(node.module)
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
    return out


def files(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py"))


def upward(path: Path) -> list[str]:
    here = unit(path)
    used = {name.split(".")[1] for name in imported(path) if name.startswith("interference.")}
    return sorted(u for u in used & LEVEL.keys() if u != here and LEVEL[u] >= LEVEL[here])


@pytest.mark.parametrize("path", files("interference"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    if path.parent.name == "interference" and path.name == "__init__.py":
        return  # the root re-exports lazily
    assert unit(path) in LEVEL, f"give {path.name} a level"
    assert not upward(path)


def test_the_layer_test_can_fail(tmp_path: Path) -> None:
    assert "interference.cli" in imported(ROOT / "interference" / "diagnose.py") or LEVEL["cli"] > LEVEL["diagnose"]
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from interference.cli import app\n")
    assert "interference.cli" in imported(bad)


@pytest.mark.parametrize("path", files("interference"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_does_not_know_its_users(path: Path) -> None:
    """Only the report draws, so only it may import `figures`."""
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"analyses", "paper_repro", "trl", "benchmarks", "tests"}
    assert "figures" not in roots or unit(path) == "report"


@pytest.mark.parametrize("path", files("figures"), ids=lambda p: str(p.relative_to(ROOT)))
def test_figures_read_records_only(path: Path) -> None:
    names = imported(path)
    assert "torch" not in {n.split(".")[0] for n in names}
    own = {n.split(".")[1] for n in names if n.startswith("interference.")}
    assert own <= {"records", "errors"}


@pytest.mark.parametrize("module", ["interference", "interference.records", "figures"])
def test_imports_are_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_public_names() -> None:
    import interference

    assert len(interference.__all__) <= 12
    for name in interference.__all__:
        value = getattr(interference, name)
        assert callable(value) or inspect.ismodule(value), name
    # Submodules are nouns and functions verbs, so that importing a module never hides a function.
    import interference.expansion

    assert interference.expand is interference.expansion.expand
    with pytest.raises(AttributeError, match="no attribute 'expandd'"):
        interference.expandd  # noqa: B018
