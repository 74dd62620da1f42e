"""What a candidate returned, before anything is known of what is due: is it arrays of numbers, and which bits?"""

from __future__ import annotations

import hashlib

import ml_dtypes
import numpy as np

from audits.contract import Contract, Finding, Outputs

# NumPy's kinds for None and for text, which a candidate may return in place of an array ("causal").
NO_ARRAY = "OU"


def malformed(outputs: Outputs, contract: Contract) -> Finding | None:
    """A result that is no array, or not as many as the contract says."""
    if len(outputs) not in contract.outputs:
        due = " or ".join(map(str, contract.outputs))
        return Finding(check="shape", message=f"returns {len(outputs)} arrays; {due} expected")
    for x in outputs:
        if contract.words and x.dtype.kind in NO_ARRAY and x.ndim == 0:
            continue
        if x.dtype.kind not in "fiub" and x.dtype != ml_dtypes.bfloat16:
            return Finding(check="shape", message=f"returns {x.dtype}, which is no array of numbers")
    return None


def digest_of(outputs: Outputs) -> str:
    """A short hash of the outputs' dtypes, shapes and bytes: two runs that agree in it agree bit for bit."""
    state = hashlib.sha256()
    for x in outputs:
        state.update(f"{x.dtype}{x.shape}".encode())
        # An object's repr may be its address.
        kinds = [type(part).__name__ for part in x.flat] if x.dtype.kind == "O" else ""
        state.update(f"{kinds}".encode() if kinds else np.ascontiguousarray(x).tobytes())
    return state.hexdigest()[:16]
