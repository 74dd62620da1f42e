"""matmul(a, b)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import torch

from audits.contract import Call, Contract, Finding, Outputs
from audits.domain import Case, Choice, Range, residues
from audits.frameworks import DTYPES
from audits.relations import permuted_rows, scaled_argument
from audits.rows import judge_rows
from audits.values import KINDS, draw
from reference import bounds
from reference.arithmetic import Arithmetic
from reference.bounds import Bounded

# batch of a and of b: none, the same, or one that is broadcast.
BATCHES = ("none", "both", "a alone")


def build(case: Case) -> Call:
    rng = np.random.default_rng([case["seed"], case["rows"], case["K"], case["N"]])
    batch = () if case["batch"] == "none" else (case["B"],)
    a = draw(case["values"], (*batch, case["rows"], case["K"]), rng)
    b = draw("normal", (*(batch if case["batch"] == "both" else ()), case["K"], case["N"]), rng)
    if case["values"] == "positive":
        b = np.abs(b)
    dtype = DTYPES[case["dtype"]]
    return Call({"a": a.astype(dtype), "b": b.astype(dtype)})


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    return judge_rows(outputs[0], call.once(arithmetic, lambda: _due(call, arithmetic)))


def _due(call: Call, arithmetic: Arithmetic) -> Bounded:
    a, b = (torch.from_numpy(call.args[name].astype(np.float64)) for name in ("a", "b"))
    return bounds.matmul(a, b, arithmetic)


def corpus(full: bool) -> Iterator[Case]:
    for i, (M, K, N) in enumerate(zip(*residues(128, 3, 0), strict=True)):
        yield {"rows": M, "K": K, "N": N, "values": KINDS[i % len(KINDS)]}
    for small in range(1, 10):  # vector kernels branch on small output widths
        yield {"rows": 1, "K": 32 * small, "N": small, "values": "positive"}
        yield {"rows": small, "K": 300, "N": 5, "B": 2, "batch": BATCHES[small % 3]}
    for K in (255, 256, 257, 4095, 4096, 4097, 32768, 32769):
        yield {"rows": 1, "K": K, "N": 3, "values": "normal"}
        yield {"rows": 33, "K": K, "N": 1, "values": "positive"} if K < 5000 else {"rows": 2, "K": K, "N": 1}
    # Sums long enough to be split, for outputs of more than one tile; and outputs beyond every width of a grid.
    for i, K in enumerate((512, 1024, 2048, 2561, 4096, 10240)):
        yield {"rows": 16 + i, "K": K, "N": 32 - i, "values": "normal" if i % 2 else "positive"}
        yield {"rows": 32, "K": K, "N": 32, "values": "positive" if i % 2 else "normal"}
    for dtype, rows in product(DTYPES, (1, 17)):  # a partial sum that is stored in half shows at this length
        yield {"rows": rows, "K": 16384, "N": 3, "values": "positive" if rows == 1 else "normal", "dtype": dtype}
    for wide in (255, 256, 257, 511, 512, 513, 1024, 2049, 4096, 4097, 8193, 65537):
        yield {"rows": 1, "K": 7, "N": wide}
        yield {"rows": wide, "K": 5, "N": 3} if wide % 2 else {"rows": wide, "K": 8, "N": 1}
        if wide < 600:
            yield {"rows": wide, "K": 9, "N": 600 - wide}
            yield {"rows": 33, "K": 16, "N": wide}
    yield {"rows": 2048, "K": 2, "N": 2048}
    for B in (4, 5, 9, 17, 33, 65):
        yield {"rows": 1 + B % 3, "K": 6, "N": 5, "B": B, "batch": "both" if B % 2 else "a alone"}
    for B in (1, 2, 3) if not full else range(1, 9):
        yield {"rows": 17, "K": 65, "N": 31, "B": B, "batch": "both"}
        yield {"rows": 1, "K": 65, "N": 31, "B": B, "batch": "a alone"}


CONTRACT = Contract(
    name="matmul",
    signature="matmul(a, b)",
    doc="a [..., M, K] @ b [..., K, N] -> [..., M, N]; sums in float32, one rounding to the inputs' dtype.",
    fields={
        "rows": Range(1, 70),
        "K": Range(1, 200),
        "N": Range(1, 70),
        "B": Choice((2, 1, 3)),
        "batch": Choice(BATCHES),
        "values": Choice(KINDS),
    },
    bases=[
        {"rows": 5, "K": 70, "N": 33},
        {"rows": 5, "K": 70, "N": 33, "batch": "both"},
        # A vector on either side, and whole tiles: other kernels, each of which has to heed strides.
        {"rows": 1, "K": 70, "N": 33},
        {"rows": 5, "K": 70, "N": 1},
        {"rows": 64, "K": 64, "N": 64},
    ],
    corpus=corpus,
    build=build,
    judge=judge,
    relations=[permuted_rows("a", applies=lambda case: case["batch"] == "none"), scaled_argument("b", 2.0)],
)
