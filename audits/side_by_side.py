"""The main job: an engine beside the reference on the same tokens, judged probe by probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from audits.cases import Case
from audits.compare import Comparison, compare
from audits.runs import EngineLike, load_engine, load_reference, run, weights_dtype
from audits.verdict import Verdict
from goldens.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One case's verdict with what it was drawn from."""

    case: Case
    verdict: Verdict
    comparison: Comparison
    actual: Trace
    expected: Trace


def audit_case(engine: EngineLike, case: Case) -> Judged:
    """Run one case on the engine and on the reference, and judge."""
    actual, expected = run(engine, case), run("reference", case)
    comparison = compare(actual, expected, load_reference(case.checkpoint, weights_dtype(actual.provenance)))
    verdict = to_verdict(comparison, case, "run", case.replay_command())
    return Judged(case=case, verdict=verdict, comparison=comparison, actual=actual, expected=expected)


def to_verdict(comparison: Comparison, case: Case, audit: str, replay: str) -> Verdict:
    """The Verdict of a Comparison, with the command that repeats it."""
    first = comparison.first_failure
    evidence: dict[str, Any] = {"first_failure": first.probe if first else None, "replay": replay}
    return Verdict(
        outcome=comparison.outcome, audit=audit, case=case.as_dict(), message=comparison.message, evidence=evidence
    )


def audit_model(cases: Sequence[Case], advance: Callable[[str], None] = lambda _: None) -> Iterator[Judged]:
    """Judge every case on the MLX engine; the cases share a model, a dtype and a device."""
    engine = load_engine(cases[0], advance)
    for case in cases:
        advance(case.name)
        yield audit_case(engine, replace(case, device=engine.provenance["device"]))
