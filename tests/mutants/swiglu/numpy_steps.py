"""In float32, rounded once."""

import numpy as np


def candidate(gate, up, *, limit=None):
    g, u = gate.astype(np.float32), up.astype(np.float32)
    if limit is not None:
        g, u = np.minimum(g, np.float32(limit)), np.clip(u, np.float32(-limit), np.float32(limit))
    return (g / (1 + np.exp(-g)) * u).astype(gate.dtype)
