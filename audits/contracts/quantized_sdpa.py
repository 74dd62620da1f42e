"""quantized_sdpa(q, keys, values, *, scale, mask, sinks, group_size, bits): attention over affine-quantised tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from audits import affine
from audits import attention_cases as cases
from audits import attention_corpus as shared
from audits.attention_masks import mask_of
from audits.attention_relations import Attention, relations
from audits.contract import Call, Contract, Finding, Outputs, Refusable
from audits.domain import Case, Choice
from audits.frameworks import DTYPES
from reference.arithmetic import Arithmetic

Array = np.ndarray[Any, np.dtype[Any]]

BITS = (8, 4, 2, 6, 3)
# Codes of these lie across words; engines with KV caches of 2, 4 and 8 bits alone refuse them.
ACROSS = (6, 3)
GROUPS = (64, 32, 128)
SIZES = (64, 128, 256)
QUIET = {"float32": 1.0, "float16": 0.5, "bfloat16": 0.125}


def build(case: Case) -> Call:
    rng, dtype = cases.random(case), DTYPES[case["dtype"]]
    mask = mask_of(case, rng)
    q, k, v = cases.operands(case, rng, mask)
    low = case["dtype"] == "bfloat16"
    # What codes stand for is a difference of larger numbers. In low precision its bound says something only where
    # scores are small, whatever the scale, and the values' mean is not.
    if case["values"] not in ("far", "positive", "needle"):
        q = q * QUIET[case["dtype"]] * (min(1.0, case["D"] ** -0.5 / cases.scale_of(case)) if low else 1.0)
    if case["values"] not in ("far", "positive", "constant") and (case["values"] != "needle" or low):
        v = v + rng.standard_normal((*v.shape[:2], 1, v.shape[3]))
    keys, values = (quantised(x, case["group_size"], case["bits"], rng, dtype) for x in (k, v))
    optional = {"mask": mask, "sinks": cases.sinks_of(case, rng)}
    given = {name: value for name, value in optional.items() if value is not None}
    options = {"scale": cases.scale_of(case), **given, "group_size": case["group_size"], "bits": case["bits"]}
    return Call({"q": np.ascontiguousarray(q.astype(dtype)), "keys": keys, "values": values, **options})


def quantised(x: Array, group: int, bits: int, rng: np.random.Generator, dtype: Any) -> tuple[Array, Array, Array]:
    """x [B, H, S, D] -> codes uint32 [B, H, S, D·bits/32], scales and biases [B, H, S, D/group].

    As MLX does, the scale is negative where codes count down from the group's greatest value; here in every other
    group, at random. No bias is a multiple of its scale.
    """
    grouped = x.reshape(*x.shape[:-1], -1, group)
    low, high = grouped.min(-1), grouped.max(-1)
    down = rng.random(low.shape) < 0.5
    width = np.maximum(high - low, 1e-3) / (2**bits - 1)
    scales = np.where(down, -width, width).astype(dtype)
    biases = np.where(down, high, low).astype(dtype)
    codes = (grouped - biases.astype(np.float64)[..., None]) / scales.astype(np.float64)[..., None]
    codes = np.clip(np.rint(codes), 0, 2**bits - 1).astype(np.int64)
    return affine.pack(codes.reshape(x.shape), bits), scales, biases


def judge(call: Call, outputs: Outputs, arithmetic: Arithmetic) -> Finding | None:
    return cases.judge(outputs[0], _inputs(call), arithmetic)


def _allowed(call: Call, arithmetic: Arithmetic) -> Array:
    return np.asarray(_inputs(call).bounded(arithmetic).bound.numpy())


def _inputs(call: Call) -> cases.Inputs:
    a = call.args
    (k, abs_k), (v, abs_v) = (_decoded(a[name], a["bits"]) for name in ("keys", "values"))
    return cases.Inputs(
        call=call, q=a["q"], k=k, v=v, scale=a["scale"], mask=a.get("mask"), sinks=a.get("sinks"), sizes=(abs_k, abs_v)
    )


def _decoded(packed: tuple[Array, Array, Array], bits: int) -> tuple[Array, Array]:
    codes, scales, biases = packed
    return affine.decode(codes, scales, biases, bits)


def _other(name: str, value: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Keys or values with every code inverted and larger scales, another token's."""
    factor = 20 if name == "keys" else -300
    codes, scales, biases = (part[:, :, ::-1] for part in value)
    larger = ((factor * part.astype(np.float64)).astype(part.dtype) for part in (scales, biases))
    return (~codes, *larger)  # type: ignore[return-value]


def _nudged(value: Any, rng: np.random.Generator) -> Any:
    """Other codes in the last word of each row and in a random one of every head; other scales and biases there."""
    if not isinstance(value, tuple):
        changed = value.copy()
        changed[..., -1] = (changed[..., -1].astype(np.float64) + 2).astype(value.dtype)
        return changed
    codes, scales, biases = (part.copy() for part in value)
    codes[..., -1] ^= np.uint32(0xA5A5A5A5)
    for index in np.ndindex(*codes.shape[:2]):
        token = rng.integers(0, codes.shape[2])
        codes[(*index, token, rng.integers(0, codes.shape[3]))] ^= np.uint32(0xFFFFFFFF)
        scales[(*index, token, rng.integers(0, scales.shape[3]))] *= scales.dtype.type(2)
        biases[(*index, token, rng.integers(0, biases.shape[3]))] += biases.dtype.type(1)
    return codes, scales, biases


def valid(case: Case) -> bool:
    """Whether groups fill both head sizes, and the rest goes together."""
    whole = case["D"] % case["group_size"] == 0 and cases.value_size(case) % case["group_size"] == 0
    loud = case["dtype"] == "bfloat16" and (
        case["values"] in ("peaked", "x30") or (case["values"] == "far" and case["bits"] < 8)
    )
    return cases.valid(case) and whole and (case["scale"] != 1.0 or case["values"] == "far") and not loud


def corpus(full: bool) -> Iterator[Case]:
    """Every second case of sdpa's, with bits and groups in turn, and each pair of these with each head size."""
    for i, case in enumerate(shared.corpus(full)):
        D, Dv = max(64, case.get("D", 64) // 64 * 64), case.get("Dv", "D")
        group = GROUPS[i % 2] if D % 128 or Dv not in ("D", 128) else GROUPS[i % 3]
        long = case.get("S", 1) > 5000 and not full
        if full or (i % 2 == 0 and not long):
            yield {
                **case,
                "operand": {"k": "keys", "v": "values"}.get(case.get("operand", ""), case.get("operand", "")),
                "D": D,
                "Dv": Dv if Dv == "D" else max(64, Dv // 64 * 64),
                "bits": BITS[i // 2 % 5],
                "group_size": group,
            }
    for S, bits in ((1100, 2), (8192, 4), (8195, 8)):  # caches take other routes when they are long
        yield {"L": 1, "S": S, "D": 64, "bits": bits, "values": "needle", "B": 2 if S < 2000 else 1, "Hkv": 1}
    for i, (D, group) in enumerate((D, group) for D in SIZES for group in GROUPS):
        for bits in BITS:
            for L in (1, 4):
                yield {"D": D, "L": L, "S": 9, "bits": bits, "group_size": group, "r": 1 + i % 2, "Hkv": 2, "B": 2}


def _bases() -> Iterator[Case]:
    for i, base in enumerate(shared.BASES):
        scale = 0.3 if base.get("scale") else "rsqrt"
        yield {**base, "scale": scale, "bits": BITS[i % 2], "group_size": GROUPS[i % 2]}


CONTRACT = Contract(
    name="quantized_sdpa",
    signature="quantized_sdpa(q, keys, values, *, scale, mask=None, sinks=None, group_size, bits)",
    doc=(
        "q [B, Hq, L, D], keys and values (codes uint32 [B, Hkv, S, D·bits/32], scales and biases [B, Hkv, S,"
        " D/group_size] in q's dtype), a number being code·scale + bias -> [B, Hq, L, Dv]. bits: 2, 3, 4, 6 or 8; codes"
        " lie back to back in a row's words, low bits first. Masks, sinks and queries that see no key are as in sdpa."
        " Judged against the very numbers that the codes stand for."
    ),
    fields={
        **cases.FIELDS,
        "D": Choice(SIZES),
        "Dv": Choice(("D", 64, 128)),
        "bits": Choice(BITS),
        "group_size": Choice(GROUPS),
    },
    bases=list(_bases()),
    corpus=corpus,
    build=build,
    judge=judge,
    valid=valid,
    refusable=(
        cases.REFUSABLE[0],
        Refusable(
            name="head sizes but 64, 128 and 256",
            case={"D": 192, "Dv": "D"},
            covers=lambda case: not {case["D"], cases.value_size(case)} <= set(SIZES),
        ),
        *(Refusable.setting(bits=bits) for bits in ACROSS),
    ),
    relations=list(
        relations(
            Attention(
                keys="keys",
                values="values",
                build=build,
                judge=judge,
                allowed=_allowed,
                other=_other,
                nudged=_nudged,
            )
        )
    ),
)
