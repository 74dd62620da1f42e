"""Two runs of one model on the same tokens, side by side.

Whether a run is right is judged for each run alone, by same-input replay (audits/judge.py): an op's own error is
bounded, what it inherited is measured. With both runs right, |actual − expected| ≤ own error of each + the difference
between what the two recorded inputs give, so the drift that is left is inherited, and every flip follows from it.

Traces without a model to replay are compared element by element within a table of tolerances instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from audits.judge import OwnError, describe, judge_run
from audits.logits import LogitsAgreement, agreement
from audits.metrics import Metrics, measure
from audits.routing import Flip, flips, slot_order
from audits.verdict import Outcome
from goldens.matching import check_tokens
from goldens.trace import Trace
from reference.model import Reference

Array = np.ndarray[Any, np.dtype[Any]]

Side = Literal["actual", "expected"]
BLAME: dict[Side, str] = {"actual": "", "expected": "expected trace: "}
RANK: dict[Outcome, int] = {"pass": 0, "skipped": 1, "could-not-judge": 2, "fail": 3}

# Without a model there is no bound to derive. (rtol, atol) by the wider unit roundoff of the two dtypes, as
# torch.testing.assert_close has them (PyTorch documentation, torch.testing): what one op in that dtype may be off by.
TOLERANCES = {"float64": (1e-7, 1e-7), "float32": (1.3e-6, 1e-5), "float16": (1e-3, 1e-5), "bfloat16": (1.6e-2, 1e-5)}


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """One probe in both runs. `own` and `expected_own` are each run's own error, `drift` is actual − expected in whole.

    `side` is the run that failed. `inherited` is the largest difference between what the two runs' recorded inputs
    give, computed exactly.
    """

    probe: str
    outcome: Outcome
    message: str
    own: OwnError | None
    expected_own: OwnError | None
    drift: Metrics | None
    inherited: float | None
    flips: tuple[Flip, ...] = ()
    side: Side = "actual"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All probes in the order of computation; `first_failure` names the place where the trouble starts."""

    case: str
    probes: tuple[ProbeResult, ...]
    logits: LogitsAgreement | None
    judged_by: str

    @property
    def first_failure(self) -> ProbeResult | None:
        return next((p for p in self.probes if p.outcome == "fail"), None)

    @property
    def failures(self) -> tuple[ProbeResult, ...]:
        """What failed in the actual run, in the order of computation."""
        return tuple(p for p in self.probes if p.outcome == "fail" and p.side == "actual")

    @property
    def flips(self) -> tuple[Flip, ...]:
        return tuple(flip for probe in self.probes for flip in probe.flips)

    @property
    def outcome(self) -> Outcome:
        outcomes = {p.outcome for p in self.probes}
        if "fail" in outcomes:
            return "fail"
        return "pass" if "pass" in outcomes and "could-not-judge" not in outcomes else "could-not-judge"

    @property
    def ok(self) -> bool:
        return self.outcome == "pass"

    @property
    def message(self) -> str:
        """One line: the first failure, or what passed."""
        if (failure := self.first_failure) is not None:
            return failure.message
        if (doubt := next((p for p in self.probes if p.outcome == "could-not-judge"), None)) is not None:
            return doubt.message
        unjudged = sum(p.outcome == "skipped" for p in self.probes)
        judged = f"{len(self.probes) - unjudged} probes {self.judged_by}"
        return judged + (f", {unjudged} skipped" if unjudged else "")


def compare(
    actual: Trace, expected: Trace, model: Reference | None, expected_model: Reference | None = None
) -> Comparison:
    """Comparison of two Traces of the same tokens.

    `model` holds the weights as the actual run's dtype rounds them, `expected_model` (default: `model`) as the expected
    run's does; without a model the traces are compared within TOLERANCES. ValueError when the tokens differ.
    """
    check_tokens(expected, actual.tokens)
    if model is None:
        probes = _without_model(actual, expected)
        judged_by = "within the dtype's tolerance (no model to replay)"
    else:
        probes = _with_model(actual, expected, model, expected_model or model)
        judged_by = "within their derived bounds (same-input replay)"
    pair = (actual.probes.get("logits"), expected.probes.get("logits"))
    usable = pair[0] is not None and pair[1] is not None and pair[0].shape == pair[1].shape and pair[0].ndim == 2
    return Comparison(
        case=actual.case,
        probes=tuple(probes),
        logits=agreement(*pair) if usable else None,  # type: ignore[arg-type]  # `usable` says both are arrays
        judged_by=judged_by,
    )


def _with_model(actual: Trace, expected: Trace, model: Reference, expected_model: Reference) -> list[ProbeResult]:
    theirs = {own.probe: own for own in judge_run(expected, expected_model)}
    results = [_weights(trace, side) for trace, side in _sides(actual, expected) if "weights" in trace.provenance]
    for own in judge_run(actual, model):
        other = theirs.pop(own.probe, None)
        results.append(_pair(own, other, actual, expected))
    for probe, other in theirs.items():
        message = f"{probe}: in the expected trace only"
        results.append(
            ProbeResult(
                probe=probe,
                outcome="fail",
                message=message,
                own=None,
                expected_own=other,
                drift=None,
                inherited=None,
            )
        )
    return results


def _sides(actual: Trace, expected: Trace) -> tuple[tuple[Trace, Side], tuple[Trace, Side]]:
    return (actual, "actual"), (expected, "expected")


def _weights(trace: Trace, side: Side) -> ProbeResult:
    """What was found, when the trace was made, of the weights that the engine held (audits/weights.py)."""
    found = trace.provenance["weights"]
    try:
        wrong, skipped = list(found["wrong"]), str(found["skipped"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"case {trace.case!r}: its provenance says nothing usable of the weights ({error})") from error
    outcome: Outcome = "fail" if wrong else "skipped" if skipped else "pass"
    return ProbeResult(
        probe="weights",
        outcome=outcome,
        message=BLAME[side] + wrong[0] if wrong else skipped,
        side=side,
        own=None,
        expected_own=None,
        drift=None,
        inherited=None,
    )


def _pair(own: OwnError, other: OwnError | None, actual: Trace, expected: Trace) -> ProbeResult:
    outcome, message = own.outcome, own.message
    side: Side = "actual"
    # A failure of either run outweighs what could not be judged of the other.
    if other is not None and RANK[other.outcome] > RANK[outcome]:
        outcome, message, side = other.outcome, BLAME["expected"] + other.message, "expected"
    a, e = actual.probes.get(own.probe), expected.probes.get(own.probe)
    both = a is not None and e is not None and a.shape == e.shape
    found = _flips(own, other, a, e) if both else ()
    if outcome != "fail" and (unexplained := [flip for flip in found if not flip.explained]):
        flip = unexplained[0]
        outcome = "fail"
        message = (
            f"{own.probe}[{flip.token},{flip.slot}]: {flip.old} became {flip.new} at a margin of {flip.margin:.3g},"
            f" but the scores moved by {flip.drift:.3g} only"
        )
    inherited = None
    if own.exact is not None and other is not None and other.exact is not None and own.exact.shape == other.exact.shape:
        with np.errstate(invalid="ignore"):
            inherited = float(np.max(np.abs(own.exact - other.exact)))
    choice = own.probe.endswith(".experts") or own.probe == "token"
    if both and not choice:
        e = _same_slots(own.probe, e, actual, expected)
    return ProbeResult(
        probe=own.probe,
        outcome=outcome,
        message=message,
        own=own,
        expected_own=other,
        drift=measure(a, e) if both and not choice else None,  # type: ignore[arg-type]  # `both` says both are arrays
        inherited=inherited,
        flips=found,
        side=side,
    )


def _same_slots(probe: str, e: Array | None, actual: Trace, expected: Trace) -> Array | None:
    """The expected values of a probe by slot, [T,K,…], in the actual run's order of experts: a swap is no drift."""
    ids = probe.rpartition(".")[0] + ".experts"
    a_ids, e_ids = actual.probes.get(ids), expected.probes.get(ids)
    if (
        e is None
        or a_ids is None
        or e_ids is None
        or actual.dims(probe)[:2] != ("T", "K")
        or a_ids.shape != e_ids.shape
    ):
        return e
    return np.take_along_axis(e, slot_order(a_ids, e_ids).reshape(*a_ids.shape, *[1] * (e.ndim - 2)), axis=1)


def _flips(own: OwnError, other: OwnError | None, a: Array | None, e: Array | None) -> tuple[Flip, ...]:
    if own.choice is None or other is None or other.choice is None or a is None or e is None:
        return ()
    (now, now_bound), (before, before_bound) = own.choice, other.choice
    return tuple(flips(own.probe, a, e, (now, before), now_bound + before_bound))


def _without_model(actual: Trace, expected: Trace) -> list[ProbeResult]:
    names = [*actual.probes, *(name for name in expected.probes if name not in actual.probes)]
    return [_tolerated(name, actual.probes.get(name), expected.probes.get(name)) for name in names]


def _tolerated(probe: str, a: Array | None, e: Array | None) -> ProbeResult:
    drift: Metrics | None = None
    message = ""
    if a is None or e is None:
        message = f"{probe}: missing from the {'actual' if a is None else 'expected'} trace"
    elif a.shape != e.shape:
        message = f"{probe}: actual has shape {a.shape}, expected {e.shape}"
    elif a.size == 0:
        message = f"{probe}: is empty"
    else:
        exact = a.dtype.kind in "iub" or e.dtype.kind in "iub"
        both = [TOLERANCES.get(str(x.dtype), TOLERANCES["float64"]) for x in (a, e)]
        rtol, atol = (0.0, 0.0) if exact else (max(t[0] for t in both), max(t[1] for t in both))
        with np.errstate(invalid="ignore"):
            drift = measure(a, e, atol + rtol * np.abs(e.astype(np.float64)))
        if drift.outside or drift.nonfinite:
            message = describe(probe, drift)
    return ProbeResult(
        probe=probe,
        outcome="fail" if message else "pass",
        message=message,
        own=None,
        expected_own=None,
        drift=drift,
        inherited=None,
    )
