"""Any framework's tensor as a NumPy array of its own: what a tap may be given.

No framework is imported here: whoever hands over a tensor of one has imported it already.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from goldens.errors import GoldenError

Array = np.ndarray[Any, np.dtype[Any]]


def as_numpy(name: str, value: Any) -> Array:
    """A copy of `value` (NumPy, torch, MLX, nested lists) with at least one axis; bfloat16 as `ml_dtypes.bfloat16`.

    A copy, because an engine may use the same buffer for its next step. GoldenError names the probe for anything that
    isn't an array of real numbers.
    """
    try:
        array = _converted(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GoldenError(f"probe {name}: a {type(value).__name__} can't be read as an array ({error})") from error
    if array.dtype != ml_dtypes.bfloat16 and array.dtype.kind not in "fiub":
        raise GoldenError(f"probe {name}: holds {array.dtype}; tap real numbers")
    if array.ndim == 0:
        raise GoldenError(f"probe {name}: is a single number; a probe's first axis is the tokens")
    return array


def _converted(value: Any) -> Array:
    framework = type(value).__module__.partition(".")[0]
    if framework == "torch":
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":
            return np.array(value.view(sys.modules["torch"].int16).numpy()).view(ml_dtypes.bfloat16)
        value = value.numpy()
    if framework == "mlx" and str(value.dtype) == "mlx.core.bfloat16":
        return np.array(value.view(sys.modules["mlx.core"].uint16)).view(ml_dtypes.bfloat16)
    return np.array(value)
