"""rope(x, *, dims, base, scale, offset, traditional)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from audits.contract import Call, Contract, Finding, Outputs, Relation, Run
from audits.domain import Case, Choice, Range
from audits.frameworks import DTYPES
from audits.relations import close
from audits.rows import judge_rows
from audits.values import draw
from reference import bounds
from reference.arithmetic import Arithmetic
from reference.bounds import Bounded

KINDS = ("normal", "large", "wide", "steps")
# Head sizes, and how many of their dims are rotated (half of them in the partial case).
SIZES = (64, 32, 80, 96, 128, 6, 2, 112, 192, 256, 512)
# bfloat16 holds no whole number above 256 exactly: positions beyond it show angles computed in the input's dtype.
OFFSETS = (0, 1, 7, 255, 257, 1000, 4000, 32767, 32768, 65537, 100003, 131071, 262147)


def build(case: Case) -> Call:
    B, H, L, D = case["B"], case["H"], case["L"], case["D"]
    rng = np.random.default_rng([case["seed"], L, D])
    x = draw(case["values"], (B, H, L, D), rng).astype(DTYPES[case["dtype"]])
    options = {"dims": rotated(case), "base": case["base"], "scale": case["scale"]}
    return Call({"x": x, **options, "offset": case["offset"], "traditional": case["traditional"]})


def rotated(case: Case) -> int:
    """How many of the D dims are rotated."""
    return max(2, case["D"] // 4 * 2) if case["partial"] else int(case["D"])


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    x, dims = torch.from_numpy(call.args["x"].astype(np.float64)), call.args["dims"]
    B, H, L, _ = x.shape
    order = torch.arange(dims)
    if call.args["traditional"]:  # pairs (2j, 2j + 1): gather the first of each, then the second
        order = torch.cat([order[::2], order[1::2]])
    positions = (call.args["offset"] + torch.arange(L, dtype=torch.float64)) * call.args["scale"]
    token_major = x[..., order].permute(0, 2, 1, 3).reshape(B * L, H, dims)
    turned = bounds.rope(token_major, positions.repeat(B), call.args["base"], arithmetic)

    def back(values: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        placed = torch.empty_like(x)
        placed[..., order] = values.reshape(B, L, H, dims).permute(0, 2, 1, 3)
        placed[..., dims:] = rest
        return placed

    tail, nothing = x[..., dims:], torch.zeros_like(x[..., dims:])
    return judge_rows(
        outputs[0],
        Bounded(
            expected=back(turned.expected, tail),
            bound=back(turned.bound, nothing),
            likely=back(turned.likely, nothing),
        ),
    )


def corpus(full: bool) -> Iterator[Case]:
    for i, offset in enumerate((*OFFSETS, *(range(2, 130) if full else ()))):
        for traditional in (False, True):
            yield {"offset": offset, "traditional": traditional, "D": SIZES[i % len(SIZES)], "L": 1 + i % 3}
            yield {"offset": offset, "traditional": traditional, "partial": True, "base": 5e5, "scale": 0.25}
    for L in range(1, 130):
        yield {"L": L, "H": 1 + L % 2, "D": 32, "offset": (L * 37) % 300, "traditional": bool(L % 2)}
    for B, H in ((1, 1), (2, 1), (3, 1), (2, 2), (1, 3), (3, 3)):
        for L in (1, 2, 5):
            yield {"B": B, "H": H, "L": L, "offset": 11, "scale": 0.5 if L == 2 else 1.0}

    for i, H in enumerate((4, 5, 6, 7, 8, 9, 16, 33)):  # kernels take several heads a thread
        yield {
            "B": 1 + i % 3,
            "H": H,
            "L": 1 + 4 * (i // 3 % 2),
            "D": SIZES[i],
            "offset": 19,
            "traditional": i % 4 == 3,
        }
        yield {"B": 2, "H": H, "L": 1, "D": 16, "offset": 3}
    for B in (4, 5, 9, 33):
        yield {"B": B, "H": 2, "L": 1 + B % 2, "D": 8, "offset": 5}
    for i, L in enumerate((255, 256, 257, 513, 1025, 4097)):
        yield {"L": L, "H": 1, "D": 6, "offset": 11, "traditional": bool(i % 2)}


def _later(run: Run, call: Call, outputs: Outputs, case: Case) -> str | None:
    """The last token alone, at its own position, is what it was among the others."""
    x, L = call.args["x"], case["L"]
    (alone,) = run(call.with_(x=x[:, :, L - 1 :].copy(), offset=call.args["offset"] + L - 1))
    if not close(alone, outputs[0][:, :, L - 1 :]):
        return f"token {L - 1} alone at offset {call.args['offset'] + L - 1} is turned in another way"
    return None


CONTRACT = Contract(
    name="rope",
    signature="rope(x, *, dims, base, scale, offset, traditional)",
    doc=(
        "x [B, H, L, D] -> [B, H, L, D]: the first `dims` of D turned by (offset + l)·scale·base^(−2j/dims). "
        "traditional: pairs (2j, 2j+1), else (j, j + dims/2). Angles are never rounded to the inputs' dtype."
    ),
    fields={
        "B": Choice((1, 2, 3, 5)),
        "H": Choice((2, 1, 3, 4, 5, 8)),
        "L": Range(1, 40),
        "D": Choice(SIZES),
        "partial": Choice((False, True)),
        "base": Choice((10000.0, 500000.0, 100.0)),
        "scale": Choice((1.0, 0.25, 0.5, 2.0)),
        "offset": Range(0, 40000),
        "traditional": Choice((False, True)),
        "values": Choice(KINDS),
    },
    bases=[
        {"B": 2, "L": 5, "offset": 300},
        {"B": 2, "L": 5, "offset": 300, "traditional": True},
        {"B": 2, "L": 5, "offset": 300, "partial": True},
        {"B": 2, "L": 5, "offset": 300, "scale": 0.25},
        {"B": 2, "L": 5, "offset": 300, "base": 100.0},
        {"B": 2, "L": 1, "offset": 300},
    ],
    corpus=corpus,
    build=build,
    judge=judge,
    relations=[Relation(name="decode equals prefill", check=_later, applies=lambda case: case["L"] > 1)],
)
