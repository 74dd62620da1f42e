"""What a caller binds to a kernel's buffers: bytes, arrays, scalars, as plain views of bytes.

Arrays are written in place, so they must be C-contiguous and writeable where the kernel can write; for what it only
reads, any array will do (a copy is made if need be). Bytes and scalars are inputs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.metal.errors import MetalError
from engine.metal.worker import CONTROL_BYTES, GAP_BYTES

Bytes = npt.NDArray[np.uint8]
# Metal wants buffers at 256 bytes' alignment at most (Metal feature set tables: constant offsets on macOS).
_ALIGNMENT = 256


@dataclass(frozen=True, kw_only=True)
class Argument:
    """`data`: the bytes to copy in. `target`: those to copy the result to; None for an input."""

    data: Bytes
    target: Bytes | None


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where an argument lies in the shared memory. `alias`: another index has the same array."""

    offset: int
    size: int
    alias: bool


def _flat(array: npt.NDArray[np.generic]) -> Bytes:
    return array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)


def argument(index: int, name: str, value: object, *, written: bool) -> Argument:
    """The bytes of one argument. Raises MetalError for what can't be bound, with the way out."""
    label = f"buffer({index}) {name!r}"
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise MetalError(f"{label}: an array of Python objects has no bytes to bind")
        if not written:
            return Argument(data=_flat(np.ascontiguousarray(value)), target=None)
        if not value.flags.c_contiguous:
            raise MetalError(
                f"{label} is written in place, so its array must be C-contiguous: pass np.ascontiguousarray(…)"
            )
        if not value.flags.writeable:
            raise MetalError(
                f"{label} is written in place, but its array is read-only: pass a copy, or bytes for an input"
            )
        flat = _flat(value)
        return Argument(data=flat, target=flat)
    if isinstance(value, np.generic):
        return Argument(data=np.frombuffer(value.tobytes(), np.uint8), target=None)
    if isinstance(value, (bytes, bytearray, memoryview, ctypes.Structure, ctypes.Array, ctypes._SimpleCData)):
        data = np.frombuffer(
            memoryview(value).cast("B") if isinstance(value, (bytes, bytearray)) else bytes(value), np.uint8
        )
        return Argument(data=data, target=data if isinstance(value, bytearray) and written else None)
    if isinstance(value, (bool, int, float)):
        raise MetalError(
            f"{label}: a Python number has no size; pass np.uint32({value}), np.float32({value}) or the like"
        )
    raise MetalError(
        f"{label}: {type(value).__name__} can't be bound; pass bytes, a NumPy array or scalar, or a ctypes value"
    )


def _bounds(data: Bytes) -> tuple[int, int]:
    start = data.__array_interface__["data"][0] if data.size else 0
    return start, start + data.size


def place(arguments: Mapping[int, Argument | None]) -> tuple[dict[int, Slot], int]:
    """Slots by index in order, with guard gaps, and the end of the last gap. None: unbound, no bytes.

    Two indices with one and the same array share a slot, as two bindings of one MTLBuffer do. Arrays that overlap
    otherwise, with one of them written, have no meaning here and are refused.
    """
    slots: dict[int, Slot] = {}
    cursor = CONTROL_BYTES + GAP_BYTES
    for index in sorted(arguments):
        given = arguments[index]
        size = given.data.size if given is not None else 0
        twin = _twin(index, given, arguments, slots)
        if twin is not None:
            slots[index] = Slot(offset=slots[twin].offset, size=size, alias=True)
            continue
        offset = -(-cursor // _ALIGNMENT) * _ALIGNMENT
        slots[index] = Slot(offset=offset, size=size, alias=False)
        cursor = offset + size + GAP_BYTES
    return slots, -(-cursor // 4096) * 4096


def _twin(
    index: int, given: Argument | None, arguments: Mapping[int, Argument | None], placed: Mapping[int, Slot]
) -> int | None:
    if given is None or not given.data.size:
        return None
    low, high = _bounds(given.data)
    for other in placed:
        known = arguments[other]
        if known is None or (known.target is None and given.target is None):
            continue
        start, stop = _bounds(known.data)
        if (low, high) == (start, stop):
            return other
        if low < stop and start < high:
            raise MetalError(
                f"buffer({index}) and buffer({other}) overlap in memory, and one of them is written: "
                "bind one array, or copies"
            )
    return None
