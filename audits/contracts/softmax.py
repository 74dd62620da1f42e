"""softmax(x) over the last axis."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch

from audits.candidate import CandidateError
from audits.contract import Call, Contract, Finding, Outputs, Refusable, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.rows import judge_rows
from reference import bounds
from reference.arithmetic import Arithmetic

Array = np.ndarray[Any, np.dtype[Any]]

# normal: N(0, 1). flat: near zero. peaked: ×30. shifted, high: every other row far from zero. masked: 3 in 10 are −inf.
# leading: all but the last third are. blind: a row or two of nothing else. rising: the largest comes last. ties: few
# distinct numbers.
VALUES = ("normal", "flat", "peaked", "shifted", "masked", "ties", "leading", "blind", "rising", "high")
NUMBERS = (255, 256, 257, 1023, 1024, 1025, 2049, 4095, 4096, 4097, 8193, 32767, 32768, 32769)


def build(case: Case) -> Call:
    rng = np.random.default_rng([case["seed"], case["rows"], case["S"]])
    rows, S, kind = case["rows"], case["S"], case["values"]
    shape = {1: (), 2: (rows,), 3: (rows, 3), 4: (2, rows, 3)}[case["axes"]]
    x = rng.standard_normal((*shape, S))
    odd = np.asarray(np.arange(x[..., 0].size).reshape(*shape, 1) % 2 == 1)
    if kind == "flat":
        x *= 1e-3
    elif kind == "peaked":
        x *= 30
    elif kind in ("shifted", "high"):
        far = 6e4 if case["dtype"] == "float16" else 1e5  # beyond what a running maximum may start from
        x += np.where(odd, far if kind == "high" else -far, 0.0)
    elif kind == "ties":
        x = np.round(x)
    elif kind == "masked":
        x[rng.random(x.shape) < 0.3] = -np.inf
        x[..., S // 2] = 0.0
    elif kind == "leading":
        x[..., : 2 * S // 3] = -np.inf
    elif kind == "blind":
        x = np.where(odd, -np.inf, x)
    elif kind == "rising":
        x = np.sort(x, axis=-1) * 3
    return Call({"x": x.astype(DTYPES[case["dtype"]])})


def valid(case: Case) -> bool:
    """Whether the fields go together: a single row has no other beside it that is not blind."""
    return bool((case["axes"] != 1 or case["rows"] == 1) and (case["values"] != "blind" or case["rows"] > 1))


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    """A row of nothing but −inf is NaN, as 0/0 is, or zeros, or the same everywhere: each accepted, but one of them."""
    x, output = call.args["x"].astype(np.float64), outputs[0]
    blind = np.isneginf(x).all(-1)
    sighted = np.where(blind[..., None], 0.0, x)
    exact = call.once(arithmetic, lambda: bounds.softmax(torch.from_numpy(sighted), arithmetic))
    if not blind.any() or output.shape != x.shape:
        return judge_rows(output, exact)
    given = {name: where for name, where in _conventions(output, blind).items() if where.any()}
    if len(given) > 1:
        return Finding(check="fully masked rows", message=f"rows of nothing but -inf give {' and '.join(given)}")
    settled = np.zeros_like(blind) if "numbers" in given else blind
    return judge_rows(np.where(settled[..., None], exact.expected.numpy(), output.astype(np.float64)), exact)


def _conventions(output: Array, blind: Array) -> dict[str, Array]:
    """Which rows [...] of nothing but −inf are NaN, zeros or other numbers."""
    nan, zeros = blind & np.isnan(output).all(-1), blind & (output == 0).all(-1)
    return {"NaN": nan, "zeros": zeros, "numbers": blind & ~nan & ~zeros}


def corpus(full: bool) -> Iterator[Case]:
    for S in range(1, 300 if full else 130):
        yield {"rows": 2 + S % 3, "S": S, "values": VALUES[S % len(VALUES)]}
    for i, S in enumerate(NUMBERS):
        yield {"rows": 2, "S": S}
        yield {"rows": 2, "S": S, "values": VALUES[1 + i % (len(VALUES) - 1)]}
        yield {"rows": 2, "S": S, "values": ("leading", "blind", "rising")[i % 3]}
    for i, (axes, S) in enumerate(product((1, 3, 4), (1, 3, 32, 70, 128, 1030, 4100))):
        yield {"rows": 1 if axes == 1 else 2 + i % 3, "S": S, "axes": axes, "values": VALUES[i % 7]}
    for rows in (7, 8, 9, 31, 33, 64, 65, 129, 257):  # rows that share a threadgroup, and more than there are threads
        yield {"rows": rows, "S": 5 + rows % 7, "values": ("peaked", "shifted", "masked")[rows % 3]}


def _blind(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Rows of nothing but −inf give the same for every length and dtype."""
    seen: dict[str, str] = {}
    for dtype, S in product(run.dtypes, (1, 2, 31, 32, 127, 128, 130, 1024, 1025, 4097)):
        x = np.full((2, S), -np.inf)
        try:
            (output,) = run(call.with_(x=x.astype(DTYPES[dtype])))
        except CandidateError:
            continue  # a dtype that it doesn't take
        if output.shape != x.shape:
            return f"an array [2, {S}] gives one of shape {list(output.shape)}"
        for name, where in _conventions(output, np.ones(2, bool)).items():
            if where.any():
                seen.setdefault(name, f"S={S} in {dtype}")
    told = ", but ".join(f"{name} for {where}" for name, where in seen.items())
    return f"rows of nothing but -inf give {told}" if len(seen) > 1 else None


def _permuted(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Reversing the rows reverses the result."""
    (back,) = run(call.with_(x=call.args["x"][::-1].copy()))
    return None if back[::-1].tobytes() == outputs[0].tobytes() else "rows in another order give other bits"


CONTRACT = Contract(
    name="softmax",
    signature="softmax(x)",
    doc=(
        "x [..., S] -> softmax over the last axis [..., S]. A row of nothing but -inf gives NaN, zeros or 1/S, and the"
        " same throughout."
    ),
    fields={"rows": Range(1, 5), "S": Range(1, 300), "values": Choice(VALUES), "axes": Choice((2, 1, 3, 4))},
    bases=[{"rows": 3, "S": 70}, {"rows": 2, "S": 33, "values": "masked"}],
    corpus=corpus,
    build=build,
    judge=judge,
    valid=valid,
    refusable=[
        Refusable(
            name="an array of other than two axes",
            case={"rows": 2, "S": 8, "axes": 3},
            covers=lambda case: case["axes"] != 2,
        )
    ],
    relations=[
        Relation(name="permuted rows", check=_permuted, applies=lambda case: case["rows"] > 1),
        Relation(name="fully masked rows", check=_blind, applies=lambda case: case["values"] == "masked"),
    ],
)
