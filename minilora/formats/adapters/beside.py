"""What a run of `minilora train` wrote beside its adapter, for which PEFT's files have no place: the classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Classes", "classes_beside"]

RUN = "run.json"


class Classes(NamedTuple):
    """The names of the classes in order, and transformers' word for the problem; None where nothing is said."""

    names: list[str] | None = None
    problem_type: str | None = None


def classes_beside(adapter: Path) -> Classes:
    """What run.json beside an adapter says of its classes; nothing where there is none, or it is damaged."""
    path = (adapter if adapter.is_dir() else adapter.parent) / RUN
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
        names, kind = said.get("labels"), said.get("problem_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        return Classes()
    fits = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return Classes(list(names) if fits else None, kind if isinstance(kind, str) else None)
