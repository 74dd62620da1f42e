"""quantize(w, *, group_size, bits) -> codes, scales, biases, in MLX's affine layout."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from audits import affine
from audits.contract import Call, Contract, Finding, Outputs, Refusable, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.values import draw
from reference.arithmetic import UNIT_ROUNDOFF, Arithmetic

Array = np.ndarray[Any, np.dtype[Any]]
BITS = (*affine.BITS, 5)
KINDS = ("normal", "large", "small", "positive", "negative", "constant", "zero", "outlier", "ties", "steps")
# A step is (max − min)/n, n = 2^bits − 1. Rounding to the nearest code costs half of one. MLX changes the scale so that
# zero is a code: scale = edge/q with q = round(edge/step), edge the end of larger magnitude, so q ≥ n/2 and the n codes
# may fall short of the other end by n·(1 − edge/step/q) ≤ n/(n + 1) of a step.
STEPS = 1.0


def build(case: Case) -> Call:
    rng = np.random.default_rng([case["seed"], case["rows"], case["groups"]])
    shape, kind = (case["rows"], case["groups"] * case["group_size"]), case["values"]
    if kind in ("constant", "zero"):
        w = np.repeat(rng.standard_normal((shape[0], 1)), shape[1], axis=1) * (kind == "constant")
    elif kind == "outlier":
        w = draw("normal", shape, rng)
        w[:, :: case["group_size"]] *= 50
    elif kind == "negative":
        w = -draw("positive", shape, rng)
    else:
        w = draw(kind, shape, rng)
    options = {"group_size": case["group_size"], "bits": case["bits"]}
    return Call({"w": w.astype(DTYPES[case["dtype"]]), **options})


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    w, group, bits = call.args["w"], call.args["group_size"], call.args["bits"]
    codes, scales, biases = outputs
    per_group = (*w.shape[:-1], w.shape[-1] // group)
    for name, found, shape in (
        ("codes", codes, (*w.shape[:-1], w.shape[-1] * bits // 32)),
        ("scales", scales, per_group),
        ("biases", biases, per_group),
    ):
        if found.shape != shape:
            return Finding(check="shape", message=f"{name} has shape {list(found.shape)}, expected {list(shape)}")
    if codes.dtype != np.uint32:
        return Finding(check="shape", message=f"codes are {codes.dtype}, expected uint32")
    if not (np.isfinite(scales.astype(np.float64)).all() and np.isfinite(biases.astype(np.float64)).all()):
        return Finding(check="values", message="scales or biases are not finite")
    return _judge_codes(w.astype(np.float64), codes, scales, biases, bits)


def _judge_codes(w: Array, words: Array, scales: Array, biases: Array, bits: int) -> Finding | None:
    """Each weight is decoded within STEPS of a step, and by the code that is nearest for the scale and bias given."""
    decoded, _ = affine.decode(words, scales, biases, bits)
    groups = (*scales.shape, -1)
    grouped, error = w.reshape(groups), np.abs(decoded - w).reshape(groups)
    scale, bias = (np.abs(x.astype(np.float64))[..., None] for x in (scales, biases))
    top = 2**bits - 1
    # The scale and the bias are stored rounded, and codes are found in float32.
    u = UNIT_ROUNDOFF.get(str(scales.dtype), 2.0**-24) + 4 * 2.0**-24
    stored = 2 * u * (top * scale + bias) + 2.0**-22 * np.abs(grouped) + 1e-7 * top
    step = (grouped.max(-1, keepdims=True) - grouped.min(-1, keepdims=True)) / top
    wide = ~(error <= STEPS * step * (1 + 2.0**-6) + stored)
    signed = scales.astype(np.float64)[..., None]
    exact = (grouped - biases.astype(np.float64)[..., None]) / np.where(signed == 0, 1, signed)
    nearest = np.abs(np.clip(np.round(exact), 0, top) * signed + biases.astype(np.float64)[..., None] - grouped)
    off = ~(error <= nearest + stored)
    for name, wrong in (("nearest code", off), ("values", wide)):
        if wrong.any():
            flat = wrong.reshape(w.shape)
            first = tuple(int(i) for i in np.argwhere(flat)[0])
            place = ",".join(map(str, first))
            return Finding(
                check=name,
                message=(
                    f"w[{place}] = {w[first]:.6g} is decoded as {decoded[first]:.6g}; {int(flat.sum())} of {flat.size}"
                    f" elements are {'not by their nearest code' if name == 'nearest code' else 'too far'}"
                ),
                evidence={"elements": int(flat.sum()), "share": float(flat.mean())},
            )
    return None


def corpus(full: bool) -> Iterator[Case]:
    for i, kind in enumerate(KINDS):
        for j, bits in enumerate(BITS):
            for group in affine.GROUPS if full else (affine.GROUPS[(i + j) % 3],):
                yield {"rows": 1 + (i + j) % 5, "groups": 1 + j % 3, "bits": bits, "group_size": group, "values": kind}
    for rows in (1, 2, 3, 7, 8, 9, 31, 32, 33, 64, 65, 128, 129, 257, 1025):
        yield {"rows": rows, "groups": 1 + rows % 5, "values": "steps"}
    for groups in (16, 31, 33, 64, 65, 129):
        yield {"rows": 2, "groups": groups, "group_size": 32, "bits": BITS[groups % len(BITS)]}
    for i, (bits, group, dtype) in enumerate(product(BITS, affine.GROUPS, DTYPES)):
        yield {"rows": 3, "bits": bits, "group_size": group, "dtype": dtype, "values": KINDS[i % 2]}


def _alone(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """A row quantised alone, as an append to a cache does, gives the codes that it gets among others."""
    w = call.args["w"]
    for row in (0, len(w) - 1):
        alone = run(call.with_(w=w[row : row + 1].copy()))
        for name, there, here in zip(("codes", "scales", "biases"), alone, outputs, strict=True):
            if there.tobytes() != here[row : row + 1].tobytes():
                return f"row {row} quantised alone has other {name} than among {len(w)} rows"
    return None


CONTRACT = Contract(
    name="quantize",
    signature="quantize(w, *, group_size, bits)",
    doc=(
        "w [..., K] -> codes uint32 [..., K·bits/32], scales and biases [..., K/group_size] in w's dtype: "
        "code·scale + bias is within a step of w, and no other code is nearer."
    ),
    fields={
        "rows": Range(1, 9),
        "groups": Range(1, 4),
        "group_size": Choice(affine.GROUPS),
        "bits": Choice(BITS),
        "values": Choice(KINDS),
    },
    bases=[{"rows": 3, "groups": 2}, {"rows": 3, "groups": 2, "bits": 8}, {"rows": 3, "groups": 2, "bits": 3}],
    corpus=corpus,
    build=build,
    refusable=[Refusable.setting(bits=5)],
    judge=judge,
    outputs=(3,),
    relations=[Relation(name="batch equals alone", check=_alone, applies=lambda case: case["rows"] > 1)],
)
