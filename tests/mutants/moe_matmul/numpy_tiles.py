"""Expert by expert: the map of its tokens, then tiles of them, as a GPU does."""

import numpy as np

TILE = 32


def candidate(x, w, ids):
    tokens, slots = ids.shape
    out = np.empty((tokens * slots, w.shape[1]), np.float32)
    for expert in range(len(w)):
        pairs = np.flatnonzero(ids.reshape(-1) == expert)
        for start in range(0, len(pairs), TILE):
            tile = pairs[start : start + TILE]
            out[tile] = x[tile // slots].astype(np.float32) @ w[expert].astype(np.float32).T
    return out.reshape(tokens, slots, -1).astype(x.dtype)
