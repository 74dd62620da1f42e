"""The audits of contracts, by name: what `assay audit` and `assay.audit` run.

A new one is a module with an `AUDIT` and a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from audits import moe_matmul
from audits.verdict import Report, Verdict

Advance = Callable[[str], None]


class Audit(Protocol):
    """One contract's audit. `candidate` is None for our own implementation, or says what is judged instead."""

    def __call__(self, candidate: Any, *, full: bool, seed: int, advance: Advance) -> Iterable[Verdict]: ...


AUDITS: Mapping[str, Audit] = {"moe_matmul": moe_matmul.audit}
REPLAYS: Mapping[str, Callable[[Mapping[str, Any]], Verdict]] = {"moe_matmul": moe_matmul.replay}


def audit(
    names: str | Sequence[str],
    candidate: Any = None,
    *,
    full: bool = False,
    seed: int = 0,
    advance: Advance = lambda _: None,
) -> Report:
    """Run the named audits (none: all) on `candidate`; ValueError for a name that there isn't."""
    wanted = [names] if isinstance(names, str) else list(names) or list(AUDITS)
    if unknown := [name for name in wanted if name not in AUDITS]:
        raise ValueError(f"no contract {unknown[0]!r}; there is {', '.join(AUDITS)}")
    verdicts = [v for name in wanted for v in AUDITS[name](candidate, full=full, seed=seed, advance=advance)]
    return Report(verdicts=verdicts)


def replay(case: Mapping[str, Any]) -> Report:
    """Run one case again, as a Verdict recorded it."""
    name = case.get("contract") if isinstance(case, Mapping) else None
    if not isinstance(name, str) or name not in REPLAYS:
        raise ValueError(f'a case to replay has a "contract" ({", ".join(REPLAYS)}); this one has {name!r}')
    return Report(verdicts=[REPLAYS[name](case)])


def mutants(root: Path, advance: Advance = lambda _: None) -> Iterable[Any]:
    """Every planted bug below `root` (tests/mutants) and which checks caught it."""
    from audits.mutants import catch_all

    folder = root / "moe_matmul"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no planted bugs; they are in the repository's tests/mutants, not in the package")
    return catch_all(folder, moe_matmul.OWN, advance)
