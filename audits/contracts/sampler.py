"""sampler(logits, *, temperature, top_k, top_p, min_p, key) -> ids.

A draw is judged by what it may be (never a token that the filters exclude) and many draws by their distribution, with
fixed keys, so that a verdict is the same every time. Implementations differ in whether the filters look at the
distribution before the temperature or after it: either is accepted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from audits.contract import Call, Contract, Finding, Outputs, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from reference.arithmetic import UNIT_ROUNDOFF, Arithmetic

Array = np.ndarray[Any, np.dtype[Any]]
# Rows of a batch take turns with these, so that a threshold taken over the whole batch shows.
KINDS = ("normal", "flat", "peaked", "masked", "shifted", "ties")
DRAWS = 6  # calls with a key of their own, for the distribution
# A fixed key gives a fixed statistic; one honest sampler in 10⁷ would fail a given case.
CHANCE = 1e-7
# What is due so often is not drawn at all once in 5·10⁸.
NEVER = 20
# Thresholds are compared with rounded probabilities: a token this close to one may be kept or not.
NEAR = 2e-2
# Two probabilities rounded to bfloat16, each from a logit and a sum that were, may come out in the wrong order.
ALIKE = 4 * 2.0**-8
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def build(case: Case) -> Call:
    B = case["B"] if case["batched"] else 1
    rng = np.random.default_rng([case["seed"], case["V"]])
    logits = np.stack([_row(KINDS[(i + case["start"]) % len(KINDS)], case["V"], rng) for i in range(min(B, 3))])
    logits = logits[np.arange(B) % len(logits)].astype(DTYPES[case["dtype"]])
    args: dict[str, Any] = {"logits": logits if case["batched"] else logits[0]}
    args |= {name: case[name] for name in OFF}
    return Call({**args, "key": key(case["seed"], 0)})


def key(seed: int, i: int) -> Array:
    """Key number i of a case, uint32 [2], as MLX's mx.random.key makes them."""
    return np.array([0, 1 + 1000 * seed + i], dtype=np.uint32)


def _row(kind: str, V: int, rng: np.random.Generator) -> Array:
    x = 1.5 * rng.standard_normal(V)
    if kind == "normal":
        x[[0, -1]] += 2  # where a search or a sum goes wrong by one
    if kind == "flat":
        return x * 0.05
    if kind == "peaked":
        return x * 4
    if kind == "masked":
        x[rng.permutation(V)[: V // 2]] = -np.inf
    if kind == "shifted":
        return x + 40
    return np.round(x) if kind == "ties" else x


def allowed(logits: Array, options: dict[str, Any], tempered: bool) -> tuple[Array, Array]:
    """What one row's draw may be: tokens surely kept and tokens possibly kept, bool [V] each.

    `tempered`: whether the filters look at softmax(logits/temperature) or at softmax(logits). Several filters together
    are their intersection for "possibly" and leave nothing sure but the most likely token, since their order varies.
    """
    T = options["temperature"]
    finite = np.isfinite(logits)
    if T == 0:
        best = logits == logits.max()
        return best & (best.sum() == 1), best
    p = _softmax(logits / T if tempered else logits)
    sure, maybe = finite.copy(), finite.copy()
    active = 0
    if 0 < options["top_k"] < len(p):
        active += 1
        edge = np.sort(p)[::-1][options["top_k"] - 1]
        sure &= p > edge * (1 + NEAR)
        # Logits over a temperature, rounded to their dtype, tie with the next ones.
        last = np.sort(logits)[::-1][options["top_k"] - 1]
        maybe &= (p >= edge * (1 - NEAR)) | (logits >= last - options["near"] * abs(last))
    if 0 < options["top_p"] < 1:
        active += 1
        mass = np.sort(p)[::-1].cumsum()
        # A token is kept if the mass before it is less than p; among those as likely, up to the rounding of a
        # probability in half precision, it may be the first or the last.
        more = np.searchsorted(np.sort(-p), -p * (1 + ALIKE), side="left")
        as_much = np.searchsorted(np.sort(-p), -p * (1 - ALIKE), side="right")
        before = np.append(0.0, mass)
        sure &= before[as_much - 1] < options["top_p"] - NEAR
        maybe &= before[more] < options["top_p"] + NEAR
    if options["min_p"] > 0:
        active += 1
        sure &= p > options["min_p"] * p.max() * (1 + NEAR)
        maybe &= p >= options["min_p"] * p.max() * (1 - NEAR)
    if active > 1:
        sure &= p == p.max()
    return sure & maybe, maybe


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return np.asarray(e / e.sum())


def _options(call: Call) -> dict[str, Any]:
    options = {name: call.args.get(name, off) for name, off in OFF.items()}
    dtype = str(call.args["logits"].dtype)
    return {**options, "near": 0.0 if dtype == "float32" else 4 * UNIT_ROUNDOFF[dtype]}


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    """Every id is one that some reading of the filters keeps."""
    logits = np.atleast_2d(call.args["logits"].astype(np.float64))
    ids = np.asarray(outputs[0]).reshape(-1)
    if len(ids) != len(logits) or ids.dtype.kind not in "iu":
        return Finding(
            check="shape",
            message=f"returns {ids.dtype} {list(outputs[0].shape)}; an id for each of {len(logits)} rows is due",
        )
    options = _options(call)
    for row, (x, chosen) in enumerate(zip(logits, ids, strict=True)):
        if not 0 <= chosen < len(x):
            return Finding(check="ids", message=f"row {row}: id {int(chosen)} of a vocabulary of {len(x)}")
        if not any(allowed(x, options, tempered)[1][chosen] for tempered in (False, True)):
            return Finding(
                check="values",
                message=f"row {row}: drew id {int(chosen)} (logit {x[chosen]:.4g}, rank {int((x > x[chosen]).sum())}), "
                f"which {_spoken(options)} excludes",
                evidence={"row": row},
            )
    return None


def _spoken(options: dict[str, Any]) -> str:
    return (
        ", ".join(f"{name}={value}" for name, value in options.items() if value != OFF.get(name, value))
        or "a logit of -inf"
    )


def _distribution(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Many draws of one row's logits are distributed as the filtered softmax says (a χ² test with fixed keys)."""
    options = _options(call)
    drawn = []
    rows = len(call.args["logits"])
    for i in range(DRAWS):
        logits = np.repeat(call.args["logits"][:3], -(-400 // min(3, rows)), axis=0)
        drawn.append(np.asarray(run(call.with_(logits=logits, key=key(case["seed"], i)))[0]).reshape(-1))
    each = -(-400 // min(3, rows))
    for row in range(min(3, rows)):
        x = call.args["logits"][row].astype(np.float64)
        mine = np.stack([part[row * each : (row + 1) * each] for part in drawn])
        if len(np.unique(mine, axis=0)) < DRAWS and min(len(np.flatnonzero(s)) for s in _sure(x, options)) > 1:
            return f"row {row}: other keys give the same {each} draws"
        if (missing := _never(mine, x, options)) is not None:
            return f"row {row}: id {missing} is never drawn, though it is likely"
        if lag := _shared(mine):
            return f"row {row}: rows {lag} apart agree too often: they share their random numbers"
        chances = [_chance(mine.reshape(-1), x, options, tempered) for tempered in (False, True)]
        if max(chances) < CHANCE:
            return (
                f"row {row}: {mine.size} draws are not distributed as {_spoken(options) or 'softmax'} says"
                f" (chance {max(chances):.1g})"
            )
    return None


def _never(draws: Array, logits: Array, options: dict[str, Any]) -> int | None:
    """An id that is surely kept and due NEVER times or more, but not among the draws."""
    counted = np.bincount(draws.reshape(-1), minlength=len(logits))
    missing = counted == 0
    for tempered in (False, True):
        sure, maybe = allowed(logits, options, tempered)
        due = draws.size * _softmax(np.where(maybe, logits / options["temperature"], -np.inf))
        missing &= sure & (due > NEVER)
    return int(missing.argmax()) if missing.any() else None


def _shared(draws: Array) -> int:
    """The first distance at which draws [calls, rows] of equal rows agree more often than independent ones do, or 0.

    Two draws agree with the chance Σp², p as they were drawn: 7 standard deviations above it are one in 10¹¹.
    """
    p = np.bincount(draws.reshape(-1)) / draws.size
    alike = float((p * p).sum())
    for lag in range(1, draws.shape[1] // 2 + 1):
        agreed = draws[:, lag:] == draws[:, :-lag]
        if agreed.mean() > alike + 7 * np.sqrt(alike * (1 - alike) / agreed.size) + 1e-9:
            return lag
    return 0


def _sure(logits: Array, options: dict[str, Any]) -> list[Array]:
    """Tokens that either reading surely keeps and that are drawn often."""
    p = _softmax(logits / options["temperature"])
    return [allowed(logits, options, tempered)[0] & (p > 0.1) for tempered in (False, True)]


def _chance(ids: Array, logits: Array, options: dict[str, Any], tempered: bool) -> float:
    """How likely draws are at least as uneven as these, if they follow the filtered softmax."""
    sure, maybe = allowed(logits, options, tempered)
    best = 0.0
    drawn = np.bincount(ids, minlength=len(logits)) > 0
    for kept in (*_between(sure, maybe, logits), sure | (maybe & drawn)):
        p = _softmax(np.where(kept, logits / (options["temperature"] or 1.0), -np.inf))
        best = max(best, _chi_square(np.bincount(ids, minlength=len(p)), p))
    return best


def _between(sure: Array, maybe: Array, logits: Array) -> Sequence[Array]:
    """The sets that may be kept: the sure ones and, of those near the threshold, the most likely first."""
    doubtful = sorted(np.flatnonzero(maybe & ~sure), key=lambda i: -logits[i])
    sets = [sure.copy()]
    for i in doubtful[:8]:
        sets.append(sets[-1].copy())
        sets[-1][i] = True
    return [kept for kept in (*sets, maybe) if kept.any()]


def _chi_square(counted: Array, p: Array) -> float:
    """The p-value of counts under probabilities p; tokens expected fewer than five times are taken together."""
    expected = p * counted.sum()
    rare = expected < 5
    seen = np.append(counted[~rare], counted[rare].sum())
    due = np.append(expected[~rare], expected[rare].sum())
    if due[-1] < 1:  # what is as good as never expected may not be seen either
        if seen[-1] > 8:
            return 0.0
        seen, due = seen[:-1], due[:-1]
    if len(due) < 2:
        return 1.0
    # The χ² distribution's upper tail is a regularised incomplete gamma function.
    half = torch.tensor([(len(due) - 1) / 2, float(((seen - due) ** 2 / due).sum()) / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def corpus(full: bool) -> Iterator[Case]:
    settings: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"min_p": 0.5, "temperature": 0.7},
        {"top_k": 4, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.7, "top_p": 0.6},
        {"temperature": 0.3, "top_k": 3},
        # What top_k leaves has not the mass that top_p asks for; and nearly greedy.
        {"top_k": 1, "top_p": 0.8},
        {"top_k": 2, "top_p": 0.6},
        {"temperature": 0.01, "dtype": "float32"},
        {"temperature": 0.01, "top_k": 3, "min_p": 0.1, "dtype": "float32"},
    ]
    for i, options in enumerate(settings):
        for V in (1, 2, 16, 33, 128, 257, 1025) if full or i % 2 else (2, 16, 129, 1000):
            if options.get("top_k", 0) <= V:
                yield {"V": V, "B": 1 + (i + V) % 3, "start": i, **options}
        yield {"V": 40, "B": 24, "start": i, **options}
    for start, temperature in ((2, 1.0), (3, 1.5)):  # no filter that would hide what a mask lets through
        yield {"V": 40, "B": 24, "start": start, "temperature": temperature}
    for options in ({"top_k": 40}, {"top_p": 0.5}, {"min_p": 0.3}, {"temperature": 0.0}):
        yield {"V": 32769, "B": 9, **options}
        yield {"V": 70001, "B": 3, "start": 2, **options}


CONTRACT = Contract(
    name="sampler",
    signature="sampler(logits, *, temperature, top_k, top_p, min_p, key)",
    doc=(
        "logits [B, V] -> ids int [B] drawn with key uint32 [2]; or [V] -> one id. temperature 0: the largest; "
        "top_k 0, top_p 1, min_p 0: off. Filters may look at the distribution before or after the temperature."
    ),
    fields={
        "B": Choice((3, 1, 2)),
        "V": Range(2, 200),
        "start": Choice(tuple(range(len(KINDS)))),
        "temperature": Choice((1.0, 0.0, 0.7, 1.5)),
        "top_k": Choice((0, 1, 2)),
        "top_p": Choice((1.0, 0.9, 0.5)),
        "min_p": Choice((0.0, 0.1, 0.3)),
        "batched": Choice((True, False)),
    },
    bases=[
        {"V": 24},
        {"V": 24, "temperature": 0.6},
        {"V": 24, "temperature": 1.6},
        {"V": 24, "top_k": 2},
        {"V": 24, "top_p": 0.6},
        {"V": 24, "min_p": 0.2},
        {"V": 24, "temperature": 0.0},
    ],
    corpus=corpus,
    build=build,
    judge=judge,
    relations=[
        Relation(
            name="distribution", check=_distribution, applies=lambda case: case["batched"] and case["temperature"] > 0
        )
    ],
    forms=({"batched": True}, {"batched": False}),
)
