"""quantized_matmul(x, codes, scales, biases, *, transpose, group_size, bits), in MLX's affine layout."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import torch

from audits import affine
from audits.contract import Call, Contract, Finding, Outputs, Refusable
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.relations import permuted_rows, scaled_argument
from audits.rows import judge_rows
from audits.values import draw
from reference import bounds
from reference.arithmetic import Arithmetic
from reference.bounds import Bounded

BITS = (*affine.BITS, 5)
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
    scales = rng.uniform(0.5, 1.5, groups) / 2 ** case["bits"]
    if case["values"] != "positive":
        scales *= rng.choice((-1, 1), groups)  # as mx.quantize makes them
    scales = scales.astype(dtype)
    biases = (draw("positive" if case["values"] == "positive" else "normal", groups, rng) / 2).astype(dtype)
    x = draw(case["values"], (case["rows"], K), rng).astype(dtype)
    options = {"transpose": case["transpose"], "group_size": case["group_size"], "bits": case["bits"]}
    return Call({"x": x, "codes": codes, "scales": scales, "biases": biases, **options})


def sizes(case: Case) -> tuple[int, int]:
    """K and N; the one that groups run along is whole groups."""
    along = case["group_size"] * case["groups"]
    return (along, case["N"]) if case["transpose"] else (case["N"], along)


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    return judge_rows(outputs[0], call.once(arithmetic, lambda: _due(call, arithmetic)))


def _due(call: Call, arithmetic: Arithmetic) -> Bounded:
    args = call.args
    weights, magnitude = affine.decode(args["codes"], args["scales"], args["biases"], args["bits"])
    if not args["transpose"]:
        weights, magnitude = weights.T, magnitude.T
    x, w, abs_w = (torch.from_numpy(np.ascontiguousarray(v, dtype=np.float64)) for v in (args["x"], weights, magnitude))
    return bounds.linear(x, w, arithmetic, abs_w)


def corpus(full: bool) -> Iterator[Case]:
    widths = range(1, 130)
    for N in widths if full else sorted({*range(1, 34), 63, 64, 65, 96, 127, 128, 129}):
        bits, group = BITS[N % len(BITS)], affine.GROUPS[N // len(BITS) % 3]
        yield {"rows": ROWS[N % len(ROWS)], "N": N, "groups": 1 + N % 4, "bits": bits, "group_size": group}
    for rows in widths if full else ROWS:
        for i, bits in enumerate(BITS):
            sizes = {"groups": 1 + (rows + i) % 3, "group_size": affine.GROUPS[(rows // 2 + i) % 3]}
            yield {"rows": rows, "N": 9, **sizes, "bits": bits, "transpose": (rows + i) % 2 == 0}
    for groups in (1, 2, 3, 4, 5, 8, 9, 16, 17):  # more than one block of every loop over K, with few outputs
        for N in (1, 5, 8):
            shape: Case = {"N": N, "groups": groups, "group_size": 32, "bits": BITS[(groups + N) % len(BITS)]}
            # A single number that cancels may be less than its bound, and then nothing is judged.
            yield {**shape, "rows": 1, "values": "positive" if N == 1 else "normal"}
            yield {**shape, "rows": 34}
    for bits, group, dtype, transpose in product(BITS, affine.GROUPS, DTYPES, (True, False)):  # each may have a kernel
        yield {
            "rows": 2,
            "N": 6,
            "groups": 2,
            "bits": bits,
            "group_size": group,
            "dtype": dtype,
            "transpose": transpose,
        }
    for i, bits in enumerate(BITS):  # paths for whole blocks of K, and for weights that lie along K
        for j, group in enumerate(affine.GROUPS):
            case = {"group_size": group, "bits": bits}
            yield {**case, "rows": 1, "N": 8, "groups": 512 // group}
            yield {**case, "rows": (1, 3, 40)[(i + j) % 3], "N": 64, "groups": 128 // group}
            yield {
                **case,
                "rows": 1 + 3 * (j % 2),
                "N": (512, 1025, 2048)[(i + j) % 3],
                "groups": 1,
                "transpose": False,
            }
    for wide in (129, 257, 513, 1025, 4097):
        yield {"rows": wide, "N": 5, "groups": 1, "group_size": 32, "bits": BITS[wide % 4]}
        yield {"rows": 1 + 8 * (wide % 4 // 2), "N": wide - 1, "groups": 1, "group_size": 32, "transpose": wide < 600}
        yield {"rows": 2, "N": wide, "groups": 1, "group_size": 32}
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
        "bits": Choice(BITS),
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
    refusable=[Refusable.setting(bits=5)],
    judge=judge,
    relations=[permuted_rows("x"), scaled_argument("x", 2.0)],
)
