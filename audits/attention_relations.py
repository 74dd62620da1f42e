"""Relations of attention that need no reference: what must not matter, and routes that must agree.

Keys and values are arrays, or tuples of arrays when they are quantised; every part has the axes [B, Hkv, S, …], so
that rows, heads and tokens are taken from all parts alike. Routes agree up to both bounds: a batch or a chunk of
another size may be multiplied in other blocks. What no query sees must not change a value at all: its weight is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from audits import attention_masks as masks
from audits.candidate import CandidateError
from audits.contract import Call, Judge, Outputs, Relation, Run, built
from audits.domain import Case
from reference.arithmetic import Arithmetic

Array = np.ndarray[Any, np.dtype[Any]]
Allowance = Callable[[Call, Arithmetic], Array]
Check = Callable[[Run, Call, Outputs, Case], str | None]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """An attention contract, as its relations see it.

    keys, values: its arguments' names. build, judge: its own. allowed: the bound of a call [B, Hq, L, Dv]. other: a key
    or value array, or tuple, with other and larger contents. nudged: one with few elements changed, by a generator.
    """

    keys: str
    values: str
    build: Callable[[Case], Call]
    judge: Judge
    allowed: Allowance
    other: Callable[[str, Any], Any]
    nudged: Callable[[Any, np.random.Generator], Any]

    def shape(self, call: Call) -> tuple[int, int, int, int]:
        """[B, Hq, L, S] of a call."""
        B, Hq, L = call.args["q"].shape[:3]
        keys = call.args[self.keys]
        return B, Hq, L, (keys[0] if isinstance(keys, tuple) else keys).shape[2]

    def groups(self, call: Call) -> int:
        """Hkv of a call."""
        keys = call.args[self.keys]
        return int((keys[0] if isinstance(keys, tuple) else keys).shape[1])

    def tokens(self, call: Call, change: Callable[[Array], Array]) -> dict[str, Any]:
        """Keys and values with every part changed."""
        return {name: parts(call.args[name], change) for name in (self.keys, self.values)}


def parts(value: Any, change: Callable[[Array], Array]) -> Any:
    """An array, or each of a tuple of them, changed and made contiguous."""
    if isinstance(value, tuple):
        return tuple(parts(part, change) for part in value)
    return np.ascontiguousarray(change(value))


def relations(op: Attention) -> Iterator[Relation]:
    """All of them, for one contract."""
    for name, applies in UNSEEN.items():
        yield Relation(name=name, check=_bound(_unseen, op), applies=_sighted(applies))
    for name, (check, applies) in ROUTES.items():
        yield Relation(name=name, check=_bound(check, op), applies=_sighted(applies))


def _sighted(applies: Callable[[Case], bool]) -> Callable[[Case], bool]:
    """`applies`, but for cases with queries that see no key: those give what they like, if always the same."""
    return lambda case: case["L"] <= case["S"] and case["pattern"] != "empty" and applies(case)


def _bound(check: Callable[..., str | None], op: Attention) -> Check:
    return lambda run, call, outputs, case: check(op, run, call, outputs, case)


def _agree(actual: Array, expected: Array, allowed: Array) -> str | None:
    """What is wrong with `actual`, which may differ from `expected` by `allowed`."""
    if actual.shape != expected.shape:
        return f"has shape {list(actual.shape)}, expected {list(expected.shape)}"
    error = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    wrong = ~(error <= allowed) & ~(np.isinf(allowed) & ~np.isnan(error))
    if not wrong.any():
        return None
    place = np.unravel_index(int(np.argmax(np.where(wrong, np.nan_to_num(error, nan=np.inf), -1))), error.shape)
    at = ",".join(str(int(i)) for i in place)
    return (
        f"[{at}] is {float(actual[place]):.7g} and was {float(expected[place]):.7g}: {float(error[place]):.3g} apart,"
        f" {float(allowed[place]):.3g} allowed; {int(wrong.sum())} of {wrong.size} elements differ"
    )


def _unseen(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Tokens that a query doesn't see are given other contents: that query's output keeps every value."""
    B, Hq, L, S = op.shape(call)
    Hkv = op.groups(call)
    seen = masks.visible(call.args.get("mask"), (B, Hq, L, S))
    # Of each batch row and key head, what its most short-sighted query doesn't see.
    rows = seen.reshape(B, Hkv, -1, S)
    least = rows.sum(-1).argmin(-1)
    hidden = ~np.take_along_axis(rows, least[..., None, None], axis=2)[:, :, 0]
    changed = {n: _replaced(call.args[n], op.other(n, call.args[n]), hidden) for n in (op.keys, op.values)}
    (moved,) = run(call.with_(**changed))
    same = seen.any(-1) & ~(seen & np.repeat(hidden, Hq // Hkv, axis=1)[:, :, None]).any(-1)
    before, after = outputs[0].astype(np.float64), moved.astype(np.float64)
    differs = same & (before != after).any(-1)
    if not differs.any():
        return None
    b, h, query = (int(i) for i in np.argwhere(differs)[0])
    tokens = np.flatnonzero(hidden[b, h * Hkv // Hq])
    change = np.abs(after - before)[b, h, query].max()
    return (
        f"query [{b},{h},{query}] changes by {float(change):.3g} when tokens that it doesn't see do"
        f" ({len(tokens)} of them, the first {int(tokens[0])})"
    )


def _replaced(value: Any, other: Any, where: Array) -> Any:
    if isinstance(value, tuple):
        return tuple(_replaced(a, b, where) for a, b in zip(value, other, strict=True))
    return np.where(where[..., None], other, value)


def _all_true(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    B, Hq, L, S = op.shape(call)
    allowed = 2 * op.allowed(call, run.arithmetic)
    for shape in ((L, S), (B, 1, L, S), (B, Hq, L, S)):
        (masked,) = run(call.with_(mask=np.ones(shape, bool)))
        if problem := _agree(masked, outputs[0], allowed):
            return f"with an all-true mask {list(shape)} the output {problem}"
    return None


def _additive_zero(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    _, _, L, S = op.shape(call)
    (masked,) = run(call.with_(mask=np.zeros((L, S), call.args["q"].dtype)))
    problem = _agree(masked, outputs[0], 2 * op.allowed(call, run.arithmetic))
    return problem and f"with an additive mask of zeros the output {problem}"


def _shifted(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    _, _, L, S = op.shape(call)
    shifts = np.broadcast_to(np.array([-48.0, 24.0, -8.0])[np.arange(L) % 3, None], (L, S))
    (shifted,) = call.others("shifted", lambda: {"": call.with_(mask=shifts.astype(call.args["q"].dtype))}).values()
    (moved,) = run(shifted)
    allowed = op.allowed(call, run.arithmetic) + op.allowed(shifted, run.arithmetic)
    problem = _agree(moved, outputs[0], allowed)
    return problem and f"with a constant added to all scores of a query the output {problem}"


def _causal(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    B, Hq, L, S = op.shape(call)
    mask = masks.visible("causal", (B, Hq, L, S))[0, 0]
    (masked,) = run(call.with_(mask=mask.copy()))
    problem = _agree(masked, outputs[0], 2 * op.allowed(call, run.arithmetic))
    return problem and f'with the bool form of "causal" the output {problem}'


def _taken(mask: Any, axis: int, index: Any) -> Any:
    """Some planes, rows or columns of a mask of [B, Hq, L, S]; a mask that has one for all of them stays."""
    if not isinstance(mask, np.ndarray):
        return mask
    axis += mask.ndim - 4
    return mask if axis < 0 or mask.shape[axis] == 1 else np.take(mask, index, axis=axis)


def _masked(call: Call, axis: int, index: Any) -> dict[str, Any]:
    return {"mask": _taken(call.args["mask"], axis, index)} if "mask" in call.args else {}


def _alone(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    allowed = 2 * op.allowed(call, run.arithmetic)
    for b in range(op.shape(call)[0]):
        one = op.tokens(call, lambda x, b=b: x[b : b + 1])  # type: ignore[misc]  # the loop's own b
        (alone,) = run(call.with_(q=call.args["q"][b : b + 1].copy(), **one, **_masked(call, 0, [b])))
        if problem := _agree(alone, outputs[0][b : b + 1], allowed[b : b + 1]):
            return f"batch row {b} alone {problem}"
    return None


def _permuted_batch(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    order = np.roll(np.arange(op.shape(call)[0]), 1)
    tokens = op.tokens(call, lambda x: x[order])
    (back,) = run(call.with_(q=call.args["q"][order], **tokens, **_masked(call, 0, order)))
    problem = _agree(back, outputs[0][order], 2 * op.allowed(call, run.arithmetic)[order])
    return problem and f"with batch rows in another order the output {problem}"


def _permuted_heads(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    Hq, groups = op.shape(call)[1], op.groups(call)
    order = np.roll(np.arange(groups), 1)
    heads = np.arange(Hq).reshape(groups, -1)[order].reshape(-1)
    sinks = {"sinks": call.args["sinks"][heads]} if "sinks" in call.args else {}
    tokens = op.tokens(call, lambda x: x[:, order])
    (back,) = run(call.with_(q=call.args["q"][:, heads], **tokens, **sinks, **_masked(call, 1, heads)))
    problem = _agree(back, outputs[0][:, heads], 2 * op.allowed(call, run.arithmetic)[:, heads])
    return problem and f"with heads in another order the output {problem}"


def _permuted_keys(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    order = np.random.default_rng(case["seed"]).permutation(op.shape(call)[3])
    (back,) = run(call.with_(**op.tokens(call, lambda x: x[:, :, order]), **_masked(call, 3, order)))
    problem = _agree(back, outputs[0], 2 * op.allowed(call, run.arithmetic))
    return problem and f"with keys in another order the output {problem}"


def _appended(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """More tokens that nobody sees, some of them before the others, some after."""
    B, _, L, S = op.shape(call)
    allowed = 2 * op.allowed(call, run.arithmetic)
    old = call.args.get("mask")
    mask = np.ones((L, S), bool) if old is None else old
    for before, after in ((0, 1), (5, 29)):
        index = np.concatenate([np.arange(before) % S, np.arange(S), np.arange(after) % S])
        wide = np.take(np.broadcast_to(mask, (*mask.shape[:-1], S)), index, axis=-1)
        hidden = np.ones(len(index), bool)
        hidden[before : before + S] = False
        wide[..., hidden] = False if mask.dtype == np.bool_ else -np.inf
        tokens = {n: parts(op.other(n, call.args[n]), lambda x, i=index: x[:, :, i]) for n in (op.keys, op.values)}  # type: ignore[misc]
        same = {n: parts(call.args[n], lambda x, i=index: x[:, :, i]) for n in (op.keys, op.values)}  # type: ignore[misc]
        place = np.broadcast_to(hidden, (B, op.groups(call), len(index)))
        tokens = {n: _replaced(same[n], tokens[n], place) for n in tokens}
        (longer,) = run(call.with_(mask=wide, **tokens))
        if problem := _agree(longer, outputs[0], allowed):
            return f"with {before} hidden tokens before and {after} after the output {problem}"
    return None


def _decode(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """The last query alone gets what it got among the others."""
    L = op.shape(call)[2]
    mask = _masked(call, 2, [L - 1])
    if isinstance(mask.get("mask"), str):
        mask = {"mask": None}  # the last query sees every key
    (alone,) = run(call.with_(q=call.args["q"][:, :, -1:].copy(), **mask))
    problem = _agree(alone, outputs[0][:, :, -1:], 2 * op.allowed(call, run.arithmetic)[:, :, -1:])
    return problem and f"the last query alone {problem}"


def _chunked(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Queries in two chunks; with "causal", the first chunk when the second one's keys aren't there yet."""
    _, _, L, S = op.shape(call)
    cut, allowed = L // 2, 2 * op.allowed(call, run.arithmetic)
    for first, last in ((0, cut), (cut, L)):
        rows = np.arange(first, last)
        tokens = {}
        if isinstance(call.args.get("mask"), str):
            tokens = op.tokens(call, lambda x, n=S - L + last: x[:, :, :n])  # type: ignore[misc]
        (chunk,) = run(call.with_(q=call.args["q"][:, :, rows], **tokens, **_masked(call, 2, rows)))
        if problem := _agree(chunk, outputs[0][:, :, rows], allowed[:, :, rows]):
            return f"queries {first} to {last - 1} as a chunk: the output {problem}"
    return None


def _options(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Another value of each option in turn, right after this one: judged like any other call."""
    for name, changed in call.others("options", lambda: dict(_other_options(call))).items():
        found = op.judge(changed, run(changed), run.arithmetic)
        if found is not None:
            return f"with another value of an option ({name}) right after: {found.message}"
    return None


def _other_options(call: Call) -> Iterator[tuple[str, Call]]:
    changes: dict[str, dict[str, Any]] = {"scale": {"scale": 1.5 * call.args["scale"]}}
    for name in ("mask", "sinks"):
        if call.args.get(name) is not None:
            changes[f"no {name}"] = {name: None}
    if call.args.get("sinks") is not None:
        changes["sinks"] = {"sinks": call.args["sinks"] + call.args["sinks"].dtype.type(1.5)}
    for name, change in changes.items():
        yield name, Call({k: v for k, v in {**call.args, **change}.items() if v is not None})


def _elements(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """A few elements of every operand, the last dims' among them, given other values: judged like any other call."""
    for name, changed in call.others("elements", lambda: _nudged(op, call, case)).items():
        found = op.judge(changed, run(changed), run.arithmetic)
        if found is not None:
            return f"after a change of single elements of {name}: {found.message}"
    return None


def _nudged(op: Attention, call: Call, case: Case) -> dict[str, Call]:
    rng = np.random.default_rng([case["seed"], 5])
    return {name: call.with_(**{name: op.nudged(call.args[name], rng)}) for name in ("q", op.keys, op.values)}


def _blind(op: Attention, run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Queries that see no key get zeros, or the mean of all values, but the same in every shape, dtype and head count.

    Under an additive mask of −inf what they get is a matter of its own.
    """
    seen: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for dtype in (case["dtype"], *(d for d in run.dtypes if d != case["dtype"])):
        for shape in BLIND if dtype == case["dtype"] else BLIND[::3]:
            empty = built(op.build, {**case, **shape, "dtype": dtype})
            where = ", ".join(f"{name}={value}" for name, value in {"dtype": dtype, **shape}.items())
            try:
                output = run(empty)
            except CandidateError:
                continue  # what may be refused is said elsewhere
            if dtype == case["dtype"] and (found := op.judge(empty, output, run.arithmetic)):
                return f"{where}: {found.message}"
            rows = output[0][masks.blind(empty.args["mask"], op.shape(empty))[0]].astype(np.float64)
            what = "zeros" if (rows == 0).all() else "NaN" if np.isnan(rows).all() else "the mean of all values"
            seen[shape["mask"] == "additive"].setdefault(what, where)
    for kinds in seen.values():
        if len(kinds) > 1:
            told = ", but ".join(f"{what} with {where}" for what, where in kinds.items())
            return f"queries that see no key give {told}"
    return None


# Queries that see no key, in the forms, sizes and head counts that kernels are chosen by.
BLIND: tuple[Case, ...] = tuple(
    {"mask": mask, "pattern": "empty", "fill": "-inf", **shape}
    for shape in (
        {"L": 1, "S": 11, "plane": "LS"},
        {"L": 2, "S": 11, "plane": "B1LS", "Hkv": 1, "r": 4},
        {"L": 8, "S": 64, "plane": "BHLS"},
        {"L": 9, "S": 40, "plane": "B1LS", "r": 1},
        {"L": 34, "S": 70, "plane": "LS"},
        {"L": 1, "S": 300, "plane": "B1LS"},
        {"L": 1, "S": 1100, "plane": "BHLS", "B": 1},
    )
    for mask in ("bool", "additive")
) + tuple({"mask": "causal", "L": L, "S": S} for L, S in ((2, 1), (8, 3), (9, 5), (34, 20), (70, 64)))


def _form(*forms: str) -> Callable[[Case], bool]:
    return lambda case: case["mask"] in forms


def _drawn(*patterns: str) -> Callable[[Case], bool]:
    # Random finite biases hide nothing.
    return lambda case: (
        case["mask"] in ("bool", "additive")
        and case["pattern"] in patterns
        and (case["mask"] == "bool" or case["fill"] != "bias")
    )


UNSEEN: dict[str, Callable[[Case], bool]] = {
    "future key": lambda case: (
        (case["mask"] == "causal" or _drawn("causal", "padding")(case)) and 1 < case["L"] <= case["S"]
    ),
    "outside window": _drawn("window"),
    "masked key": _drawn("random", "block"),
}
ROUTES: dict[str, tuple[Callable[..., str | None], Callable[[Case], bool]]] = {
    "all-true mask equals none": (_all_true, _form("none")),
    "additive zero equals none": (_additive_zero, _form("none")),
    "shifted scores": (_shifted, _form("none")),
    "causal equals its bool form": (_causal, lambda case: case["mask"] == "causal" and case["L"] <= case["S"]),
    "batch equals alone": (_alone, lambda case: case["B"] > 1),
    "permuted batch": (_permuted_batch, lambda case: case["B"] > 1),
    "permuted heads": (_permuted_heads, lambda case: case["Hkv"] > 1),
    "permuted keys": (_permuted_keys, _form("none", "bool", "additive")),
    "appended hidden keys": (_appended, _form("none", "bool", "additive")),
    "decode equals prefill": (_decode, lambda case: case["L"] > 1),
    "chunked equals whole": (_chunked, lambda case: case["L"] > 1),
    "fully masked rows": (_blind, lambda case: case["mask"] == "bool" and case["sinks"] == "none"),
    "options matter": (_options, lambda case: True),
    "every element counts": (_elements, lambda case: True),
}
