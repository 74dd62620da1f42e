"""Planted bugs: our own kernels with one edit each, and which check of the audit catches which.

A check that can't fail proves nothing. Each file in tests/mutants/moe_matmul/ is one bug: edits of the source, or a
wrong description of it, and the checks that must notice ("values": some token is outside its bound; "faults": the
checked run reports memory or synchronisation).
"""

from __future__ import annotations

import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audits.kernel_spec import KernelSpec, specs_of
from audits.moe_matmul import NAME, MatmulCase, build, run_case

CHECKS = ("values", "faults")
# Planted bugs of Python candidates lie in the same folder (audits/planted.py).
PYTHON = "python_"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One planted bug of a described source: textual edits (old, new, how often) and overrides of the description."""

    name: str
    title: str
    caught_by: tuple[str, ...]
    edits: tuple[tuple[str, str, int], ...]
    overrides: Mapping[str, Any]
    contract: str = NAME
    source: str = ""  # the published bug, if it is one


@dataclass(frozen=True, kw_only=True)
class Catch:
    """Which checks caught a mutant, each with the first message that did."""

    mutant: Mutant
    messages: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether every check that must catch it did."""
        return set(self.mutant.caught_by) <= self.messages.keys()


def read_mutants(folder: Path) -> list[Mutant]:
    """All mutants of a folder, by name; ValueError for a file that doesn't say what it needs to."""
    return [_read(path) for path in sorted(folder.glob("*.toml")) if not path.stem.startswith(PYTHON)]


def _read(path: Path) -> Mutant:
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        edits = tuple((str(e["old"]), str(e["new"]), int(e["count"])) for e in told.get("edit", ()))
        caught = tuple(told["caught_by"])
        if not caught or not set(caught) <= set(CHECKS):
            raise ValueError(f"caught_by is {caught}; some of {', '.join(CHECKS)} are expected")
        return Mutant(
            name=path.stem,
            title=told["title"],
            source=told.get("source", ""),
            caught_by=caught,
            edits=edits,
            overrides=told.get("spec", {}),
        )
    except (KeyError, ValueError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def plant(mutant: Mutant, description: Path, folder: Path) -> list[KernelSpec]:
    """The described kernels with the mutant's edits, written to `folder`; ValueError when an edit no longer fits."""
    told = tomllib.loads(description.read_text(encoding="utf-8"))
    for file in description.parent.iterdir():
        if file.suffix in (".metal", ".h"):
            shutil.copy(file, folder)
    source = folder / told["source"]
    text = source.read_text(encoding="utf-8")
    for old, new, count in mutant.edits:
        if text.count(old) != count:
            raise ValueError(
                f"mutant {mutant.name}: {old!r} occurs {text.count(old)} times in {source.name}, not {count}"
            )
        text = text.replace(old, new)
    source.write_text(text, encoding="utf-8")
    (entry,) = told["kernel"]
    return list(specs_of({**entry, **mutant.overrides}, told, folder))


def trials(specs: Sequence[KernelSpec]) -> Iterator[tuple[KernelSpec, MatmulCase]]:
    """The cases that a mutant is tried on: the widest tile of Q4_K and Q2_K, beyond one block and one tile."""
    chosen = [s for s in specs if s.format == "q4_K" and s.rhs == specs[0].rhs]
    for spec in chosen:
        for K, load, M in ((512, "one", 64), (256, "skewed", 70)):
            yield spec, MatmulCase(kernel=spec.name, tokens=spec.tile + 1, K=K, M=M, load=load, seed=0)
            yield spec, MatmulCase(kernel=spec.name, tokens=spec.tile + 1, K=K, M=M, load=load, seed=0, checked=True)


def catch(mutant: Mutant, description: Path) -> Catch:
    """Run the audit on a mutant and say which checks noticed."""
    messages: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        tried = list(trials(plant(mutant, description, Path(folder))))
        build(tried)
        for spec, case in tried:
            verdict = run_case(spec, case)
            if verdict.evidence["elements"]:
                messages.setdefault("values", verdict.message)
            if verdict.evidence["faults"] and case.checked:
                messages.setdefault("faults", verdict.evidence["faults"][0]["message"])
            if set(CHECKS) <= messages.keys():
                break
    return Catch(mutant=mutant, messages=messages)


def catch_all(folder: Path, description: Path, advance: Callable[[str], None] = lambda _: None) -> Iterator[Catch]:
    """Every mutant of a folder, caught or not; first that the original is clean, or nothing would mean anything."""
    original = Mutant(name="original", title="", caught_by=(), edits=(), overrides={})
    if found := catch(original, description).messages:
        raise ValueError(f"the original kernels fail before anything is planted: {next(iter(found.values()))}")
    for mutant in read_mutants(folder):
        advance(mutant.name)
        yield catch(mutant, description)
