"""Row by row, in float32, rounded once."""

import numpy as np


def candidate(logits, history, *, repetition, presence, frequency):
    out = logits.copy()
    for row, seen in zip(np.atleast_2d(out), np.atleast_2d(history), strict=True):
        ids, counts = np.unique(seen[(seen >= 0) & (seen < logits.shape[-1])], return_counts=True)
        v = row[ids].astype(np.float32)
        v = np.where(v > 0, v / np.float32(repetition), v * np.float32(repetition))
        row[ids] = (v - np.float32(presence) - np.float32(frequency) * counts.astype(np.float32)).astype(row.dtype)
    return out
