"""Same-input replay: every op of a recorded run, recomputed in float64 from the inputs that the run itself recorded.

The difference is the op's own error, free of what it inherited, and it is judged against the op's own bound. So a wrong
kernel in layer 1 is named in layer 1 and layers 2…N stay clean, however far their values have moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reference.arithmetic import Arithmetic
from reference.bounds import Bounded
from reference.graph import Choice
from reference.model import Reference
from reference.threads import threads_for

# The arithmetic of ops that an engine doesn't state: float32 accumulation and intermediates, one store in the run's
# dtype. The router is held to float32 throughout, since a logit rounded to half moves experts (DeepSeek-V3 keeps it in
# float32).
DEFAULT_CLAIMS: Mapping[str, Mapping[str, str]] = {"router": {"output": "float32"}}
# Every op that an engine may state the arithmetic of.
OPS = (
    *("embedding", "rms_norm", "linear", "quantized_linear", "rope", "attention", "add", "router", "routing"),
    *("experts", "swiglu", "combine", "logits", "token"),
)
# Ops whose inputs are float32 in every run: they read the router's logits.
FLOAT32_OPS = ("routing",)

ArrayMap = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of a replay: what honest arithmetic gives, or why that can't be said (`skipped`).

    `problem` says what makes the recorded probe itself no answer at all: missing, mis-shaped, of the wrong kind.
    """

    probe: str
    problem: str
    expected: Bounded | Choice | None
    skipped: str = ""


def arithmetic(claims: Mapping[str, Mapping[str, str]], op: str, dtype: str) -> Arithmetic:
    """The arithmetic of `op` in a run of `dtype`, from an engine's table of claims; ValueError for an unknown claim."""
    stated = {**DEFAULT_CLAIMS.get(op, {}), **claims.get(op, {})}
    return Arithmetic.claim("float32" if op in FLOAT32_OPS else dtype, **stated)


def check_claims(claims: Any, dtype: str) -> None:
    """Raise ValueError unless `claims` is a table op -> {claim: dtype} of known ops, claims and dtypes."""
    if not isinstance(claims, Mapping) or not all(isinstance(stated, Mapping) for stated in claims.values()):
        raise ValueError("an engine's arithmetic is a dict: op -> {claim: dtype}")
    if unknown := sorted(set(claims) - set(OPS)):
        raise ValueError(f"arithmetic: no op {unknown[0]!r}; the ops are {', '.join(OPS)}")
    for op in OPS:
        arithmetic(claims, op, dtype)


def replay(
    model: Reference, tokens: Any, probes: ArrayMap, claims: Mapping[str, Mapping[str, str]], dtype: str = ""
) -> Iterator[Step]:
    """One Step a probe, in the order of computation, for a run of `tokens` [T] that recorded `probes`.

    `claims` is the engine's table of arithmetic, by op; `dtype` the dtype that the run computed in, if it is not the
    one that `model` rounded the weights to. A probe whose inputs are missing or mis-shaped is skipped with the reason;
    whether the probe itself is there is for the caller to judge.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    model.check_tokens(ids.tolist())
    shapes = {"tokens": ids.shape, **{node.probe: (len(ids), *node.shape) for node in model.graph}}
    values = {"tokens": torch.from_numpy(ids)}
    problems = {"tokens": ""}
    for name in (node.probe for node in model.graph):
        problems[name] = _problem(name, probes.get(name), shapes[name])
        if not problems[name]:
            values[name] = _exact(probes[name])
    for node in model.graph:
        arith = arithmetic(claims, node.claims, dtype or model.dtype)
        unusable = [f"{name} {problems[name]}" for name in node.inputs if problems[name]]
        unusable += [f"{name} holds ids that no expert has" for name in node.inputs if _invalid(name, values, model)]
        expected = None
        if not unusable:
            with torch.inference_mode(), threads_for(model.largest_matrix):
                expected = node.judge(arith, *(values[name] for name in node.inputs))
        yield Step(probe=node.probe, problem=problems[node.probe], expected=expected, skipped="; ".join(unusable))


def _problem(name: str, array: np.ndarray[Any, np.dtype[Any]] | None, shape: tuple[int, ...]) -> str:
    if array is None:
        return "is missing from the trace"
    if array.shape != shape:
        return f"has shape {array.shape}, the model's is {shape}"
    ids = name.endswith(".experts") or name == "token"
    if ids != (array.dtype.kind in "iu"):
        return f"holds {array.dtype}, {'ids are integers' if ids else 'values are floating-point'}"
    return ""


def _invalid(name: str, values: Mapping[str, Tensor], model: Reference) -> bool:
    if not name.endswith(".experts") or name not in values:
        return False
    return not bool(((values[name] >= 0) & (values[name] < model.config.n_routed_experts)).all())


def _exact(array: np.ndarray[Any, np.dtype[Any]]) -> Tensor:
    """A recorded array as float64, or int64 for ids; exact for every dtype that a run can record."""
    return torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else np.float64))
