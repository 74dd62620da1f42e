"""Relations that several contracts share."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from audits.contract import Array, Call, Outputs, Relation, Run
from audits.domain import Case
from audits.outputs import digest_of


def permuted_rows(*names: str, applies: Callable[[Case], bool] = lambda case: True) -> Relation:
    """Reversing the order of the first axis of these operands reverses it in the result.

    Up to rounding: a row may be computed in another way in another place (the tail of a tile), so twice the accuracy
    of the result's dtype is allowed where bits differ.
    """

    def check(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
        back = run(call.with_(**{name: call.args[name][::-1].copy() for name in names}))
        for i, (there, here) in enumerate(zip(back, outputs, strict=True)):
            if not close(there[::-1], here):
                return f"rows in reverse order give other values (output {i})"
        return None

    return Relation(name="permuted rows", check=check, applies=applies)


def scaled_argument(name: str, factor: float) -> Relation:
    """The result is linear in operand `name`: twice it (a power of two, so that no rounding differs) is twice it."""

    def check(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
        value = call.args[name]
        scaled = run(call.with_(**{name: (value * value.dtype.type(factor)).astype(value.dtype)}))
        for there, here in zip(scaled, outputs, strict=True):
            if not close(there.astype(np.float64) / factor, here):
                return f"{factor:g} times {name} doesn't give {factor:g} times the result"
        return None

    return Relation(name=f"linear in {name}", check=check)


def close(actual: Array, expected: Array) -> bool:
    """Whether two results of one computation agree to a few units in the last place of their rows' largest value."""
    dtype = expected.dtype
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    if a.shape != b.shape:
        return False
    if dtype.kind not in "fV" and dtype.name != "bfloat16":
        return bool(np.array_equal(a, b))
    ulp = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(dtype.name, 2.0**-20)
    scale = np.max(np.abs(np.where(np.isfinite(b), b, 0)), axis=-1, keepdims=True) if b.ndim else np.abs(b)
    with np.errstate(invalid="ignore"):
        return bool(np.all((np.abs(a - b) <= 4 * ulp * scale) | (a == b) | (np.isnan(a) & np.isnan(b))))


def _rerun(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    for i in range(2):
        if digest_of(run(call)) != digest_of(outputs):
            return f"run {i + 2} of the same call gives other bits than the first"
    return None


# Of every contract.
RERUN = Relation(name="rerun", check=_rerun)
