"""Judging one run by same-input replay: every probe against what its op gives for the inputs that the run recorded.

A probe passes when no element is further from the exact result than honest arithmetic, as the engine states it, can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from audits.metrics import Metrics, measure
from audits.routing import WrongChoice, wrong_choices
from audits.verdict import Outcome
from goldens.trace import Trace
from reference.bounds import Bounded
from reference.graph import Choice
from reference.model import Reference
from reference.replay import Step, replay

Array = np.ndarray[Any, np.dtype[Any]]
# A bound below this comes from flushing alone (n·2^−126 in float32) and is never too wide, not even for a row of zeros.
NEGLIGIBLE = 2.0**-100


@dataclass(frozen=True, kw_only=True)
class OwnError:
    """One op's own error in one run. `exact` is what its recorded inputs give in float64 (None: choices, or skipped).

    `suspicious` counts elements inside the worst-case bound but beyond the probabilistic one (Higham & Mary 2019):
    worth a look, never a failure.
    """

    probe: str
    outcome: Outcome
    message: str = ""
    metrics: Metrics | None = None
    suspicious: int = 0
    wrong: tuple[WrongChoice, ...] = ()
    exact: Array | None = None
    choice: tuple[Array, Array] | None = None  # scores and their bound, for a probe that is a choice


def judge_run(trace: Trace, model: Reference) -> Iterator[OwnError]:
    """One OwnError a probe of the model, in the order of computation, then one for each probe that the model hasn't.

    The arithmetic is the one that the trace's provenance states ("arithmetic": op -> claims; "dtype").
    """
    claims = trace.provenance.get("arithmetic", {})
    known = set()
    for step in replay(model, trace.tokens, trace.probes, claims, trace.provenance.get("dtype", model.dtype)):
        known.add(step.probe)
        yield _judge(step, trace)
    for extra in trace.probes.keys() - known:
        yield OwnError(probe=extra, outcome="fail", message=f"{extra}: the model has no such probe")


def _judge(step: Step, trace: Trace) -> OwnError:
    if step.problem:
        return OwnError(probe=step.probe, outcome="fail", message=f"{step.probe}: {step.problem}")
    actual = trace.probes[step.probe]
    if step.expected is None:
        return OwnError(probe=step.probe, outcome="skipped", message=f"{step.probe}: not judged, {step.skipped}")
    if isinstance(step.expected, Choice):
        return _judge_choice(step.probe, actual, step.expected)
    return _judge_values(step.probe, actual, step.expected)


def _judge_values(probe: str, actual: Array, expected: Bounded) -> OwnError:
    exact, bound, likely = (x.numpy() for x in (expected.expected, expected.bound, expected.likely))
    metrics = measure(actual, exact, bound)
    with np.errstate(invalid="ignore"):
        error = np.abs(actual.astype(np.float64) - exact)
    outcome: Outcome = "pass"
    message = ""
    if metrics.outside > 0 or metrics.nonfinite > 0:
        outcome, message = "fail", describe(probe, metrics)
    elif (tokens := unjudged_tokens(exact, bound)).size:
        outcome = "could-not-judge"
        message = (
            f"{probe}: for {tokens.size} of {len(exact)} tokens (first {tokens[0]}) the bound of the stated arithmetic"
            f" is wider than the values, so anything would pass; state a better accumulator if there is one"
        )
    return OwnError(
        probe=probe,
        outcome=outcome,
        message=message,
        metrics=metrics,
        suspicious=int(np.sum((error > likely) & (error <= bound))),
        exact=exact,
    )


def unjudged_tokens(exact: Array, bound: Array) -> Array:
    """Tokens whose bound says nothing: for more than half of a row's elements it exceeds the row's rms value.

    A single element may cancel to less than its bound; a row of them means that n·u of the accumulator is near 1.
    """
    rows, allowed = exact.reshape(len(exact), -1), bound.reshape(len(bound), -1)
    scale = np.sqrt(np.mean(rows * rows, axis=1, keepdims=True))
    loose = (allowed > scale) & (allowed > NEGLIGIBLE)
    return np.flatnonzero(loose.mean(axis=1) > 0.5)


def _judge_choice(probe: str, actual: Array, choice: Choice) -> OwnError:
    scores, bound = choice.scores.numpy(), choice.bound.numpy()
    wrong = tuple(wrong_choices(actual, scores, bound))
    message = ""
    if wrong:
        first = wrong[0]
        place = f"[{first.token}]" if actual.ndim == 1 else f"[{first.token},{first.slot}]"
        message = (
            f"{probe}{place}: chose {first.chosen}, but {first.missed} scores higher by {first.margin:.3g}"
            f" (a tie up to {first.bound:.2g}); {len(wrong)} wrong of {actual.size}"
        )
    return OwnError(
        probe=probe, outcome="fail" if wrong else "pass", message=message, wrong=wrong, choice=(scores, bound)
    )


def describe(probe: str, metrics: Metrics) -> str:
    """One line that names the probe, its worst element, the measured and the allowed error."""
    worst = metrics.worst
    place = ",".join(str(i) for i in worst.index)
    times = f"{metrics.ratio:.3g} times the bound" if np.isfinite(metrics.ratio) else "beyond any bound"
    extra = f", {metrics.nonfinite} not finite" if metrics.nonfinite else ""
    return (
        f"{probe}[{place}]: actual {worst.actual:.7g}, expected {worst.expected:.7g}: error {worst.error:.3g} of"
        f" {worst.bound:.3g} allowed ({times}); {metrics.outside} of {metrics.count} elements outside{extra}"
    )
