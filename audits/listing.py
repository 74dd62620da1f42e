"""`assay list`: what there is to run, each with the first line of its docstring."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from audits import golden_jobs, side_by_side, weights
from audits.cases import SHIPPED_FOLDER, TRACES_FOLDER
from goldens.fixture.tasks import TASKS
from reference import bounds

AUDITS: dict[str, Callable[..., Any]] = {
    "run": side_by_side.audit_case,
    "weights": weights.check_weights,
    "golden verify": golden_jobs.verify,
    "golden diff": golden_jobs.diff,
}


def sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Titles with rows of (name, one line)."""
    yield "audits", [(name, _first_line(audit)) for name, audit in AUDITS.items()]
    ops = inspect.getmembers(bounds, inspect.isfunction)
    yield "ops with a derived error bound", [(name, _first_line(op)) for name, op in ops if not name.startswith("_")]
    yield "models", [("shipped", f"{SHIPPED_FOLDER.name}/ (goldens/model/README.md has its figures)")]
    yield "tasks of the shipped model", [(name, _first_line(task)) for name, task in TASKS.items()]
    names = sorted(p for p in TRACES_FOLDER.glob("*.h5") if not p.name.endswith(".pending.h5"))
    yield "goldens", [(p.stem, f"{p.name}, {p.stat().st_size:,} bytes") for p in names]


def _first_line(thing: Any) -> str:
    """The first sentence of a docstring, in one line."""
    paragraph = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    return paragraph.partition(". ")[0].partition("; ")[0].rstrip(".")
