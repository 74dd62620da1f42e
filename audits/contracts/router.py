"""router(logits, *, top_k, scoring, bias=None, norm=True, scale=1.0) -> ids, weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from audits.contract import Call, Contract, Finding, Outputs, Refusable, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.relations import close, permuted_rows
from audits.rows import judge_rows
from reference import bounds
from reference.arithmetic import Arithmetic

Array = np.ndarray[Any, np.dtype[Any]]
SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
BIASED = ("sigmoid", "sqrtsoftplus")  # the scorings whose choice a bias may steer
# cold: every logit about −20, where 1 + eˣ rounds to 1 in float32 and softplus must not be flushed to zero. near: the
# last chosen and the first rejected expert are 1e-3 apart. warm: about 6, where softplus(x) is x but for 1e-3.
KINDS = ("normal", "large", "cold", "ties", "near", "hot", "warm")


def possible(case: Case) -> bool:
    """Sigmoids of about −20 are below what float16 can hold, and a few roots of such softpluses sum to less than the
    floor of 6.1e-5 that some implementations divide by and some have not.
    """
    cold, scoring = case["values"] == "cold", case["scoring"]
    tiny = cold and scoring == "sigmoid" and case["dtype"] == "float16"
    floored = cold and scoring == "sqrtsoftplus" and case["norm"] and case["k"] < 4
    return bool(case["k"] <= case["E"] and not tiny and not floored)


def build(case: Case) -> Call:
    T, E = case["rows"], case["E"]
    rng = np.random.default_rng([case["seed"], T, E])
    logits, kind = rng.standard_normal((T, E)), case["values"]
    if kind == "large":
        logits *= 12
    elif kind == "cold":
        logits -= 19
    elif kind == "hot":
        logits += 25
    elif kind == "warm":
        logits = 6 + 2 * logits
    elif kind == "ties":
        logits = np.round(logits * 2) / 2
    elif kind == "near":
        logits = 0.5 + 1e-3 * rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)
    args: dict[str, Any] = {"logits": logits.astype(DTYPES[case["dtype"]]), "top_k": case["k"]}
    args["scoring"] = case["scoring"]
    if case["bias"] and case["scoring"] in BIASED:
        # As large as the scores' own spread, so that it changes the choice, also between cold scores.
        spread = 1e-4 if kind == "cold" else 1.0
        args["bias"] = (spread * rng.standard_normal((E,))).astype(np.float32)
    if not case["norm"]:
        args["norm"] = False
    if case["scale"] != 1:
        args["scale"] = case["scale"]
    return Call(args)


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    """The chosen experts by margin (a score that another beats by more than both bounds is no choice), their weights
    by bound; slots in any order.
    """
    logits, k = call.args["logits"], call.args["top_k"]
    ids, weights = outputs
    expected = (*logits.shape[:-1], k)
    for name, found in (("ids", ids), ("weights", weights)):
        if found.shape != expected:
            return Finding(check="shape", message=f"{name} has shape {list(found.shape)}, expected {list(expected)}")
    if ids.dtype.kind not in "iu":
        return Finding(check="ids", message=f"ids are {ids.dtype}, no integers")
    chosen, E = ids.astype(np.int64), logits.shape[-1]
    for row, one in enumerate(chosen):
        if one.min() < 0 or one.max() >= E or len(set(one.tolist())) < k:
            return Finding(check="ids", message=f"token {row} goes to {one.tolist()}, which are no {k} of {E} experts")
    exact = torch.from_numpy(logits.astype(np.float64))
    if problem := _wrong_choice(call, exact, chosen, arithmetic):
        return problem
    bias = None if "bias" not in call.args else torch.from_numpy(call.args["bias"].astype(np.float64))
    options = call.args["scoring"], bias, call.args.get("norm", True), call.args.get("scale", 1.0)
    allowed = bounds.router_weights(exact, torch.from_numpy(chosen), *options, arithmetic)
    return judge_rows(weights, allowed, name="weights", check="weights")


def _wrong_choice(call: Call, logits: torch.Tensor, chosen: Array, arithmetic: Arithmetic) -> Finding | None:
    scored = bounds.router_scores(logits, call.args["scoring"], arithmetic)
    scores, bound = scored.expected.numpy(), scored.bound.numpy()
    if "bias" in call.args:
        bias = call.args["bias"].astype(np.float64)
        scores = scores + bias
        # The sum is stored once more, as scores are.
        bound = (
            bound
            + 2.0**-23 * np.abs(scores)
            + (2.0**-8 if arithmetic.dtype == "bfloat16" else 2.0**-11)
            * (np.abs(scores) if arithmetic.intermediate != "float32" else 0)
        )
    taken = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(taken, chosen, True, axis=-1)
    lowest = np.where(taken, scores + bound, np.inf)
    highest = np.where(taken, -np.inf, scores - bound)
    wrong = np.flatnonzero(~(lowest.min(-1) >= highest.max(-1)))
    if not wrong.size:
        return None
    row = int(wrong[0])
    bad, missed = int(lowest[row].argmin()), int(highest[row].argmax())
    margin = float(scores[row, missed] - scores[row, bad])
    return Finding(
        check="choice",
        message=(
            f"token {row} goes to expert {bad}, but {missed} scores higher by {margin:.3g} (a tie up to"
            f" {float(bound[row, bad] + bound[row, missed]):.2g}); {wrong.size} of {len(scores)} tokens are wrong"
        ),
        evidence={"rows": int(wrong.size), "margin": margin, "first_row": row},
    )


def corpus(full: bool) -> Iterator[Case]:
    options = [(s, b, n) for s in SCORINGS for b in ((False, True) if s in BIASED else (False,)) for n in (True, False)]
    for i, (scoring, bias, norm) in enumerate(options):
        case = {"scoring": scoring, "bias": bias, "norm": norm}
        for j, kind in enumerate(KINDS):
            yield {**case, "rows": 1 + (i + j) % 4, "E": 33 + i, "k": 6, "values": kind, "scale": 1.5 if j % 2 else 1.0}
        for E, k in ((2, 1), (4, 2), (8, 8), (31, 5), (128, 6), (256, 8), (384, 8), (512, 10)):
            yield {**case, "rows": 3, "E": E, "k": k, "scale": 2.5}
    for E in range(1, 300 if full else 131):
        yield {"rows": 1 + E % 3, "E": E, "k": 1 + E % min(E, 8), "scoring": SCORINGS[E % 4], "bias": E % 3 == 0}
    for i, rows in enumerate((31, 32, 33, 127, 128, 129, 257, 513, 1025, 4097)):
        yield {"rows": rows, "E": 17, "k": 4, "scoring": SCORINGS[i % 4]}
    for E in (513, 1024, 1025):
        yield {"rows": 2, "E": E, "k": 8, "scoring": SCORINGS[E % 4]}


def _by_expert(outputs: Outputs, E: int) -> Array:
    ids, weights = outputs
    dense = np.zeros((len(ids), E))
    np.put_along_axis(dense, ids.astype(np.int64), weights.astype(np.float64), axis=-1)
    return dense


def _permuted_experts(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Experts in reverse order get the same weights."""
    changed = {name: call.args[name][..., ::-1].copy() for name in ("logits", "bias") if name in call.args}
    back = _by_expert(run(call.with_(**changed)), case["E"])[:, ::-1]
    here = _by_expert(outputs, case["E"])
    same = close(back.astype(outputs[1].dtype), here.astype(outputs[1].dtype))
    return None if same else "experts in reverse order get other weights"


def _bias_is_for_the_choice(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """A bias that is the same for every expert changes nothing."""
    even = run(call.with_(bias=np.full_like(call.args["bias"], 0.5)))
    none = run(Call({k: v for k, v in call.args.items() if k != "bias"}))
    here, there = _by_expert(even, case["E"]), _by_expert(none, case["E"])
    same = close(here.astype(outputs[1].dtype), there.astype(outputs[1].dtype))
    return None if same else "a bias of 0.5 for every expert changes ids or weights"


CONTRACT = Contract(
    name="router",
    signature="router(logits, *, top_k, scoring, bias=None, norm=True, scale=1.0)",
    doc=(
        "logits [T, E], bias float32 [E] -> ids [T, k] and weights [T, k], slots in any order. softmax: top k of the "
        "softmax; topk_softmax: softmax over the top k; sigmoid, sqrtsoftplus: top k of score + bias, weights of the "
        "scores alone. norm divides by their sum, scale multiplies."
    ),
    fields={
        "rows": Range(1, 6),
        "E": Range(1, 140),
        "k": Range(1, 8),
        "scoring": Choice(SCORINGS),
        "bias": Choice((False, True)),
        "norm": Choice((True, False)),
        "scale": Choice((1.0, 1.5, 2.5)),
        "values": Choice(KINDS),
    },
    bases=[
        {"rows": 3, "E": 33, "k": 6},
        {"rows": 3, "E": 33, "k": 6, "norm": False},
        {"rows": 3, "E": 33, "k": 6, "scoring": "topk_softmax"},
        {"rows": 3, "E": 33, "k": 6, "scoring": "sigmoid"},
        {"rows": 3, "E": 33, "k": 6, "scoring": "sigmoid", "bias": True, "scale": 2.5},
        {"rows": 3, "E": 33, "k": 6, "scoring": "sqrtsoftplus", "bias": True},
        {"rows": 3, "E": 33, "k": 6, "scoring": "sqrtsoftplus", "norm": False, "scale": 1.5},
    ],
    corpus=corpus,
    build=build,
    judge=judge,
    valid=possible,
    dtype_key=lambda case: f"{case['dtype']} {case['scoring']}",
    # A model's router knows the scoring of its model, and not always the others.
    forms=({}, *({"scoring": scoring} for scoring in SCORINGS[1:])),
    refusable=[Refusable.setting(scoring=scoring) for scoring in SCORINGS],
    outputs=(2,),
    relations=[
        permuted_rows("logits"),
        Relation(
            name="permuted experts", check=_permuted_experts, applies=lambda case: case["values"] in ("normal", "large")
        ),
        Relation(
            name="bias is for the choice",
            check=_bias_is_for_the_choice,
            applies=lambda case: case["bias"] and case["scoring"] in BIASED and case["values"] == "normal",
        ),
    ],
)
