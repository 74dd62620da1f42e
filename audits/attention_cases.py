"""What the two attention contracts share: operands of a case, and the judgement of an output.

B batch, Hq = r·Hkv query heads, Hkv key heads, L queries, S keys, D and Dv head sizes.

A query that sees no key has no softmax. Two conventions are in use and both are accepted: zeros, and the mean of all
values, which is what filling with a finite number gives. Where an additive mask of −inf hides all keys, NaN is a third
one: −inf is what the scores themselves become, and MLX's CPU backend gives it. With sinks only zeros are right. Where
all keys are hidden by finite numbers as low as the dtype has, their differences may be lost, and zeros are accepted
too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from audits import attention_masks as masks
from audits.contract import Call, Finding, Refusable
from audits.domain import Case, Choice, Field, Range
from audits.frameworks import DTYPES
from audits.rows import judge_rows
from reference import bounds
from reference.arithmetic import Arithmetic
from reference.bounds import Bounded
from reference.threads import threads_for

Array = np.ndarray[Any, np.dtype[Any]]

# normal: N(0,1). flat: scores near zero. peaked: ×8. x30: queries and values. far: all scores below what a running
# maximum may start from. constant: one value for all keys, so that weights must sum to one. ties: three distinct keys.
# rising: every key scores above those before it. sparse: two dims of a query say everything. needle: one visible key
# of each query outweighs all others, half the time the last one. decoy: a hidden key of each query would, half the time
# one beside a visible key. positive: values of one sign, flat scores, so that a sum in low precision shows. poisoned:
# huge keys and values where no query looks. alike: the same in all batch rows and heads.
VALUES = (
    "normal",
    "flat",
    "peaked",
    "x30",
    "far",
    "constant",
    "ties",
    "rising",
    "sparse",
    "needle",
    "decoy",
    "positive",
    "poisoned",
    "alike",
)
SINKS = ("none", "normal", "large", "negative")
# The factor of the scores, or "rsqrt" for the usual D^−½.
SCALES = ("rsqrt", 1.0, 0.3, 0.0625)
FIELDS: dict[str, Field] = {
    "B": Range(1, 3),
    "Hkv": Range(1, 3),
    "r": Choice((1, 2, 4, 3, 8)),
    "L": Range(1, 12),
    "S": Range(1, 70),
    "D": Choice((32, 64, 80, 96, 128, 256)),
    "Dv": Choice(("D", 32, 64, 128)),
    "scale": Choice(SCALES),
    "mask": Choice(masks.FORMS),
    "pattern": Choice(masks.PATTERNS),
    "plane": Choice(masks.PLANES),
    "fill": Choice(masks.FILLS),
    "W": Choice((1, 2, 5, 17)),
    "sinks": Choice(SINKS),
    "values": Choice(VALUES),
}


REFUSABLE = (
    Refusable(
        name='"causal" with more queries than keys',
        case={"mask": "causal", "L": 3, "S": 2},
        covers=lambda case: case["mask"] == "causal" and case["L"] > case["S"],
    ),
    Refusable(
        name="head sizes but 32, 64, 80, 96, 128 and 256",
        case={"D": 72, "Dv": "D"},
        covers=lambda case: not {case["D"], value_size(case)} <= {32, 64, 80, 96, 128, 256},
    ),
)


def valid(case: Case) -> bool:
    """Whether the fields of a case mean something together."""
    before = case["pattern"] in ("causal", "window") and case["L"] > case["S"]
    few = case["L"] < 3 or case["plane"] in ("B11S", "BH1S")
    finite = case["mask"] == "additive" and case["fill"] in ("lowest", "large")
    if finite and (before or (case["pattern"] == "empty" and few)):
        return False  # all queries may see nothing, and what they give be anything: then nothing can be judged
    # A half intermediate has to hold the score before it is scaled.
    far = case["values"] == "far" and (case["scale"] != 1.0 or case["fill"] in ("lowest", "large", "bias", "mixed"))
    # bfloat16 has no digits for such scores: the bound would be wider than the values.
    steep = (case["values"] == "x30" and case["scale"] != "rsqrt") or (case["scale"] == 1.0 and case["D"] > 32)
    blurred = case["dtype"] == "bfloat16" and steep and case["values"] != "far"
    return not far and not blurred


def value_size(case: Case) -> int:
    """Dv."""
    return int(case["D"] if case["Dv"] == "D" else case["Dv"])


def scale_of(case: Case) -> float:
    """The factor of the scores."""
    return float(case["D"] ** -0.5 if case["scale"] == "rsqrt" else case["scale"])


def random(case: Case) -> np.random.Generator:
    """The case's own random numbers."""
    return np.random.default_rng([case["seed"], *(case[n] for n in ("B", "Hkv", "r", "L", "S", "D"))])


def operands(case: Case, rng: np.random.Generator, mask: Array | str | None) -> tuple[Array, Array, Array]:
    """q [B, Hq, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] in float64, of the case's kind of values."""
    B, Hkv, L, S, D = (case[n] for n in ("B", "Hkv", "L", "S", "D"))
    Hq, kind, scale = Hkv * case["r"], case["values"], scale_of(case)
    q = rng.standard_normal((B, Hq, L, D))
    k = rng.standard_normal((B, Hkv, S, D))
    v = rng.standard_normal((B, Hkv, S, value_size(case)))
    if kind == "flat":
        q *= 1e-3
    elif kind == "peaked":
        q *= 8
    elif kind == "x30":
        q, v = q * 30, v * 30
    elif kind == "far":
        size = 200.0 if case["dtype"] == "float16" else 316.0  # scores of −4e4 or −1e5
        q[..., 0], k[..., 0] = -size, size
        # Weights of bfloat16 scores say little, but their sum is one, and what is hidden has none.
        v = np.where(_unseen(case, mask), -60, 0.25 * np.abs(v) + 1)
    elif kind == "constant":
        v[:] = v[:, :, :1]
    elif kind == "ties":
        k = k[:, :, np.arange(S) % 3 % S]
    elif kind == "rising":
        q[..., 1:], q[..., 0], k[..., 0] = 0, 1, np.linspace(-4, 4, S) / scale
    elif kind == "sparse":
        keep = rng.random(q.shape).argsort(-1) < 2
        q = np.where(keep, q, 0) * 4 / scale
    elif kind in ("needle", "decoy"):
        q = _needles(case, rng, k, mask) * ((14 if S < 8000 else 20) / (scale * D))
    elif kind == "positive":
        q, v = 0.1 * q, np.abs(v) + 0.1
    elif kind == "alike":
        q, k, v = (np.broadcast_to(x[:1, :1], x.shape).copy() for x in (q, k, v))
    elif kind == "poisoned":
        unseen = _unseen(case, mask)
        k, v = np.where(unseen, 50 * k, k), np.where(unseen, 1000 * v, v)
    return q, k, v


def _unseen(case: Case, mask: Array | str | None) -> Array:
    """Tokens [B, Hkv, S, 1] that no query of their key head sees."""
    B, Hkv, rows, S = case["B"], case["Hkv"], case["r"] * case["L"], case["S"]
    seen = masks.visible(mask, (B, Hkv * case["r"], case["L"], S))
    return np.asarray(~seen.reshape(B, Hkv, rows, S).any(2))[..., None]


def _needles(case: Case, rng: np.random.Generator, k: Array, mask: Array | str | None) -> Array:
    """For each query a key that it sees, the last one half the time; or a decoy, if it has one, [B, Hq, L, D]."""
    B, Hkv, r, L, S = (case[n] for n in ("B", "Hkv", "r", "L", "S"))
    seen = masks.visible(mask, (B, Hkv * r, L, S))
    half = rng.random(seen.shape[:3]) < 0.5
    last = S - 1 - seen[..., ::-1].argmax(-1)
    target = np.where(half, last, _any(seen, rng))
    if case["values"] == "decoy":
        hidden = ~seen
        beside = hidden.copy()
        beside[..., 1:-1] &= seen[..., :-2] | seen[..., 2:]
        target = np.where(hidden.any(-1), np.where(half, _any(beside, rng), _any(hidden, rng)), target)
    rows, heads = np.arange(B)[:, None, None], np.arange(Hkv * r)[:, None] // r
    return np.asarray(k[rows, heads, target])


def _any(where: Array, rng: np.random.Generator) -> Array:
    """One index along the last axis for which `where` is true, at random; 0 if there is none."""
    return np.asarray(np.where(where, 1 + rng.random(where.shape), 0).argmax(-1))


def sinks_of(case: Case, rng: np.random.Generator) -> Array | None:
    """Sinks [Hq], another for every head, in the case's dtype; None without."""
    kind, heads = case["sinks"], case["Hkv"] * case["r"]
    if kind == "none":
        return None
    noise = rng.standard_normal(heads)
    values = {"normal": 2 * noise, "large": 7 + 2 * np.abs(noise), "negative": -4 - np.abs(noise)}[kind]
    return np.asarray(values.astype(DTYPES[case["dtype"]]))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arguments of one attention `call` in NumPy: k and v [B, Hkv, S, …] float64 where they were quantised.

    sizes: |scale·code| + |bias| of quantised k and v.
    """

    call: Call
    q: Array
    k: Array
    v: Array
    scale: float
    mask: Array | str | None
    sinks: Array | None
    sizes: tuple[Array, Array] | tuple[None, None] = (None, None)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[B, Hq, L, S]."""
        B, Hq, L, _ = self.q.shape
        return B, Hq, L, self.k.shape[2]

    def bounded(self, arithmetic: Arithmetic) -> Bounded:
        """The exact output [B, Hq, L, Dv] and its bound; queries that see no key have zeros."""
        return self.call.once(("bounded", arithmetic), lambda: self._bounded(arithmetic))

    def _bounded(self, arithmetic: Arithmetic) -> Bounded:
        seen, bias = (None if m is None else _folded(m) for m in masks.read(self.mask, self.shape))
        sinks = None if self.sinks is None else torch.from_numpy(np.tile(self.sinks.astype(np.float64), len(self.q)))
        return self._attention(arithmetic, seen, sinks, bias)

    def mean(self, arithmetic: Arithmetic) -> Bounded:
        """The mean of all values, as attention with equal scores computes it."""
        alike = replace(self, q=0 * self.q)
        return self.call.once(("mean", arithmetic), lambda: alike._attention(arithmetic, None, None, None))

    def between(self, mean: Bounded) -> Bounded:
        """Anything between the least and the greatest value: a mean of unknown weights, rounded like `mean`."""
        values = torch.from_numpy(np.repeat(self.v.astype(np.float64), self.q.shape[1] // self.v.shape[1], axis=1))
        low, high = values.amin(2, keepdim=True), values.amax(2, keepdim=True)
        allowed = (high - low) / 2 + mean.bound
        return Bounded(expected=((high + low) / 2).expand_as(allowed), bound=allowed, likely=allowed)

    def _attention(
        self, arithmetic: Arithmetic, seen: Tensor | None, sinks: Tensor | None, bias: Tensor | None
    ) -> Bounded:
        q, k, v = (_folded(x) for x in (self.q, self.k, self.v))
        abs_k, abs_v = (None if x is None else _folded(x) for x in self.sizes)
        with threads_for(self.shape[2] * self.shape[3]):
            found = bounds.attention(
                q, k, v, self.scale, seen, sinks, arithmetic, bias=bias, abs_k=abs_k, abs_v=abs_v, likely=False
            )
        return _mapped(lambda x: x.reshape(*self.shape[:3], -1), found)


def judge(output: Array, inputs: Inputs, arithmetic: Arithmetic) -> Finding | None:
    """What is wrong with an output [B, Hq, L, Dv], or None."""
    exact = inputs.bounded(arithmetic)
    if output.shape != tuple(exact.expected.shape):
        return judge_rows(output, exact)
    hidden, lost = masks.blind(inputs.mask, inputs.shape)
    if inputs.sinks is None and (hidden.any() or lost.any()):
        zero, nan = (output == 0).all(-1), np.isnan(output).all(-1) & hidden & masks.additive(inputs.mask)
        exact = _mapped(lambda x: torch.where(_rows(zero & (hidden | lost)), 0.0, x), exact)
        filled, lost, mean = hidden & ~zero & ~nan, lost & ~zero, inputs.mean(arithmetic)
        if found := _blind_finding(output, mean, filled, zero & hidden, nan):
            return found
        exact = _mapped(lambda x, y: torch.where(_rows(filled), y, x), exact, mean)
        exact = _mapped(lambda x, y: torch.where(_rows(lost), y, x), exact, inputs.between(mean))
        output = np.where(nan[..., None], np.zeros((), output.dtype), output)
    return judge_rows(output, exact)


def _blind_finding(output: Array, mean: Bounded, rest: Array, zero: Array, nan: Array) -> Finding | None:
    """What is wrong with rows [B, Hq, L] that see no key and aren't zero or NaN, given the mean of all values."""
    inside = np.abs(output.astype(np.float64) - mean.expected.numpy()) <= mean.bound.numpy()
    wrong = rest & ~inside.all(-1)
    kinds = {"a mean": rest, "zeros": zero, "NaN": nan}
    given = [name for name, where in kinds.items() if where.any()]
    if not wrong.any() and len(given) < 2:
        return None
    b, h, query = (int(i) for i in np.argwhere(wrong if wrong.any() else kinds[given[0]])[0])
    first = ", ".join(f"{float(x):.5g}" for x in output[b, h, query, :3])
    what = "neither zeros nor the mean of all values" if wrong.any() else f"{given[0]}, and others {given[1]}"
    return Finding(
        check="fully masked rows", message=f"query [{b},{h},{query}] sees no key and gives {first}, …: {what}"
    )


def _rows(where: Array) -> Tensor:
    """[B, H, L] -> bool [B, H, L, 1]."""
    return torch.from_numpy(where)[..., None]


def _folded(x: Array) -> Tensor:
    """[B, H, ...] -> [B·H, ...] float64, or bool: heads of one batch row share keys with nobody in another."""
    x = x.reshape(-1, *x.shape[2:])
    return torch.from_numpy(x.astype(bool if x.dtype == np.bool_ else np.float64))  # a copy, which torch may own


def _mapped(change: Callable[..., Tensor], *results: Bounded) -> Bounded:
    """Every tensor of a Bounded, or of several side by side, changed alike."""
    return Bounded(**{name: change(*(getattr(r, name) for r in results)) for name in ("expected", "bound", "likely")})
