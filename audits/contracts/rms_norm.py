"""rms_norm(x, weight, *, eps)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from audits.contract import Call, Contract, Finding, Outputs, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.relations import permuted_rows, scaled_argument
from audits.rows import judge_rows
from audits.values import draw
from reference import bounds
from reference.arithmetic import Arithmetic

KINDS = ("normal", "large", "small", "positive", "wide", "ties", "steps", "zero rows")
EPS = (1e-5, 1e-6, 1e-2, 1.0)


def build(case: Case) -> Call:
    rng = np.random.default_rng([case["seed"], case["rows"], case["D"]])
    kind = case["values"]
    x = draw("normal" if kind == "zero rows" else kind, (case["rows"], case["D"]), rng)
    if kind == "zero rows":
        x[::2] = 0.0
    weight = 1.0 + rng.standard_normal((case["D"],)) / 2
    dtype = DTYPES[case["dtype"]]
    return Call({"x": x.astype(dtype), "weight": weight.astype(dtype), "eps": case["eps"]})


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    x, weight = (torch.from_numpy(call.args[name].astype(np.float64)) for name in ("x", "weight"))
    return judge_rows(outputs[0], bounds.rms_norm(x, weight, call.args["eps"], arithmetic))


def corpus(full: bool) -> Iterator[Case]:
    for D in range(1, 300 if full else 130):
        yield {"rows": 2, "D": D, "values": KINDS[D % len(KINDS)], "eps": EPS[D // len(KINDS) % len(EPS)]}
    for D in (255, 256, 257, 511, 512, 513, 4095, 4096, 4097, 8192, 32769):
        yield {"rows": 2, "D": D, "values": "wide" if D % 2 else "normal"}
    # Models' widths, each with its own count of turns of a loop over blocks of 256, 512, 1024 or 4096.
    for D in (640, 768, 896, 1000, 1024, 1025, 1536, 2048, 2049, 2304, 2880, 3072, 3584, 5120, 6144, 7168):
        yield {"rows": 3, "D": D, "values": "steps" if D % 512 else "normal"}
    for i, kind in enumerate(("small", "small", "small", "zero rows")):
        yield {"rows": 3, "D": 96 + 33 * i, "values": kind, "eps": 1e-6}
    for rows in (1, 2, 31, 32, 33, 64, 65, 129):
        yield {"rows": rows, "D": 33, "values": "steps"}
    for rows in (257, 513, 1025, 4097, 65537):
        yield {"rows": rows, "D": 5 if rows < 5000 else 2, "values": "steps"}


def _every_element(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Each element of x takes part in the mean: one made large lowers the others of its row."""
    x = call.args["x"]
    for place in {0, case["D"] - 1, case["D"] // 2}:
        changed = x.copy()
        changed[0, place] = 64
        (moved,) = run(call.with_(x=changed))
        others = np.delete(moved[0], place).astype(np.float64), np.delete(outputs[0][0], place).astype(np.float64)
        if np.any(others[1] != 0) and not np.all(np.abs(others[0][others[1] != 0]) < np.abs(others[1][others[1] != 0])):
            return f"element {place} of a row made 64 doesn't lower the others: it isn't in the mean"
    return None


CONTRACT = Contract(
    name="rms_norm",
    signature="rms_norm(x, weight, *, eps)",
    doc="x [..., D], weight [D] -> x / sqrt(mean(x²) + eps) · weight [..., D]; sums in float32.",
    fields={"rows": Range(1, 6), "D": Range(1, 300), "values": Choice(KINDS), "eps": Choice(EPS)},
    bases=[{"rows": 3, "D": 70}, {"rows": 3, "D": 70, "eps": 1.0}, {"rows": 2, "D": 128, "values": "zero rows"}],
    corpus=corpus,
    build=build,
    judge=judge,
    relations=[
        permuted_rows("x"),
        Relation(name="every element", check=_every_element, applies=lambda case: case["values"] == "normal"),
        scaled_argument("weight", 2.0),
    ],
)
