"""quantized_matmul(x, codes, scales, biases, *, transpose, group_size, bits), in MLX's affine layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from audits import affine
from audits.contract import Call, Contract, Finding, Outputs
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.relations import permuted_rows, scaled_argument
from audits.rows import judge_rows
from audits.values import draw
from reference import bounds
from reference.arithmetic import Arithmetic

KINDS = ("normal", "positive", "large", "steps")
ROWS = (1, 2, 5, 7, 8, 9, 15, 16, 31, 32, 33, 63, 65)


def build(case: Case) -> Call:
    rng = np.random.default_rng([case["seed"], case["rows"], case["groups"], case["N"]])
    K, N = sizes(case)
    dtype = DTYPES[case["dtype"]]
    shape = (N, K) if case["transpose"] else (K, N)
    codes = affine.pack(rng.integers(0, 2 ** case["bits"], shape), case["bits"])
    groups = (shape[0], shape[1] // case["group_size"])
    # Biases are no multiple of the scales: a kernel that takes codes for symmetric is off by a constant.
    scales = (rng.uniform(0.5, 1.5, groups) / 2 ** case["bits"]).astype(dtype)
    biases = (draw("positive" if case["values"] == "positive" else "normal", groups, rng) / 2).astype(dtype)
    x = draw(case["values"], (case["rows"], K), rng).astype(dtype)
    options = {"transpose": case["transpose"], "group_size": case["group_size"], "bits": case["bits"]}
    return Call({"x": x, "codes": codes, "scales": scales, "biases": biases, **options})


def sizes(case: Case) -> tuple[int, int]:
    """K and N; the one that groups run along is whole groups."""
    along = case["group_size"] * case["groups"]
    return (along, case["N"]) if case["transpose"] else (case["N"], along)


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    args = call.args
    weights, magnitude = affine.decode(args["codes"], args["scales"], args["biases"], args["bits"])
    if not args["transpose"]:
        weights, magnitude = weights.T, magnitude.T
    x, w, abs_w = (torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)) for v in (args["x"], weights, magnitude))
    return judge_rows(outputs[0], bounds.linear(x, w, arithmetic, abs_w))


def corpus(full: bool) -> Iterator[Case]:
    widths = range(1, 130)
    for N in widths if full else sorted({*range(1, 34), 63, 64, 65, 96, 127, 128, 129}):
        bits, group = affine.BITS[N % 5], affine.GROUPS[N % 3]
        yield {"rows": ROWS[N % len(ROWS)], "N": N, "groups": 1 + N % 4, "bits": bits, "group_size": group}
    for rows in widths if full else ROWS:
        for i, bits in enumerate(affine.BITS):
            yield {"rows": rows, "N": 9, "groups": 1 + (rows + i) % 3, "bits": bits, "transpose": (rows + i) % 2 == 0}
    for groups in (1, 2, 3, 4, 5, 8, 9, 16, 17):  # more than one block of every loop over K, with few outputs
        for N in (1, 5, 8):
            shape: Case = {"N": N, "groups": groups, "group_size": 32, "bits": affine.BITS[(groups + N) % 5]}
            # A single number that cancels may be less than its bound, and then nothing is judged.
            yield {**shape, "rows": 1, "values": "positive" if N == 1 else "normal"}
            yield {**shape, "rows": 34}
    yield {"rows": 1, "N": 3, "groups": 64, "group_size": 128, "values": "positive"}
    # A running sum in bfloat16 stands still once a group is less than half its last place.
    yield {"rows": 1, "N": 3, "groups": 512, "group_size": 32, "values": "positive", "dtype": "bfloat16"}


CONTRACT = Contract(
    name="quantized_matmul",
    signature="quantized_matmul(x, codes, scales, biases, *, transpose, group_size, bits)",
    doc=(
        "x [T, K], weights code·scale + bias, [N, K] if transpose else [K, N], groups along the last axis -> [T, N]. "
        "codes uint32 [.., ·bits/32] in MLX's layout, scales and biases [.., ·/group_size] in x's dtype."
    ),
    fields={
        "rows": Range(1, 40),
        "N": Range(1, 40),
        "groups": Range(1, 6),
        "group_size": Choice(affine.GROUPS),
        "bits": Choice(affine.BITS),
        "transpose": Choice((True, False)),
        "values": Choice(KINDS),
    },
    bases=[
        {"rows": 3, "N": 9, "groups": 2},
        {"rows": 3, "N": 9, "groups": 2, "transpose": False},
        {"rows": 3, "N": 9, "groups": 2, "bits": 8},
        {"rows": 3, "N": 9, "groups": 2, "bits": 2},
        {"rows": 1, "N": 9, "groups": 4, "group_size": 32},
    ],
    corpus=corpus,
    build=build,
    judge=judge,
    relations=[permuted_rows("x"), scaled_argument("x", 2.0)],
)
