"""sdpa(q, k, v, *, scale, mask=None, sinks=None): scaled dot-product attention with every form of mask."""

from __future__ import annotations

from typing import Any

import numpy as np

from audits import attention_cases as cases
from audits.attention_corpus import BASES, corpus
from audits.attention_masks import mask_of
from audits.attention_relations import Attention, relations
from audits.contract import Call, Contract, Finding, Outputs
from audits.domain import Case
from audits.frameworks import DTYPES
from reference.arithmetic import Arithmetic

Array = np.ndarray[Any, np.dtype[Any]]


def build(case: Case) -> Call:
    rng, dtype = cases.random(case), DTYPES[case["dtype"]]
    mask = mask_of(case, rng)
    q, k, v = (np.ascontiguousarray(x.astype(dtype)) for x in cases.operands(case, rng, mask))
    optional = {"mask": mask, "sinks": cases.sinks_of(case, rng)}
    given = {name: value for name, value in optional.items() if value is not None}
    return Call({"q": q, "k": k, "v": v, "scale": cases.scale_of(case), **given})


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    return cases.judge(outputs[0], _inputs(call), arithmetic)


def _allowed(call: Call, arithmetic: Arithmetic) -> Array:
    return np.asarray(_inputs(call).bounded(arithmetic).bound.numpy())


def _inputs(call: Call) -> cases.Inputs:
    a = call.args
    return cases.Inputs(
        call=call, q=a["q"], k=a["k"], v=a["v"], scale=a["scale"], mask=a.get("mask"), sinks=a.get("sinks")
    )


def _other(name: str, value: Array) -> Array:
    """Keys or values that any leak of shows, within every dtype's range."""
    factor = 40 if name == "k" else -500
    return (factor * value.astype(np.float64)[:, :, ::-1]).astype(value.dtype)


def _nudged(value: Array, rng: np.random.Generator) -> Array:
    """Another value for an element of each row's last dim, and of a random one of every head."""
    changed = value.copy()
    changed[..., -1] = (changed[..., -1].astype(np.float64) + 2).astype(value.dtype)
    for index in np.ndindex(*value.shape[:2]):
        token, dim = rng.integers(0, value.shape[2]), rng.integers(0, value.shape[3])
        changed[(*index, token, dim)] += value.dtype.type(3)
    return changed


CONTRACT = Contract(
    name="sdpa",
    signature="sdpa(q, k, v, *, scale, mask=None, sinks=None)",
    doc=(
        "q [B, Hq, L, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv] -> softmax(scale·q·kᵀ)·v [B, Hq, L, Dv]; query head h"
        ' reads key head h // (Hq / Hkv). mask: None, "causal" (bottom right), bool (True = visible) or'
        " additive in q's dtype, broadcastable to [B, Hq, L, S]. sinks [Hq] in q's dtype: one more logit without a"
        ' value. A query that sees no key (with "causal" and L > S the first L − S) gives zeros or the mean of all'
        " values, never NaN, and the same throughout; where an additive mask of −inf hides all keys, zeros, that mean"
        " or NaN, and the same throughout; with sinks, zeros."
    ),
    fields=cases.FIELDS,
    bases=BASES,
    corpus=corpus,
    build=build,
    judge=judge,
    valid=cases.valid,
    refusable=cases.REFUSABLE,
    relations=list(
        relations(
            Attention(
                keys="k",
                values="v",
                build=build,
                judge=judge,
                allowed=_allowed,
                other=_other,
                nudged=_nudged,
            )
        )
    ),
)
