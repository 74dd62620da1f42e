"""swiglu(gate, up, *, limit=None)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from audits.contract import Call, Contract, Finding, Outputs, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.relations import permuted_rows
from audits.rows import judge_rows
from audits.values import draw
from reference import bounds
from reference.arithmetic import Arithmetic

KINDS = ("normal", "large", "small", "wide", "ties", "steps")
LIMITS = (None, 7.0, 10.0, 1.0)


def build(case: Case) -> Call:
    rng = np.random.default_rng([case["seed"], case["rows"], case["F"]])
    gate, up = (draw(case["values"], (case["rows"], case["F"]), rng) for _ in range(2))
    gate[0, 0] = np.abs(gate[0, 0])  # closed gates alone leave nothing in half precision that could be judged
    args = {"gate": gate.astype(DTYPES[case["dtype"]]), "up": up.astype(DTYPES[case["dtype"]])}
    return Call(args if case["limit"] is None else {**args, "limit": case["limit"]})


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    gate, up = (torch.from_numpy(call.args[name].astype(np.float64)) for name in ("gate", "up"))
    return judge_rows(outputs[0], bounds.swiglu(gate, up, call.args.get("limit"), arithmetic))


def corpus(full: bool) -> Iterator[Case]:
    for F in range(1, 300 if full else 130):
        yield {"rows": 2, "F": F, "values": KINDS[F % len(KINDS)], "limit": LIMITS[F // len(KINDS) % len(LIMITS)]}
    for i, F in enumerate((255, 256, 257, 1023, 1024, 1025, 2048, 2880, 4096, 8192, 11008, 14336, 32769)):
        yield {"rows": 2, "F": F, "values": "large", "limit": LIMITS[1 + i % 2]}
    for i, rows in enumerate((31, 32, 33, 65, 129, 257, 1025, 4097, 65537)):
        yield {"rows": rows, "F": 33 if rows < 300 else 3, "values": "steps", "limit": LIMITS[i % 2]}


def _limit_binds(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """With a limit, what lies beyond it changes nothing: gate above it, up beyond ± it."""
    limit = call.args["limit"]
    gate, up = call.args["gate"], call.args["up"]
    beyond = {"gate": np.where(gate > limit, gate * 2, gate), "up": np.where(np.abs(up) > limit, up * 2, up)}
    for name, value in beyond.items():
        (moved,) = run(call.with_(**{name: value.astype(gate.dtype)}))
        if moved.tobytes() != outputs[0].tobytes():
            return f"{name} beyond the limit {limit} still changes the result"
    return None


CONTRACT = Contract(
    name="swiglu",
    signature="swiglu(gate, up, *, limit=None)",
    doc="gate, up [..., F] -> silu(gate)·up [..., F]; with a limit, gate is cut above it and up to ±limit first.",
    fields={"rows": Range(1, 5), "F": Range(1, 300), "values": Choice(KINDS), "limit": Choice(LIMITS)},
    bases=[{"rows": 3, "F": 70, "values": "large"}, {"rows": 3, "F": 70, "values": "large", "limit": 7.0}],
    corpus=corpus,
    build=build,
    judge=judge,
    relations=[
        permuted_rows("gate", "up"),
        Relation(name="limit binds", check=_limit_binds, applies=lambda case: case["limit"] is not None),
    ],
)
