"""Whether a stored Trace belongs to the model and the tokens at hand; refused with what differs if not.

A trace of another checkpoint or prompt fails every comparison in the same way as a wrong kernel does, so it is not
compared at all.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from goldens.errors import GoldenError
from goldens.fingerprint import Fingerprint, differences
from goldens.integrity import quote
from goldens.trace import Trace

NAMED = 3  # differences that a message lists before it counts the rest


def check_model(trace: Trace, found: Fingerprint) -> None:
    """Raise GoldenError, naming the tensors and settings that differ, unless `trace` was made from this model."""
    if trace.provenance.get("model_hash") == found.model_hash:
        return
    changed = differences(trace.provenance, found)
    listed = "; ".join(changed[:NAMED]) + (f"; and {len(changed) - NAMED} more" if len(changed) > NAMED else "")
    raise GoldenError(
        f"case {quote(trace.case)}: stored for another model ({listed or 'its tensors are not recorded'});"
        " restore that model, or run `assay golden regenerate` if the change is meant"
    )


def check_tokens(trace: Trace, tokens: Any) -> None:
    """Raise GoldenError, naming the first that differs, unless `trace` ran exactly `tokens` (ints, [T])."""
    actual, expected = np.asarray(tokens), trace.tokens
    if actual.shape == expected.shape and (actual == expected).all():
        return
    if actual.ndim != 1 or len(actual) == 0:
        found = f"it has {len(expected)} tokens, these have shape {actual.shape}"
    elif (differ := np.flatnonzero(actual[: len(expected)] != expected[: len(actual)])).size:
        found = f"token {differ[0]} is {expected[differ[0]]}, here it's {actual[differ[0]]}"
    else:
        first = min(len(actual), len(expected))
        found = f"it has {len(expected)} tokens, here there are {len(actual)}: they differ from token {first}"
    raise GoldenError(f"case {quote(trace.case)}: it ran other tokens: {found}; run the same prompt")
