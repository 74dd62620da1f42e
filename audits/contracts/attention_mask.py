"""attention_mask(n, *, offset, window_size=None, left_padding=None): which keys new tokens may look at."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

from audits.contract import Call, Contract, Finding, Outputs, Relation, Run
from audits.domain import Case, Choice, Range
from reference.arithmetic import Arithmetic

Array = np.ndarray[Any, np.dtype[Any]]

# Left padding of each row. zeros: none has any. mixed: others for each row, one of them none. negative: what a batch
# holds of a row that has been trimmed or had none; it hides nothing. long: rows that lie wholly in padding.
PADDINGS = ("none", "zeros", "mixed", "negative", "long")
WINDOWS = (0, 1, 2, 3, 8, 64)  # 0: not passed


def build(case: Case) -> Call:
    args: dict[str, Any] = {"n": case["n"], "offset": case["offset"]}
    if case["window"]:
        args["window_size"] = case["window"]
    padding = padding_of(case)
    if padding is not None:
        args["left_padding"] = padding if case["given"] == "list" else np.array(padding, np.int32)
    return Call(args)


def padding_of(case: Case) -> list[int] | None:
    """The left padding of a case's rows."""
    kind, B, S = case["padding"], case["B"], case["offset"] + case["n"]
    rng = np.random.default_rng([case["seed"], B, S])
    if kind == "none":
        return None
    if kind == "zeros":
        return [0] * B
    if kind == "negative":
        return [-p for p in _integers(rng, 4, B)]
    found = _integers(rng, S, B)
    if kind == "long":
        found[int(rng.integers(0, B))] = S + int(rng.integers(0, 3))
    else:
        found[int(rng.integers(0, B))] = 0 if B > 1 else max(1, S // 2)
    return found


def _integers(rng: np.random.Generator, below: int, count: int) -> list[int]:
    return [int(rng.integers(0, below)) for _ in range(count)]


def expected(call: Call) -> tuple[Array, Array]:
    """bool [B, 1, n, S], True = visible, and the queries [B, n] that lie past their row's padding.

    Query i is token offset + i: it sees j iff offset + i − window_size < j <= offset + i and left_padding <= j.
    """
    n, offset = call.args["n"], call.args["offset"]
    query, key = offset + np.arange(n)[:, None], np.arange(offset + n)
    seen = key <= query
    if call.args.get("window_size") is not None:
        seen = seen & (query < key + call.args["window_size"])
    first = np.asarray(call.args.get("left_padding", [0]), np.int64).reshape(-1, 1, 1, 1)
    return seen & (first <= key), query[:, 0] >= first[:, 0, 0]


def understood(output: Array, call: Call) -> Array | Finding:
    """What a returned mask says, as bool [B, 1, n, S]."""
    n, offset = call.args["n"], call.args["offset"]
    shape = (len(call.args.get("left_padding", [0])), 1, n, offset + n)
    if output.dtype.kind in "OU":
        word = output.item()
        if word is None:
            return np.ones(shape, bool)
        if word != "causal":
            return Finding(check="form", message=f'returns {word!r}; bool, None or "causal" expected')
        return np.broadcast_to(np.arange(offset + n) <= offset + np.arange(n)[:, None], shape)
    if output.dtype != np.bool_:
        return Finding(check="form", message=f"returns an array of {output.dtype}; bool, True = visible, expected")
    try:
        return np.broadcast_to(output, shape)
    except ValueError:
        told = f"{list(output.shape)}, which doesn't broadcast to {list(shape)}"
        return Finding(check="shape", message=f"the mask has shape {told}")


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    actual = understood(outputs[0], call)
    if isinstance(actual, Finding):
        return actual
    exact, real = expected(call)
    wrong = (actual != exact) & real[:, None, :, None]
    if not wrong.any():
        return None
    b, _, i, j = (int(x) for x in np.argwhere(wrong)[0])
    query = call.args["offset"] + i
    what = "hidden from" if exact[b, 0, i, j] else "visible to"
    kind = "" if outputs[0].dtype == np.bool_ else f" (it returns {outputs[0].item()!r})"
    count = f"{int(wrong.sum())} of {wrong.size} wrong"
    return Finding(
        check="values",
        message=f"key {j} is {what} query {i}, token {query}, of row {b}{kind}; {count}",
        evidence={"elements": int(wrong.sum()), "share": float(wrong.mean())},
    )


def corpus(full: bool) -> Iterator[Case]:
    for i, (n, offset) in enumerate(product((1, 2, 3, 8, 17), (0, 1, 2, 5, 31))):
        S = n + offset
        for j, window in enumerate((0, 1, 2, *(w for w in (S - 1, S, S + 1) if w > 0))):
            yield {"n": n, "offset": offset, "window": window, "padding": PADDINGS[(i + j) % 5], "B": 1 + (i + j) % 3}
        for j, (padding, B) in enumerate(product(PADDINGS, (1, 2, 3))):
            yield {"n": n, "offset": offset, "padding": padding, "B": B, "window": (0, 3)[(i + j) % 2]}
    for S in range(1, 131 if full else 67):  # every length, and every residue of it
        n = 1 + S * 7 % min(S, 9)
        yield {"n": n, "offset": S - n, "window": WINDOWS[S % len(WINDOWS)], "padding": PADDINGS[S % 5], "B": 2}
    for i, (n, offset) in enumerate(product((33, 64, 65, 130, 300), (0, 7, 128, 200))):  # chunks beyond any tile
        for j, window in enumerate((0, 5, 64, 127, 128, 129)):
            padding = PADDINGS[(i + j) % 5]
            yield {"n": n, "offset": offset, "window": window, "padding": padding, "B": 1 + (i + j) % 2}
    for i, B in enumerate((4, 5, 8, 17)):  # more rows than a vector holds
        for n, offset in ((1, 9), (6, 0), (B, 20)):
            yield {"n": n, "offset": offset, "window": (0, 3)[i % 2], "padding": ("mixed", "long")[n % 2], "B": B}
    for edge in (255, 256, 32767, 32768, 65536):  # positions beyond a byte, a short
        for n in (1, 2):
            yield {"n": n, "offset": edge, "window": 3}
            yield {"n": n, "offset": edge, "padding": "mixed", "B": 2}


def _alone(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """A row's mask doesn't depend on the other rows."""
    whole = understood(outputs[0], call)
    real = expected(call)[1]
    for b in range(case["B"]):
        one = call.with_(left_padding=call.args["left_padding"][b : b + 1])
        alone = understood(run(one)[0], one)
        if isinstance(whole, Finding) or isinstance(alone, Finding):
            return "returns what is no mask"
        if ((alone[0] != whole[b]) & real[b, :, None]).any():
            return f"row {b} alone has another mask than beside the others"
    return None


def _decoded(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Tokens one by one, each at its own offset, see what they see in a chunk."""
    whole = understood(outputs[0], call)
    real, n, offset = expected(call)[1], case["n"], case["offset"]
    for i in range(n):
        one = call.with_(n=1, offset=offset + i)
        alone = understood(run(one)[0], one)
        if isinstance(whole, Finding) or isinstance(alone, Finding):
            return "returns what is no mask"
        if ((alone[:, 0, 0] != whole[:, 0, i, : offset + i + 1]) & real[:, i, None]).any():
            return f"token {offset + i} alone sees other keys than as number {i} of a chunk of {n}"
    return None


CONTRACT = Contract(
    name="attention_mask",
    signature="attention_mask(n, *, offset, window_size=None, left_padding=None)",
    doc=(
        "n new tokens after `offset` buffered ones, left_padding [B] -> bool [B, 1, n, offset + n] or what broadcasts"
        ' to it, True = visible; None or "causal" only where that says the same. Token t = offset + i sees key j iff'
        " max(left_padding, t − window_size + 1) <= j <= t. Queries inside padding mean nothing and aren't judged."
    ),
    fields={
        "dtype": Choice(("float32",)),  # a mask has none: one sweep
        "B": Range(1, 3),
        "n": Range(1, 20),
        "offset": Range(0, 40),
        "window": Choice(WINDOWS),
        "padding": Choice(PADDINGS),
        "given": Choice(("list", "array")),
    },
    bases=[
        {"B": 3, "n": 3, "offset": 4, "padding": "mixed"},
        {"n": 3, "offset": 4},
        {"n": 3, "offset": 4, "window": 2},
        {"n": 1, "offset": 6, "window": 2},
        {"n": 1, "offset": 6},
        {"B": 3, "n": 1, "offset": 6, "padding": "mixed", "window": 3},
    ],
    corpus=corpus,
    build=build,
    judge=judge,
    relations=[
        Relation(name="batch equals alone", check=_alone, applies=lambda c: c["padding"] != "none" and c["B"] > 1),
        Relation(name="decode equals prefill", check=_decoded, applies=lambda case: case["n"] > 1),
    ],
    forms=({"given": "list"}, {"given": "array"}),
    words=True,
)
