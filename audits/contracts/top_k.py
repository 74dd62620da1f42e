"""top_k(x, *, k): ids, or values, or both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from audits.contract import Call, Contract, Finding, Outputs
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.relations import permuted_rows
from reference.arithmetic import Arithmetic

Array = np.ndarray[Any, np.dtype[Any]]
KINDS = ("normal", "ties", "constant", "negative", "sorted", "reversed", "masked", "late", "few")


def build(case: Case) -> Call:
    rows, E = case["rows"], case["E"]
    rng = np.random.default_rng([case["seed"], rows, E])
    x, kind = rng.standard_normal((rows, E)), case["values"]
    if kind == "ties":
        x = np.round(x)
    elif kind == "constant":
        x = np.repeat(x[:, :1], E, axis=1)
    elif kind == "negative":
        x = -np.abs(x) - 5
    elif kind in ("sorted", "reversed"):
        x = np.sort(x, axis=1)[:, :: 1 if kind == "sorted" else -1]
    elif kind in ("masked", "few"):  # k are not masked, or fewer, so that −inf is among the largest
        x[:, rng.permutation(E)[: E - case["k"] // (1 if kind == "masked" else 2)]] = -np.inf
    elif kind == "late":  # the largest are the last ones
        x[:, max(0, E - case["k"]) :] += 100
    return Call({"x": np.ascontiguousarray(x).astype(DTYPES[case["dtype"]]), "k": case["k"]})


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    """The k largest values of each row as a multiset: among equals any may be chosen, each place once."""
    x, k = call.args["x"], call.args["k"]
    best = np.sort(x.astype(np.float64), axis=-1)[..., ::-1][..., :k]
    for found in outputs:
        if found.shape != best.shape:
            return Finding(check="shape", message=f"has shape {list(found.shape)}, expected {list(best.shape)}")
        if found.dtype.kind in "iu":
            problem = _bad_ids(found.astype(np.int64), x)
            if problem:
                return Finding(check="ids", message=problem)
            values = np.take_along_axis(x, found.astype(np.int64), axis=-1)
        else:
            values = found
        chosen = np.sort(values.astype(np.float64), axis=-1)[..., ::-1]
        wrong = ~((chosen == best) | (np.isneginf(chosen) & np.isneginf(best)))
        if wrong.any():
            row, slot = (int(i) for i in np.argwhere(wrong.reshape(-1, k))[0])
            flat, other = chosen.reshape(-1, k), best.reshape(-1, k)
            return Finding(
                check="values",
                message=(
                    f"row {row}: the {slot + 1}. largest value chosen is {flat[row, slot]:.6g}, expected"
                    f" {other[row, slot]:.6g}; {int(wrong.any(-1).sum())} of {len(flat)} rows are wrong"
                ),
                evidence={"elements": int(wrong.sum()), "rows": int(wrong.any(-1).sum())},
            )
    return None


def _bad_ids(ids: Array, x: Array) -> str:
    rows = ids.reshape(-1, ids.shape[-1])
    for i, row in enumerate(rows):
        if row.min() < 0 or row.max() >= x.shape[-1]:
            return f"row {i} holds the id {int(row[(row < 0) | (row >= x.shape[-1])][0])} of {x.shape[-1]}"
        if len(set(row.tolist())) != len(row):
            return f"row {i} holds an id twice: {sorted(row.tolist())}"
    return ""


def corpus(full: bool) -> Iterator[Case]:
    for E in range(1, 300 if full else 131):
        k = 1 + (E * 7) % min(E, 12)
        yield {"rows": 1 + E % 4, "E": E, "k": k, "values": KINDS[E % len(KINDS)]}
    for E, k in ((1, 1), (8, 8), (128, 6), (256, 8), (257, 256), (1023, 50), (4097, 40), (32769, 5)):
        for kind in ("normal", "late", "ties"):
            yield {"rows": 2, "E": E, "k": k, "values": kind}
    for E, k in ((2048, 100), (3000, 33), (65537, 8), (70001, 17), (151936, 20)):
        for kind in ("normal", "late"):
            yield {"rows": 2, "E": E, "k": k, "values": kind}
    for i, E in enumerate((2, 13, 31, 32, 33, 64, 100, 129, 257)):
        yield {"rows": 2, "E": E, "k": E, "values": KINDS[i % len(KINDS)]}
        yield {"rows": 2, "E": E, "k": E - 1, "values": KINDS[(i + 4) % len(KINDS)]}
    for rows in (31, 32, 33, 65, 129, 257, 1025, 4097):
        yield {"rows": rows, "E": 33 if rows < 300 else 9, "k": 6}


CONTRACT = Contract(
    name="top_k",
    signature="top_k(x, *, k)",
    doc="x [..., E] -> ids [..., k] of the k largest, in any order, each once; or their values; or both.",
    fields={"rows": Range(1, 6), "E": Range(1, 140), "k": Range(1, 12), "values": Choice(KINDS)},
    bases=[{"rows": 3, "E": 33, "k": 6}, {"rows": 3, "E": 33, "k": 1}],
    corpus=corpus,
    build=build,
    judge=judge,
    valid=lambda case: case["k"] <= case["E"],
    outputs=(1, 2),
    relations=[permuted_rows("x")],
)
