"""Judging an array row by row (a row is the last axis): every element within its bound, NaN a mismatch.

A whole-array norm hides one wrong token among many; a row names it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from audits.contract import Finding
from audits.errors import CannotJudge
from audits.judge import unjudged_tokens
from reference.bounds import Bounded

Array = np.ndarray[Any, np.dtype[Any]]
# A sum of 64 normal terms in float16 cancels to less than its bound once or twice in a hundred; this many of them do so
# together about once in 10⁵.
FEW = 3


def judge_rows(actual: Array, expected: Bounded, *, name: str = "output", check: str = "values") -> Finding | None:
    """What is wrong with `actual` [..., D], or None: its shape, or rows with an element beyond the bound.

    Where the bound is infinite (overflow is legal) anything but a NaN passes. CannotJudge when nothing is wrong and the
    bound is wider than the values in every row, so that anything would pass.
    """
    exact, bound = expected.expected.numpy(), expected.bound.numpy()
    if actual.shape != exact.shape:
        return Finding(check="shape", message=f"{name} has shape {list(actual.shape)}, expected {list(exact.shape)}")
    actual, exact, bound = np.atleast_1d(actual), np.atleast_1d(exact), np.atleast_1d(bound)
    values = actual.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(values - exact)
        wrong = ~(error <= bound) & ~(np.isinf(bound) & ~np.isnan(values))
    if not wrong.any():
        if _says_nothing(exact, bound):
            raise CannotJudge(f"{name}: the bound of the claimed arithmetic is wider than the values in every row")
        return None
    return _describe(values, exact, bound, error, wrong, name, check)


def _describe(values: Array, exact: Array, bound: Array, error: Array, wrong: Array, name: str, check: str) -> Finding:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(wrong, np.where(np.isfinite(error), error / bound, np.inf), 0.0)
    ratio = np.nan_to_num(ratio, nan=np.inf, posinf=np.inf)
    worst = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    bad_rows = np.flatnonzero(wrong.any(-1))
    rows = wrong.size // wrong.shape[-1]
    first = np.unravel_index(int(bad_rows[0]), wrong.shape[:-1]) if wrong.ndim > 1 else (0,)
    place = ",".join(str(int(i)) for i in worst)
    times = f"{float(ratio[worst]):.3g} times" if np.isfinite(ratio[worst]) else "beyond"
    return Finding(
        check=check,
        message=(
            f"{name}[{place}] is {float(values[worst]):.7g}, expected {float(exact[worst]):.7g}: error"
            f" {float(error[worst]):.3g}, {times} the {float(bound[worst]):.3g} allowed; {int(wrong.sum())} of"
            f" {wrong.size} elements in {len(bad_rows)} of {rows} rows are wrong, the first row"
            f" [{','.join(str(int(i)) for i in first)}]"
        ),
        evidence={
            "elements": int(wrong.sum()),
            "share": float(wrong.mean()),
            "rows": len(bad_rows),
            "first_row": [int(i) for i in first],
            "worst": {
                "index": [int(i) for i in worst],
                "actual": _number(values[worst]),
                "expected": _number(exact[worst]),
                "bound": _number(bound[worst]),
            },
        },
    )


def _says_nothing(exact: Array, bound: Array) -> bool:
    """Whether the bound is wider than the values in every row; one or two of them may just have cancelled."""
    if exact.size < FEW:
        return exact.size == 0
    flat, allowed = exact.reshape(-1, exact.shape[-1]), bound.reshape(-1, exact.shape[-1])
    return len(unjudged_tokens(flat, allowed)) == len(flat)


def _number(x: Any) -> float | str:
    return float(x) if np.isfinite(x) else str(float(x))
