"""moe_matmul(x, w, ids): each token times the matrices of its experts.

Metal kernels of block-quantised experts are judged by the same idea, tile by tile, in audits/moe_matmul.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from audits.contract import Call, Contract, Finding, Outputs, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.relations import close, permuted_rows
from audits.rows import judge_rows
from audits.values import draw
from reference import bounds
from reference.arithmetic import Arithmetic
from reference.bounds import Bounded
from reference.threads import threads_for

Array = np.ndarray[Any, np.dtype[Any]]
KINDS = ("normal", "positive", "large", "steps")
# even: experts in turn. one: every token's first slot goes to expert 0. skewed: most to one. empty: half of the experts
# get none. sorted: tokens in the order of their experts.
LOADS = ("even", "one", "skewed", "empty", "sorted")


def build(case: Case) -> Call:
    T, E, K, M = case["rows"], case["E"], case["K"], case["M"]
    rng = np.random.default_rng([case["seed"], T, E, K])
    dtype = DTYPES[case["dtype"]]
    x = draw(case["values"], (T, K), rng).astype(dtype)
    w = draw("positive" if case["values"] == "positive" else "normal", (E, M, K), rng).astype(dtype)
    return Call({"x": x, "w": w, "ids": route(case["load"], T, E, case["k"], rng)})


def route(load: str, T: int, E: int, k: int, rng: np.random.Generator) -> Array:
    """ids int32 [T, k], distinct within a token."""
    if load == "even":
        return ((np.arange(T)[:, None] * k + np.arange(k)) % E).astype(np.int32)
    weight = np.ones(E)
    if load == "skewed":
        weight[0] = 20.0 * E
    if load == "empty" and k <= E // 2:
        weight[1::2] = 0.0
    ids = np.stack([rng.choice(E, size=k, replace=False, p=weight / weight.sum()) for _ in range(T)])
    if load == "one":
        ids = np.where(ids == 0, ids[:, :1], ids)
        ids[:, 0] = 0
    if load == "sorted":
        ids = ids[np.argsort(ids[:, 0], kind="stable")]
    return ids.astype(np.int32)


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    x, w = (torch.from_numpy(call.args[name].astype(np.float64)) for name in ("x", "w"))
    ids = call.args["ids"]
    T, k = ids.shape
    parts = {name: np.zeros((T, k, w.shape[1])) for name in ("expected", "bound", "likely")}
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        with threads_for(w[int(expert)].numel()):
            found = bounds.linear(x[torch.from_numpy(token)], w[int(expert)], arithmetic)
        for name, part in parts.items():
            part[token, slot] = getattr(found, name).numpy()
    return judge_rows(outputs[0], Bounded(**{name: torch.from_numpy(part) for name, part in parts.items()}))


def corpus(full: bool) -> Iterator[Case]:
    lengths = range(1, 300) if full else (*range(1, 18), 31, 32, 33, 47, 63, 64, 65, 95, 96, 97, 127, 128, 129, 193)
    for i, T in enumerate(lengths):
        load = LOADS[i % len(LOADS)]
        yield {"rows": T, "E": 5, "k": 2, "K": 40, "M": 9, "load": load, "values": KINDS[i % len(KINDS)]}
        yield {"rows": T, "E": 1, "k": 1, "K": 33, "M": 5, "load": "even"}
    for K in (1, 2, 31, 32, 33, 63, 64, 65, 96, 127, 129, 255, 256, 257, 512, 513, 1024, 4097):
        yield {"rows": 3, "E": 3, "k": 2, "K": K, "M": 7, "values": "normal" if K % 2 else "positive"}
    for M in (*range(1, 18), 31, 33, 63, 64, 65, 70, 129):
        yield {"rows": 3, "E": 4, "k": 2, "K": 48, "M": M, "load": LOADS[M % len(LOADS)]}
    for E, k in ((1, 1), (2, 2), (3, 3), (16, 6), (64, 8), (129, 2)):
        yield {"rows": 34, "E": E, "k": k, "K": 32, "M": 6, "load": "empty"}


def _permuted_experts(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Experts stored in reverse order, with ids to match, give the same result."""
    back = run(Call({"x": call.args["x"], "w": call.args["w"][::-1].copy(), "ids": case["E"] - 1 - call.args["ids"]}))
    return None if close(back[0], outputs[0]) else "experts in reverse order, with ids to match, give other values"


def _alone(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Each of a few tokens alone gets what it gets among the others."""
    for token in sorted({0, case["rows"] // 2, case["rows"] - 1}):
        part = slice(token, token + 1)
        (alone,) = run(call.with_(x=call.args["x"][part].copy(), ids=call.args["ids"][part].copy()))
        if not close(alone, outputs[0][part]):
            return f"token {token} alone gets other values than among {case['rows']}"
    return None


CONTRACT = Contract(
    name="moe_matmul",
    signature="moe_matmul(x, w, ids)",
    doc="x [T, K], w [E, M, K], ids int32 [T, k] -> [T, k, M]: x times each of its experts' matrices, transposed.",
    fields={
        "rows": Range(1, 70),
        "E": Range(1, 12),
        "k": Range(1, 4),
        "K": Range(1, 130),
        "M": Range(1, 40),
        "load": Choice(LOADS),
        "values": Choice(KINDS),
    },
    bases=[
        {"rows": 5, "E": 4, "k": 2, "K": 48, "M": 9},
        {"rows": 40, "E": 4, "k": 2, "K": 48, "M": 9, "load": "skewed"},
    ],
    corpus=corpus,
    build=build,
    judge=judge,
    valid=lambda case: case["k"] <= case["E"],
    relations=[
        permuted_rows("x", "ids"),
        Relation(name="permuted experts", check=_permuted_experts),
        Relation(name="batch equals alone", check=_alone, applies=lambda case: case["rows"] > 1),
    ],
)
