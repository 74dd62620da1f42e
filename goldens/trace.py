"""A Trace: the ordered, named tensors of one run, and where they came from.

Engines and the reference hand their intermediates to a `tap(name, array)`; a Recorder is such a tap. A run that feeds
its tokens in several steps (prefill in chunks, then decode) taps each probe once a step: the Recorder joins them along
the token axis, so that a Trace never shows how the tokens were fed.

A Trace knows no engine, no model and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from goldens.arrays import Array, as_numpy
from goldens.errors import GoldenError

# Axis labels by the last part of a probe's name. T tokens, D hidden size, V vocabulary, Hq query heads, Hkv key-value
# heads, Dh head size, E experts, K experts a token, F expert width.
DIMS: dict[str, tuple[str, ...]] = {
    "embedding": ("T", "D"),
    "attn_norm": ("T", "D"),
    "q_proj": ("T", "Hq", "Dh"),
    "k_proj": ("T", "Hkv", "Dh"),
    "q": ("T", "Hq", "Dh"),
    "k": ("T", "Hkv", "Dh"),
    "v": ("T", "Hkv", "Dh"),
    "context": ("T", "Hq", "Dh"),
    "attn_residual": ("T", "D"),
    "mlp_norm": ("T", "D"),
    "router_logits": ("T", "E"),
    "experts": ("T", "K"),
    "weights": ("T", "K"),
    "gate": ("T", "K", "F"),
    "up": ("T", "K", "F"),
    "act": ("T", "K", "F"),
    "down": ("T", "K", "D"),
    "shared_gate": ("T", "F"),
    "shared_up": ("T", "F"),
    "shared_act": ("T", "F"),
    "shared_down": ("T", "D"),
    "output": ("T", "D"),
    "residual": ("T", "D"),
    "final_norm": ("T", "D"),
    "logits": ("T", "V"),
    "token": ("T",),
}


def probe_dims(name: str, ndim: int) -> tuple[str, ...]:
    """Axis labels of probe `name` with `ndim` axes; an unknown probe gets ("T", "axis1", …)."""
    dims = DIMS.get(name.rsplit(".", 1)[-1], ())
    return dims if len(dims) == ndim else ("T", *(f"axis{i}" for i in range(1, ndim)))[:ndim]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The tensors of one run over `tokens` (int32, [T]); every probe's first axis is T.

    `probes` keeps the order of computation. bfloat16 arrays have dtype `ml_dtypes.bfloat16`. `provenance` is JSON-able:
    source ("engine" or "reference"), engine, device, dtype, arithmetic, model, model_hash, seed, command, versions,
    date.
    """

    case: str
    tokens: Array
    probes: Mapping[str, Array]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def dims(self, name: str) -> tuple[str, ...]:
        """Axis labels of one probe."""
        return probe_dims(name, self.probes[name].ndim)


class Recorder:
    """A tap that keeps copies of what it is given; `trace()` joins the steps of each probe along the token axis."""

    def __init__(self) -> None:
        self._steps: dict[str, list[Array]] = {}

    def __call__(self, name: str, array: Any) -> None:
        self._steps.setdefault(name, []).append(as_numpy(name, array))

    def trace(self, *, case: str, tokens: Any, provenance: Mapping[str, Any] | None = None) -> Trace:
        """The Trace of everything tapped so far; GoldenError when the steps of a probe don't fit together."""
        return Trace(
            case=case,
            tokens=np.asarray(tokens, dtype=np.int32),
            probes={name: _joined(name, steps) for name, steps in self._steps.items()},
            provenance=dict(provenance or {}),
        )


def _joined(name: str, steps: list[Array]) -> Array:
    if len(steps) == 1:
        return steps[0]
    try:
        return np.concatenate(steps)
    except (ValueError, TypeError) as error:
        shapes = ", ".join(str(step.shape) for step in steps[:3])
        raise GoldenError(
            f"probe {name}: steps of shapes {shapes} … can't be joined; the first axis is the tokens, the rest stays"
        ) from error
