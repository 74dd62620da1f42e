"""softmax(x) over the last axis."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from audits.contract import Call, Contract, Finding, Outputs, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.rows import judge_rows
from reference import bounds
from reference.arithmetic import Arithmetic

VALUES = ("normal", "flat", "peaked", "shifted", "masked", "ties")


def build(case: Case) -> Call:
    rng = np.random.default_rng([case["seed"], case["rows"], case["S"]])
    x = rng.standard_normal((case["rows"], case["S"]))
    kind = case["values"]
    if kind == "flat":
        x *= 1e-3
    elif kind == "peaked":
        x *= 30
    elif kind == "shifted":
        x -= np.where(np.arange(case["rows"]) % 2, 3e4, 0.0)[:, None]
    elif kind == "ties":
        x = np.round(x)
    elif kind == "masked":
        x[rng.random(x.shape) < 0.3] = -np.inf
        x[:, case["S"] // 2] = 0.0  # a row of nothing but -inf has no softmax
    return Call({"x": x.astype(DTYPES[case["dtype"]])})


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    x = torch.from_numpy(call.args["x"].astype(np.float64))
    return judge_rows(outputs[0], bounds.softmax(x, arithmetic))


def corpus(full: bool) -> Iterator[Case]:
    for S in range(1, 300 if full else 130):
        yield {"rows": 2, "S": S, "values": VALUES[S % len(VALUES)]}
    for S in (255, 256, 257, 1023, 1024, 1025, 4095, 4096, 4097, 32767, 32768, 32769):
        yield {"rows": 2, "S": S}


def _permuted(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Reversing the rows reverses the result."""
    (back,) = run(call.with_(x=call.args["x"][::-1].copy()))
    return None if back[::-1].tobytes() == outputs[0].tobytes() else "rows in another order give other bits"


CONTRACT = Contract(
    name="softmax",
    signature="softmax(x)",
    doc="x [..., S] -> softmax over the last axis [..., S]. A row holds at least one finite value.",
    fields={"rows": Range(1, 5), "S": Range(1, 300), "values": Choice(VALUES)},
    bases=[{"rows": 3, "S": 70}, {"rows": 2, "S": 33, "values": "masked"}],
    corpus=corpus,
    build=build,
    judge=judge,
    relations=[Relation(name="permuted rows", check=_permuted, applies=lambda case: case["rows"] > 1)],
)
