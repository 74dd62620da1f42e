"""penalties(logits, history, *, repetition, presence, frequency)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from audits.contract import Call, Contract, Finding, Outputs, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.relations import permuted_rows
from audits.rows import judge_rows
from reference import bounds
from reference.arithmetic import Arithmetic
from reference.bounds import Bounded

Array = np.ndarray[Any, np.dtype[Any]]
# random: ids drawn with repeats. once: each id once. one id: the same throughout. empty: no token yet. padded: rows of
# unequal length, −1 after their end. out of range: ids that the vocabulary hasn't got, which are ignored.
HISTORIES = ("random", "once", "one id", "empty", "padded", "out of range")


def build(case: Case) -> Call:
    B, V, T = case["B"] if case["batched"] else 1, case["V"], case["T"]
    rng = np.random.default_rng([case["seed"], V, T])
    logits = 4 * rng.standard_normal((B, V)) + case["shift"]
    logits[:, 0] = 0.0
    if case["masked"]:  # ids that a grammar forbids
        logits[:, 1::3] = -np.inf
    history = _history(case["history"], (B, T), V, rng)
    args = {"logits": logits.astype(DTYPES[case["dtype"]]), "history": history.astype(np.int32)}
    if not case["batched"]:
        args = {name: value[0] for name, value in args.items()}
    return Call({**args, **{name: case[name] for name in ("repetition", "presence", "frequency")}})


def _history(kind: str, shape: tuple[int, int], V: int, rng: np.random.Generator) -> Array:
    B, T = shape
    if kind == "empty":
        return np.zeros((B, 0), dtype=np.int64)
    # Some ids only, so that they repeat: the first, the last, and others from everywhere between.
    some = np.append(rng.permutation(V)[: max(1, T // 2)], [0, V - 1])
    drawn = rng.choice(some, shape)
    if kind == "once":
        return np.stack([rng.permutation(V)[: min(T, V)] for _ in range(B)])
    if kind == "one id":
        return np.broadcast_to(drawn[:, :1], shape).copy()
    if kind == "padded":
        return np.where(np.arange(T) < T - np.arange(B)[:, None] * (T // max(1, B)), drawn, -1)
    if kind == "out of range":
        return np.where(np.arange(T) % 2 == 0, V + drawn, drawn) if T > 1 else V + drawn
    return drawn


def counts(history: Array, V: int) -> Array:
    """history [..., T] -> how often each id below V occurs [..., V]."""
    rows = history.reshape(int(np.prod(history.shape[:-1])), history.shape[-1])
    found = np.stack([np.bincount(row[(row >= 0) & (row < V)], minlength=V) for row in rows])
    return found.reshape(*history.shape[:-1], V)


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    logits, history = call.args["logits"], call.args["history"]
    penalty = {name: call.args[name] for name in ("repetition", "presence", "frequency")}
    occurred = torch.from_numpy(counts(history, logits.shape[-1]).astype(np.float64))
    exact = logits.astype(np.float64)
    # Minus infinity stays what it is, whatever is done to it; the rest is judged as if zeros stood there.
    masked, actual = np.isneginf(exact), outputs[0]
    if actual.shape == exact.shape:
        actual = np.where(masked & np.isneginf(actual.astype(np.float64)), np.zeros((), actual.dtype), actual)
    allowed = bounds.penalties(torch.from_numpy(exact), occurred, **penalty, arith=arithmetic)
    return judge_rows(actual, _without(allowed, torch.from_numpy(masked)))


def _without(allowed: Bounded, masked: torch.Tensor) -> Bounded:
    """The same with an exact zero where `masked`."""
    parts = (allowed.expected, allowed.bound, allowed.likely)
    expected, bound, likely = (part.masked_fill(masked, 0.0) for part in parts)
    return Bounded(expected=expected, bound=bound, likely=likely)


def corpus(full: bool) -> Iterator[Case]:
    settings = [
        (1.3, 0.4, 0.25),
        (1.0, 0.4, 0.0),
        (1.0, 0.0, 0.25),
        (1.3, 0.0, 0.0),
        (0.8, -0.3, -0.1),
        (1.0, 0.0, 0.0),
    ]
    for i, history in enumerate(HISTORIES):
        for j, (repetition, presence, frequency) in enumerate(settings):
            penalty = {"repetition": repetition, "presence": presence, "frequency": frequency}
            yield {"history": history, "B": 1 + (i + j) % 3, "V": 16, "T": 13, **penalty}
            yield {"history": history, "V": 40, "T": 7, "shift": -20.0 if j % 2 else 20.0, **penalty}
            yield {"history": history, "V": 21, "T": 9, "masked": True, **penalty}
    for V in (1, 2, 31, 32, 33, 127, 128, 129, 255, 257, 1024, 4097, 32769):
        yield {"V": V, "T": min(V, 70), "repetition": 1.3, "presence": 0.4, "frequency": 0.25}
    for B in (4, 5, 9, 33):
        yield {"B": B, "V": 20, "T": 6, "history": HISTORIES[B % 2 * 4]}
    for T in (127, 128, 129, 255, 256, 257, 511, 513, 1025, 4097):
        yield {"V": 33, "T": T, "history": "one id" if T % 2 else "random", "repetition": 1.1, "frequency": 0.125}
    yield {"V": 70001, "T": 40}
    for T in range(1, 300 if full else 66):
        yield {"V": 33, "T": T, "repetition": 1.1, "presence": 0.5, "frequency": 0.125}


def _order(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """The order of the history doesn't matter."""
    (back,) = run(call.with_(history=call.args["history"][..., ::-1].copy()))
    return None if back.tobytes() == outputs[0].tobytes() else "the history in reverse order gives other logits"


CONTRACT = Contract(
    name="penalties",
    signature="penalties(logits, history, *, repetition, presence, frequency)",
    doc=(
        "logits [B, V], history int [B, T] (ids outside 0…V−1 are ignored) -> [B, V]; or [V] and [T] -> [V]. "
        "For ids that occur: v/repetition if v > 0 else v·repetition, then − presence − frequency·count."
    ),
    fields={
        "B": Choice((2, 1, 3)),
        "V": Range(1, 130),
        "T": Range(1, 40),
        "history": Choice(HISTORIES),
        "repetition": Choice((1.3, 1.0, 0.8)),
        "presence": Choice((0.4, 0.0, -0.3)),
        "frequency": Choice((0.25, 0.0)),
        "shift": Choice((0.0, -20.0, 20.0)),
        "masked": Choice((False, True)),
        "batched": Choice((True, False)),
    },
    bases=[
        {"V": 33, "T": 13},
        {"V": 33, "T": 13, "history": "padded"},
        {"V": 33, "T": 13, "repetition": 1.0},
        {"V": 33, "T": 13, "masked": True},
        {"V": 33, "T": 13, "presence": 0.0, "frequency": 0.0},
    ],
    corpus=corpus,
    build=build,
    judge=judge,
    relations=[
        Relation(name="order of history", check=_order),
        permuted_rows("logits", "history", applies=lambda case: case["batched"]),
    ],
    forms=({"batched": True}, {"batched": False}),
)
