"""A partition: the k largest in no order."""

import numpy as np


def candidate(x, *, k):
    return np.argpartition(-x.astype(np.float32), k - 1, axis=-1)[..., :k]
