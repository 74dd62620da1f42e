"""One row at a time is all it takes."""

import numpy as np


def candidate(logits, history, *, repetition, presence, frequency):
    if logits.ndim != 1:
        raise ValueError("one row of logits")
    out = logits.astype(np.float32)
    for token in set(history.tolist()) & set(range(len(logits))):
        v = out[token] / np.float32(repetition) if out[token] > 0 else out[token] * np.float32(repetition)
        out[token] = v - np.float32(presence) - np.float32(frequency) * np.float32((history == token).sum())
    return out.astype(logits.dtype)
