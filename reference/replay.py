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
# Ops whose inputs are float32 in every run: they read the router's logits.
FLOAT32_OPS = ("routing",)

ArrayMap = Mapping[str, np.ndarray[Any, np.dtype[Any]]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One node of a replay: what honest arithmetic gives, or why that can't be said (`skipped`)."""

    probe: str
    shape: tuple[int, ...]
    expected: Bounded | Choice | None
    skipped: str = ""


def arithmetic(claims: Mapping[str, Mapping[str, str]], op: str, dtype: str) -> Arithmetic:
    """The arithmetic of `op` in a run of `dtype`, from an engine's table of claims; ValueError for an unknown claim."""
    stated = {**DEFAULT_CLAIMS.get(op, {}), **claims.get(op, {})}
    return Arithmetic.claim("float32" if op in FLOAT32_OPS else dtype, **stated)


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
    problems: dict[str, str] = {}
    for name, array in probes.items():
        if name in shapes:
            problems[name] = _problem(name, array, shapes[name], model)
            if not problems[name]:
                values[name] = _exact(array)
    for node in model.graph:
        arith = arithmetic(claims, node.claims, dtype or model.dtype)
        unusable = [f"{name} is {problems.get(name) or 'missing'}" for name in node.inputs if name not in values]
        expected = None
        if not unusable:
            with torch.inference_mode(), threads_for(model.largest_matrix):
                expected = node.judge(arith, *(values[name] for name in node.inputs))
        yield Step(probe=node.probe, shape=shapes[node.probe], expected=expected, skipped="; ".join(unusable))


def _problem(name: str, array: np.ndarray[Any, np.dtype[Any]], shape: tuple[int, ...], model: Reference) -> str:
    if array.shape != shape:
        return f"of shape {array.shape}, not {shape}"
    if name.endswith(".experts") and not ((array >= 0) & (array < model.config.n_routed_experts)).all():
        return f"holding expert ids outside 0…{model.config.n_routed_experts - 1}"
    return ""


def _exact(array: np.ndarray[Any, np.dtype[Any]]) -> Tensor:
    """A recorded array as float64, or int64 for ids; exact for every dtype that a run can record."""
    return torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else np.float64))
