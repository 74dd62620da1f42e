"""moe_matmul(x, w, ids, *, format=None): each token times the matrices of its experts, dense or in blocks.

Metal kernels of block-quantised experts are judged by the same idea, tile by tile, in audits/moe_matmul.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from audits.blocks import FORMATS, decode, random_blocks
from audits.contract import Call, Contract, Finding, Outputs, Refusable, Relation, Run
from audits.domain import Case, Choice, Range, residues
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
# What may be rounded to the input's dtype on the way to scale·code, where a weight is made step by step: d (a float16
# number, in bfloat16), and d·scale.
FACTORS = {"Q8_0": 1, "Q4_K": 2, "Q2_K": 2, "IQ2_XXS": 2}


def build(case: Case) -> Call:
    T, E, K, M, form = case["rows"], case["E"], width(case), case["M"], case["format"]
    rng = np.random.default_rng([case["seed"], T, E, K])
    dtype = DTYPES[case["dtype"]]
    x = draw(case["values"], (T, K), rng).astype(dtype)
    if form:
        w = random_blocks(form, (E, M), K, rng)
    else:
        w = draw("positive" if case["values"] == "positive" else "normal", (E, M, K), rng).astype(dtype)
    args = {"x": x, "w": w, "ids": route(case["load"], T, E, case["k"], rng)}
    return Call({**args, "format": form} if form else args)


def width(case: Case) -> int:
    """K, in whole blocks."""
    block = FORMATS[case["format"]].elements if case["format"] else 1
    return int(-(-case["K"] // block) * block)


def possible(case: Case) -> bool:
    """Blocks lie in memory as they do in a file."""
    moved = case["format"] and case["operand"] == "w" and case["layout"] != "contiguous"
    return bool(case["k"] <= case["E"] and not moved)


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
    return judge_rows(outputs[0], call.once(arithmetic, lambda: _due(call, arithmetic)))


def _due(call: Call, arithmetic: Arithmetic) -> Bounded:
    x, ids = torch.from_numpy(call.args["x"].astype(np.float64)), call.args["ids"]
    w, magnitude, factors = _weights(call)
    T, k = ids.shape
    parts = {name: np.zeros((T, k, w.shape[1])) for name in ("expected", "bound", "likely")}
    for expert in np.unique(ids):
        token, slot = np.nonzero(ids == expert)
        with threads_for(w[int(expert)].numel()):
            sums = None if magnitude is None else magnitude[int(expert)]
            found = bounds.linear(x[torch.from_numpy(token)], w[int(expert)], arithmetic, sums, factors)
        for name, part in parts.items():
            part[token, slot] = getattr(found, name).numpy()
    return Bounded(**{name: torch.from_numpy(part) for name, part in parts.items()})


def _weights(call: Call) -> tuple[torch.Tensor, torch.Tensor | None, int]:
    """w [E, M, K] and, for blocks, the magnitudes that errors go by, and FACTORS."""
    form = call.args.get("format")
    if form is None:
        return torch.from_numpy(call.args["w"].astype(np.float64)), None, 0
    values, magnitude = decode(call.args["w"], form)
    return torch.from_numpy(values), torch.from_numpy(magnitude), FACTORS[form]


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
    for E, k in ((1, 1), (2, 2), (3, 3), (16, 6), (64, 8), (129, 2), (257, 2), (385, 8)):
        yield {"rows": 34, "E": E, "k": k, "K": 32, "M": 6, "load": "empty"}
        yield {"rows": 2, "E": E, "k": k, "K": 5, "M": 3}
    for i, (T, K, M) in enumerate(zip(*residues(32, 3, 1, start=33), strict=True)):  # ragged in all three
        yield {"rows": T, "E": 3, "k": 1 + i % 2, "K": 32 + K, "M": M, "load": LOADS[i % len(LOADS)]}
    for T in (257, 513, 1025, 16402):  # beyond 2¹⁵ pairs too
        yield {"rows": T, "E": 4, "k": 2, "K": 4, "M": 2, "load": "even" if T > 2000 else "sorted"}
    for i, form in enumerate(FORMATS):
        blocks = {"format": form, "E": 3, "k": 2}
        for j, K in enumerate((32, 256, 512, 768, 1024, 2048, 4096)):
            yield {**blocks, "rows": 2, "K": K, "M": 3 + j, "values": KINDS[(i + j) % len(KINDS)]}
        for j, T in enumerate((1, 8, 31, 32, 33, 65, 129) if full else (1, 33, 65 + 64 * (i % 2))):
            yield {**blocks, "rows": T, "K": 256, "M": 5 + 64 * (j % 2), "load": LOADS[(i + j) % len(LOADS)]}


def _permuted_experts(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Experts stored in reverse order, with ids to match, give the same result."""
    back = run(call.with_(w=call.args["w"][::-1].copy(), ids=case["E"] - 1 - call.args["ids"]))
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
    signature="moe_matmul(x, w, ids, *, format=None)",
    doc=(
        "x [T, K], w [E, M, K], ids int32 [T, k] -> [T, k, M]: x times each of its experts' matrices, transposed. "
        "With format, one of ggml's names Q8_0, Q4_K, Q2_K and IQ2_XXS, w is uint8 [E, M, row_bytes], K elements a row "
        "in blocks; a candidate that takes no format, or raises for one, is judged without."
    ),
    fields={
        "rows": Range(1, 70),
        "E": Range(1, 12),
        "k": Range(1, 4),
        "K": Range(1, 130),
        "M": Range(1, 40),
        "load": Choice(LOADS),
        "values": Choice(KINDS),
        "format": Choice(("", *FORMATS)),
    },
    bases=[
        {"rows": 5, "E": 4, "k": 2, "K": 48, "M": 9},
        {"rows": 40, "E": 4, "k": 2, "K": 48, "M": 9, "load": "skewed"},
        *({"rows": 5, "E": 4, "k": 2, "K": 512, "M": 9, "format": form} for form in FORMATS),
    ],
    corpus=corpus,
    build=build,
    judge=judge,
    valid=possible,
    refusable=[Refusable.setting(format=form) for form in FORMATS],
    told=lambda case: {**case, "K": width(case)} if case.get("format") else case,
    dtype_key=lambda case: f"{case['dtype']}{' blocks' if case['format'] else ''}",
    relations=[
        permuted_rows("x", "ids"),
        Relation(name="permuted experts", check=_permuted_experts),
        Relation(name="batch equals alone", check=_alone, applies=lambda case: case["rows"] > 1),
    ],
)
