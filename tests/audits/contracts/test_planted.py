"""Every planted bug is caught by the checks that must notice it, and every honest implementation passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from audits import planted
from audits.candidate import Candidate, load
from audits.catalogue import contract, names

ROOT = Path(__file__).parents[2] / "mutants"
# Folders with a Python base; the Metal kernels' planted bugs are tested in tests/audits/test_moe_matmul.py.
FOLDERS = sorted(path for path in ROOT.iterdir() if path.is_dir() and planted.honest(path))


def bugs() -> list[planted.Planted]:
    return [bug for folder in FOLDERS for bug in planted.read(folder)]


@pytest.mark.parametrize("bug", bugs(), ids=lambda bug: f"{bug.contract}/{bug.name}")
def test_a_planted_bug_is_caught_by_the_checks_it_names(bug: planted.Planted) -> None:
    caught = planted.catch(bug)
    assert caught.ok, f"{bug.title}: {sorted(bug.caught_by)} must notice it, {sorted(caught.messages)} did"


@pytest.mark.parametrize(
    ("path", "framework"),
    [found for folder in FOLDERS for found in planted.honest(folder)],
    ids=lambda value: f"{value.parent.name}/{value.stem}" if isinstance(value, Path) else value,
)
def test_an_honest_implementation_raises_no_alarm(path: Path, framework: str) -> None:
    candidate = Candidate(function=load(f"{path}:candidate"), framework=framework, name=path.stem)
    verdicts = list(contract(path.parent.name).audit(candidate, full=False, seed=0, advance=lambda _: None))
    alarms = [verdict for verdict in verdicts if verdict.outcome in ("fail", "could-not-judge")]
    assert not alarms, f"{alarms[0].case}: {alarms[0].message}"
    assert sum(verdict.outcome == "pass" for verdict in verdicts) > 20


def test_every_contract_has_planted_bugs_and_honest_implementations() -> None:
    assert {folder.name for folder in FOLDERS if any(folder.glob("*.toml"))} == set(names())
