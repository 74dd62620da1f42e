"""Arrays between NumPy, in which cases are made and judged, and the framework of a candidate.

A layout is how the same values lie in memory. Only the framework's own views are used, so that a candidate gets what
its users would give it. bfloat16 in NumPy is `ml_dtypes.bfloat16`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

FRAMEWORKS = ("numpy", "mlx", "torch")
# contiguous: as made. transposed: the last two axes swapped in memory. permuted: the two axes before the last swapped,
# as the heads of a projection lie. sliced: a window of a larger array, full of NaN around it. strided: every second
# element of an array whose others are NaN. reversed: a negative stride on the first axis (torch has none and gets
# `sliced`). offset: a view that starts one element late, so that nothing is aligned beyond the element. broadcast:
# a stride of zero along each axis that nothing changes along.
LAYOUTS = ("contiguous", "transposed", "permuted", "sliced", "strided", "reversed", "offset", "broadcast")
# Axes that a layout needs; with fewer it is contiguous.
AXES = {"transposed": 2, "permuted": 3}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def poison(dtype: np.dtype[Any]) -> Any:
    """What lies around a view: NaN, or all ones for integers; False for booleans."""
    if np.issubdtype(dtype, np.floating) or dtype == ml_dtypes.bfloat16:
        return np.array(np.nan, dtype)
    return np.array(False) if dtype == np.bool_ else np.array(np.iinfo(dtype).max, dtype)


def give(value: Array, framework: str, layout: str = "contiguous", device: str | None = None) -> Any:
    """`value` as an array of `framework` that lies in memory as `layout` says; same shape, dtype and values.

    ValueError for an unknown framework or layout.
    """
    if framework not in FRAMEWORKS:
        raise ValueError(f"no framework {framework!r}; there is {', '.join(FRAMEWORKS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"no layout {layout!r}; there is {', '.join(LAYOUTS)}")
    make = {"numpy": _numpy, "mlx": _mlx, "torch": _torch}[framework]
    if framework == "torch" and layout == "reversed":
        layout = "sliced"
    if not differs(value, layout):
        layout = "contiguous"
    return _laid_out(value, layout, lambda x: make(x, device))


def differs(value: Array, layout: str) -> bool:
    """Whether an array can lie so at all, and then lies otherwise than contiguous."""
    if layout == "broadcast" and not any(n > 1 and same for n, same in zip(value.shape, _constant(value), strict=True)):
        return False
    return value.ndim >= AXES.get(layout, 1) and value.size > 0


def _constant(value: Array) -> list[bool]:
    """For each axis, whether nothing changes along it."""
    return [value.size > 0 and bool((value == value.take([0], axis)).all()) for axis in range(value.ndim)]


def _laid_out(value: Array, layout: str, make: Callable[[Array], Any]) -> Any:
    if layout == "transposed":
        made = make(np.swapaxes(value, -1, -2).copy())
        return made.swapaxes(-1, -2) if hasattr(made, "swapaxes") else made.transpose(-1, -2)
    if layout == "permuted":
        made = make(np.swapaxes(value, -2, -3).copy())
        return made.swapaxes(-2, -3) if hasattr(made, "swapaxes") else made.transpose(-2, -3)
    if layout == "broadcast":
        single = value[tuple(slice(0, 1) if same else slice(None) for same in _constant(value))]
        return _broadcast(make(single.copy()), value.shape)
    if layout == "sliced":
        around = np.full([n + 2 for n in value.shape], poison(value.dtype), value.dtype)
        inside = tuple(slice(1, n + 1) for n in value.shape)
        around[inside] = value
        return make(around)[inside]
    if layout == "strided":
        around = np.full((*value.shape[:-1], 2 * value.shape[-1]), poison(value.dtype), value.dtype)
        around[..., ::2] = value
        return make(around)[..., ::2]
    if layout == "reversed":
        return make(value[::-1].copy())[::-1]
    if layout == "offset":
        flat = np.concatenate([np.full(1, poison(value.dtype), value.dtype), value.reshape(-1)])
        return make(flat)[1:].reshape(value.shape)
    return make(value.copy())


def _broadcast(made: Any, shape: tuple[int, ...]) -> Any:
    if isinstance(made, np.ndarray):
        return np.broadcast_to(made, shape)
    if hasattr(made, "expand"):
        return made.expand(shape)
    import mlx.core as mx

    return mx.broadcast_to(made, shape)


def _numpy(value: Array, device: str | None) -> Array:
    return value.copy()


def _mlx(value: Array, device: str | None) -> Any:
    import mlx.core as mx

    if value.dtype == ml_dtypes.bfloat16:
        return mx.array(value.view(np.uint16)).view(mx.bfloat16)
    return mx.array(value)


def _torch(value: Array, device: str | None) -> Any:
    import torch

    if value.dtype == ml_dtypes.bfloat16:
        made = torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
    else:
        made = torch.from_numpy(value.copy())
    return made if device is None else made.to(device)


def take(value: Any) -> Array:
    """A candidate's array, of any framework, or a number, as a NumPy array of the same dtype, evaluated and copied."""
    kinds = {base.__module__.split(".")[0] for base in type(value).__mro__}  # a torch Parameter's subclass is torch's
    if "mlx" in kinds:
        import mlx.core as mx

        if value.dtype == mx.bfloat16:
            return np.array(value.view(mx.uint16)).view(ml_dtypes.bfloat16)
        return np.array(value)
    if "torch" in kinds:
        import torch

        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:
            value = value.contiguous().view(torch.int16)
            return np.array(value.numpy()).view(ml_dtypes.bfloat16)
        return np.array(value.numpy())
    return np.array(value)


def foul_memory(sizes: list[int], framework: str) -> None:
    """Fill freed memory of these sizes in bytes with NaN, so that what a candidate leaves unwritten shows.

    Allocators hand out what was freed last: MLX's buffer cache, and malloc for the others.
    """
    for size in sizes:
        filled = np.full(max(1, size // 4), np.nan, np.float32)
        if framework == "mlx":
            import mlx.core as mx

            mx.eval(mx.array(filled) * 1)
        del filled
