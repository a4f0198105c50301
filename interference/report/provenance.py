"""What every report says at its end: settings, where the records come from, fingerprints of the inputs, how to replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interference.records import Run


def closing(run: Run, settings: Mapping[str, Any], replay: str) -> dict[str, Any]:
    """What the page's last sections need, by the names in base.html.

    `settings` are listed under "what was asked"; `replay` is the command that makes the run again.
    """
    return {
        "settings": _settings(settings),
        "provenance": _provenance(run),
        "fingerprints": _fingerprints(run.manifest.get("fingerprints") or {}),
        "notes": list(dict.fromkeys([*(run.results.get("notes") or []), *(run.manifest.get("notes") or [])])),
        "replay": replay,
    }


def home(run: Run) -> str:
    """Where the run will be found; it is still called NAME.part while its report is drawn."""
    return str(run.path.with_name(run.path.name.removesuffix(".part")))


def _settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every scalar or short entry of the settings."""
    out = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            simple = all(not isinstance(v, (Mapping, list)) for v in value)
            value = ", ".join(map(str, value)) if simple else f"{len(value)} entries (see config.yaml)"
        text = "none" if value is None or value == "" else str(value)
        out.append((key.replace("_", " "), text))
    return out


def _provenance(run: Run) -> list[tuple[str, str]]:
    m = run.manifest
    git = m.get("git") or {}
    sha = str(git.get("sha") or "unknown") + (" with uncommitted changes" if git.get("dirty") else "")
    took = m.get("seconds")
    return [
        ("package", f"{m.get('package', 'interference')} {m.get('version', '')}".strip()),
        ("git commit", sha),
        ("started", str(m.get("started") or "unknown")),
        ("finished", str(m.get("finished") or "unknown")),
        ("took", "unknown" if took is None else f"{took:g} seconds"),
        ("device", str(m.get("device") or "unknown")),
        ("dtype", str(m.get("dtype") or "unknown")),
        ("seed", "unknown" if m.get("seed") is None else str(m["seed"])),
        *([("derivative engine", str(m["engine"]))] if m.get("engine") else []),
        ("versions", ", ".join(f"{k} {v}" for k, v in (m.get("versions") or {}).items()) or "unknown"),
    ]


def _fingerprints(found: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for key, value in found.items():
        name = f"{prefix}{key}"
        out += _fingerprints(value, f"{name}: ") if isinstance(value, Mapping) else [(name, str(value))]
    return out
