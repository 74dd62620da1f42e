"""decoder(tokens, cache=None, **options): a whole model, judged by pairs of routes that must agree.

There is no reference: a route is compared with another route of the same model. Rounding makes honest routes differ,
more with depth, and a mixture of experts may send a near-tied token elsewhere; so the distance of two rows of logits is
measured against their spread, and in half precision a few rows may be further apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from audits.contract import Array, Call, Contract, Finding, Outputs, Relation, Run
from audits.decoding import VOCABULARY, adapted, vocabulary
from audits.domain import Case, Choice, Range
from reference.arithmetic import Arithmetic

# Relative L2 distance of two rows of logits, after their mean. float32: 4096 units in the last place, for tens of
# layers; half precision: 64 of them.
ALLOWED = {"float32": 2.0**-12, "tf32": 2.0**-5, "float16": 2.0**-5, "bfloat16": 2.0**-2}
# Share of rows that may be further apart in half precision: near-tied experts.
FLIPPED = 0.25


def build(case: Case) -> Call:
    return Call({"tokens": _tokens(case, case["seed"])})


def _tokens(case: Case, seed: int) -> Array:
    rng = np.random.default_rng([seed, case["B"], case["L"]])
    return rng.integers(1, case["V"], (case["B"], case["L"])).astype(np.int32)


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    (logits,) = outputs
    B, L = call.args["tokens"].shape
    if logits.ndim != 3 or logits.shape[:2] != (B, L):
        return Finding(check="shape", message=f"logits have shape {list(logits.shape)}, expected [{B}, {L}, V]")
    bad = np.argwhere(~np.isfinite(logits.astype(np.float64)).all(-1))
    if len(bad):
        row, token = bad[0]
        return Finding(check="values", message=f"logits of row {row}, token {token} are not finite ({len(bad)} such)")
    return None


def apart(actual: Array, expected: Array, arithmetic: Arithmetic) -> str | None:
    """Where two routes' logits [..., V] differ by more than honest rounding, or None."""
    if actual.shape != expected.shape:
        return f"logits have shape {list(actual.shape)} by this route, {list(expected.shape)} by the other"
    a, b = (x.astype(np.float64).reshape(-1, x.shape[-1]) for x in (actual, expected))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    distance = np.linalg.norm(a - b, axis=-1) / np.maximum(np.linalg.norm(b, axis=-1), 1e-30)
    formats = [str(expected.dtype), arithmetic.intermediate, arithmetic.operand or arithmetic.intermediate]
    allowed = max(ALLOWED[name] for name in formats if name in ALLOWED)
    wrong = np.flatnonzero(~(distance <= allowed))
    if len(wrong) <= (FLIPPED * len(distance) if allowed > ALLOWED["float32"] else 0):
        return None
    place = np.unravel_index(int(wrong[0]), expected.shape[:-1])
    return (
        f"logits at {[int(i) for i in place]} differ by {distance[wrong[0]]:.3g} of their spread ({allowed:.2g} is"
        f" allowed); {len(wrong)} of {len(distance)} rows do"
    )


Pair = Callable[[Run, Call, Outputs, Case], str | None]


def _routes(*plans: Callable[[int], list[int]]) -> Pair:
    def check(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
        for plan in plans:
            chunks = [n for n in plan(case["L"]) if n > 0]
            found = apart(run(call.with_(chunks=chunks))[0], outputs[0], run.arithmetic)
            if found:
                return f"in chunks of {chunks} {found}"
        return None

    return check


def _future(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    tokens, at = call.args["tokens"].copy(), case["L"] - 1 - case["L"] // 3
    tokens[:, at] = tokens[:, at] % (case["V"] - 1) + 1
    found = apart(run(call.with_(tokens=tokens))[0][:, :at], outputs[0][:, :at], run.arithmetic)
    return found and f"changing token {at} changes what is before it: {found}"


def _history(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    tokens = call.args["tokens"].copy()
    tokens[:, 0] = tokens[:, 0] % (case["V"] - 1) + 1
    (moved,) = run(call.with_(tokens=tokens))
    same = [row for row in range(case["B"]) if moved[row, -1].tobytes() == outputs[0][row, -1].tobytes()]
    return f"changing token 0 of row {same[0]} leaves the logits of its last token, bit for bit" if same else None


def _alone(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    for row in range(case["B"]):
        found = apart(
            outputs[0][row : row + 1],
            run(Call({"tokens": call.args["tokens"][row : row + 1].copy()}))[0],
            run.arithmetic,
        )
        if found:
            return f"row {row} in a batch of {case['B']}: {found}"
    return None


def _padded(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """Rows of unequal length, padded on the left, each as if alone: in one call, and the last two tokens decoded."""
    tokens, lengths = call.args["tokens"], [max(1, case["L"] - 3 * b) for b in range(case["B"])]
    padding = [case["L"] - n for n in lengths]
    padded = tokens.copy()
    for row, n in enumerate(padding):
        padded[row, :n] = 0
    apiece = [run(Call({"tokens": tokens[row : row + 1, n:].copy()}))[0] for row, n in enumerate(padding)]
    for chunks in ([case["L"]], [n for n in (case["L"] - 2, 1, 1) if n > 0]):
        (together,) = run(Call({"tokens": padded, "left_padding": padding, "chunks": chunks}))
        for row, (n, alone) in enumerate(zip(padding, apiece, strict=True)):
            found = apart(together[row : row + 1, n:], alone, run.arithmetic)
            if found:
                return f"row {row}, padded by {n}, in chunks of {chunks}: {found}"
    return None


def _drafted(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    L = case["L"]
    for at in sorted({*range(1, L, max(1, L // 6)), L - 1}):
        found = apart(run(call.with_(chunks=[at, 1, L - at - 1], draft=at))[0], outputs[0], run.arithmetic)
        if found:
            return f"tokens drafted after {at} and taken back: {found}"
    return None


def _fresh(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    chunks = [case["L"] - 1, 1]
    first = run(call.with_(chunks=chunks))[0]
    run(call.with_(tokens=_tokens(case, case["seed"] + 100), chunks=chunks))
    again = run(call.with_(chunks=chunks))[0]
    return None if first.tobytes() == again.tobytes() else "another sequence in between changes the logits of this one"


def corpus(full: bool) -> Iterator[Case]:
    """Lengths around thresholds, each by the cheapest relation, for there is no reference; when full, every length."""
    lengths = (2, 9, 16, 17, 24, 25, 31, 32, 33, 48, 49, 64, 65)
    for L in (*range(2, 67), 127, 128, 129, 255, 256, 257, 300) if full else lengths:
        yield {"B": 1 + (L < 20 and L % 2), "L": L, "relation": "last token alone"}
    yield {"B": 2, "L": 17, "relation": "left padding"}


def _thirds(L: int) -> list[int]:
    return [L // 3, 1, L - 1 - L // 3]


CONTRACT = Contract(
    name="decoder",
    signature="decoder(tokens, cache=None, **options)",
    session="decoder(tokens, *, chunks=None, draft=None, left_padding=None)",
    doc=(
        "tokens int32 [B, n] -> logits [B, n, V], or those and the cache to go on with. It may have make_cache(), "
        "make_cache(left_padding=[…]) and vocab_size (32 if not). Routes to the same tokens must agree."
    ),
    fields={
        "dtype": Choice(("float32",)),
        "B": Choice((2, 1, 3)),
        "L": Range(2, 48),
        "V": Choice((VOCABULARY,)),
    },
    bases=[{"B": 2, "L": 7}, {"B": 1, "L": 40}, {"B": 3, "L": 12}],
    corpus=corpus,
    build=build,
    judge=judge,
    adapt=adapted,
    settled=lambda candidate: {"V": vocabulary(candidate)},
    examples=6,
    relations=[
        Relation(name="prefill equals decode", check=_routes(lambda L: [1] * L), needs=("chunks",)),
        Relation(
            name="whole equals chunked",
            check=_routes(_thirds, lambda L: [2] * min(L // 2, 9) + [max(L % 2, L - 18)]),
            needs=("chunks",),
        ),
        Relation(name="last token alone", check=_routes(lambda L: [L - 1, 1]), needs=("chunks",)),
        Relation(name="fresh cache", check=_fresh, needs=("chunks",)),
        Relation(name="rejected draft", check=_drafted, needs=("chunks", "draft")),
        Relation(name="future token", check=_future),
        Relation(name="history matters", check=_history, applies=lambda case: case["L"] <= 12),
        Relation(name="batch equals alone", check=_alone, applies=lambda case: case["B"] > 1),
        Relation(
            name="left padding", check=_padded, needs=("left_padding", "chunks"), applies=lambda case: case["B"] > 1
        ),
    ],
)
