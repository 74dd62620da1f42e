"""Planted bugs in Python candidates: an honest implementation with one edit each, and which checks see it.

A check that can't fail proves nothing. Each TOML file in tests/mutants/<contract>/ is one bug: textual edits of an
honest base, which passes unedited, and the checks that must notice it in a quick sweep.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from audits.candidate import Candidate, load

Advance = Callable[[str], None]
# The repository: a base may be a file of it, such as the engine's own caches.
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True)
class Planted:
    """One bug: `edits` (old, new, how often) of `base`, whose attribute `name` is the candidate."""

    contract: str
    name: str
    title: str
    source: str
    base: Path
    attribute: str
    framework: str
    caught_by: tuple[str, ...]
    edits: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Caught:
    """Which checks noticed a planted bug, each with its first message."""

    mutant: Planted
    messages: Mapping[str, str]

    @property
    def ok(self) -> bool:
        """Whether every check that must notice it did."""
        return set(self.mutant.caught_by) <= self.messages.keys()


def read(folder: Path) -> list[Planted]:
    """The planted bugs of a contract's folder, by name; ValueError for a file that doesn't say what it needs to.

    Files without a `base` are edits of our Metal kernels (audits/mutants.py).
    """
    return [_read(path) for path in sorted(folder.glob("*.toml")) if _is_python(path)]


def _is_python(path: Path) -> bool:
    return any(line.startswith("base") for line in path.read_text(encoding="utf-8").splitlines())


def _read(path: Path) -> Planted:
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
        beside = path.parent / told["base"]
        caught = tuple(told["caught_by"])
        if not caught:
            raise ValueError("caught_by is empty: name the checks that must notice it")
        return Planted(
            contract=path.parent.name,
            name=path.stem,
            title=told["title"],
            source=told["source"],
            base=beside if beside.is_file() else ROOT / told["base"],
            attribute=told.get("name", "candidate"),
            framework=told["framework"],
            caught_by=caught,
            edits=tuple((str(e["old"]), str(e["new"]), int(e["count"])) for e in told["edit"]),
        )
    except (KeyError, ValueError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"{path}: {error}") from error


def plant(mutant: Planted, folder: Path) -> Candidate:
    """The base with the edits, written to `folder` and loaded; ValueError when an edit no longer fits."""
    text = mutant.base.read_text(encoding="utf-8")
    for old, new, count in mutant.edits:
        if text.count(old) != count:
            raise ValueError(
                f"mutant {mutant.contract}/{mutant.name}: {old!r} occurs {text.count(old)} times in"
                f" {mutant.base.name}, not {count}"
            )
        text = text.replace(old, new)
    for beside in mutant.base.parent.glob("*.py"):
        shutil.copy(beside, folder)
    path = folder / mutant.base.name
    path.write_text(text, encoding="utf-8")
    place = f"{path}:{mutant.attribute}"
    return Candidate(function=load(place), framework=mutant.framework, name=f"mutant {mutant.name}")


def catch(mutant: Planted) -> Caught:
    """Sweep a mutant, quick and without shrinking, until every check that must notice it has."""
    from audits.catalogue import contract

    messages: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        candidate = plant(mutant, Path(folder))
        found = contract(mutant.contract)
        for verdict in found.audit(candidate, full=False, seed=0, advance=lambda _: None, shrinking=False):
            if verdict.outcome == "fail":
                messages.setdefault(str(verdict.evidence["check"]), verdict.message)
                if set(mutant.caught_by) <= messages.keys():
                    break
    return Caught(mutant=mutant, messages=messages)


def catch_all(root: Path, advance: Advance = lambda _: None) -> Iterator[Caught]:
    """Every planted bug of the contracts' folders below `root`."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and any(path.glob("*.toml"))):
        for mutant in read(folder):
            advance(f"{mutant.contract}/{mutant.name}")
            yield catch(mutant)


def honest(folder: Path) -> list[tuple[Path, str]]:
    """The honest candidates of a contract's folder: (file, framework), the framework being the name's first word."""
    return [(path, path.stem.split("_")[0]) for path in sorted(folder.glob("*_*.py")) if not path.stem.startswith("_")]


def main(folders: list[str]) -> int:
    """Print the matrix of the given contracts' folders."""
    missed = 0
    for folder in folders:
        for mutant in read(Path(folder)):
            caught = catch(mutant)
            missed += not caught.ok
            print(
                f"{'caught' if caught.ok else 'MISSED'} {mutant.contract}/{mutant.name}: {', '.join(caught.messages)}"
            )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
