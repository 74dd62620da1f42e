"""`assay list`: what there is to run, each with the first line of its docstring."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audits import golden_jobs, side_by_side, weights
from audits.cases import SHIPPED_FOLDER, TRACES_FOLDER
from audits.catalogue import contracts
from engine.metal.errors import MetalError
from engine.metal.library import compile as compile_metal
from engine.metal.table import KERNELS
from goldens.fixture.tasks import TASKS
from reference import bounds

JOBS: dict[str, Callable[..., Any]] = {
    "run": side_by_side.audit_case,
    "weights": weights.check_weights,
    "golden verify": golden_jobs.verify,
    "golden diff": golden_jobs.diff,
}


def sections() -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Titles with rows of (name, one line)."""
    yield "jobs", [(name, _first_line(job)) for name, job in JOBS.items()]
    yield "contracts", [(name, f"{one.signature}: {_first_sentence(one.doc)}") for name, one in contracts().items()]
    ops = inspect.getmembers(bounds, inspect.isfunction)
    yield "ops with a derived error bound", [(name, _first_line(op)) for name, op in ops if not name.startswith("_")]
    yield "models", [("shipped", f"{SHIPPED_FOLDER.name}/ (goldens/model/README.md has its figures)")]
    yield "tasks of the shipped model", [(name, _first_line(task)) for name, task in TASKS.items()]
    names = sorted(p for p in TRACES_FOLDER.glob("*.h5") if not p.name.endswith(".pending.h5"))
    yield "goldens", [(p.stem, f"{p.name}, {p.stat().st_size:,} bytes") for p in names]


def kernels() -> Iterator[tuple[str, str]]:
    """Source and name of each of our own Metal kernels."""
    for path in sorted(KERNELS.glob("*.metal")):
        for name in compile_metal(path).kernels:
            yield path.name, name


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What came of compiling one kernel: its parameters in words, or the error."""

    parameters: str = ""
    error: str = ""


def check_kernels(
    source: Path, include_dirs: Sequence[Path], only: str, defines: Sequence[str], constants: Sequence[str]
) -> Iterator[tuple[str, Checked]]:
    """Compile every kernel of `source` whose name holds `only`, in checked mode; name and outcome of each.

    `defines` are NAME or NAME=VALUE, `constants` NAME=VALUE or INDEX=VALUE. Raises ValueError for others.
    """
    macros = {name: value if equals else None for name, equals, value in (word.partition("=") for word in defines)}
    library = compile_metal(
        source, checked=True, include_dirs=include_dirs, defines=macros, constants=dict(map(_constant, constants))
    )
    for name in library.kernels:
        if only in name:
            try:
                told = ", ".join(
                    f"{p.kind}({p.index}) {p.name}" for p in library[name].parameters if p.kind != "builtin"
                )
                yield name, Checked(parameters=told or "no arguments")
            except MetalError as error:
                yield name, Checked(error=" ".join(str(error).split()))


def _constant(word: str) -> tuple[int | str, object]:
    """The name or index of a function constant and its value: true, false, a number, or numbers with commas (int2)."""
    name, _, text = (part.strip() for part in word.partition("="))
    try:
        value: object = {"true": True, "false": False}.get(text)
        if value is None:
            value = ast.literal_eval(text)
        parts = value if isinstance(value, tuple) else (value,)
        if not name or not all(isinstance(part, (int, float)) for part in parts):
            raise ValueError
    except (ValueError, SyntaxError):
        raise ValueError(
            f"--constant {word!r} is no NAME=VALUE or INDEX=VALUE, such as has_mask=true, 600=2 or 3=0.5"
        ) from None
    return int(name) if name.isdecimal() else name, value


def _first_line(thing: Any) -> str:
    """The first sentence of a docstring, in one line."""
    return _first_sentence((inspect.getdoc(thing) or "").partition("\n\n")[0]).partition("; ")[0]


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(". ")[0].rstrip(".")
