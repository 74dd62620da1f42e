"""What a caller binds to a kernel's buffers: bytes, arrays, scalars, as plain views of bytes.

Arrays are written in place, so they must be C-contiguous and writeable where the kernel can write; for what it only
reads, any array will do (a copy is made if need be). Bytes and scalars are inputs. An array's dtype must be the type
that the kernel declares, where it declares one: bytes (uint8), structs and untyped pointers are taken as they are.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt

from engine.metal.errors import MetalError
from engine.metal.worker import CONTROL_BYTES, GAP_BYTES, PAGE

Bytes = npt.NDArray[np.uint8]


class Element(NamedTuple):
    """The numbers in a buffer: `kind` f(loat), b(float), i(nteger) or r(aw), and bytes of each."""

    kind: str
    size: int


_BFLOAT = np.dtype(ml_dtypes.bfloat16)
_NAMES = {("f", 4): "float32", ("f", 2): "float16", ("b", 2): "bfloat16 (ml_dtypes.bfloat16, or its bits as uint16)"}
_NAMES |= {("i", size): f"int{8 * size} or uint{8 * size}" for size in (2, 4, 8)}


@dataclass(frozen=True, kw_only=True)
class Argument:
    """`data`: the bytes to copy in. `target`: those to copy the result to; None for an input. `copied`: where the
    array lies whose bytes `data` is a copy of, as its first and last address."""

    data: Bytes
    target: Bytes | None
    copied: tuple[int, int] | None = None


class Slot(NamedTuple):  # made anew for each launch: a dataclass costs four times as much
    """Where an argument lies in the shared memory. `owner`: the index whose piece it is in, itself or another."""

    offset: int
    size: int
    owner: int


class Piece(NamedTuple):
    """What an owner's memory spans: several arrays, if they overlap. `room`: guard gap behind it."""

    offset: int
    size: int
    room: int


def _flat(array: npt.NDArray[np.generic]) -> Bytes:
    return array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)


@functools.lru_cache(maxsize=256)
def _fits(dtype: np.dtype[np.generic], element: Element) -> bool:
    if dtype == np.uint8 or (dtype.kind == "V" and dtype != _BFLOAT) or element.kind == "r":
        return True
    if element.kind == "b":
        return dtype == _BFLOAT or dtype == np.uint16
    if element.kind == "i":
        return dtype.kind in "iu" and dtype.itemsize == element.size
    return dtype.kind in "fc" and dtype.itemsize == element.size * (2 if dtype.kind == "c" else 1)


def check_dtype(label: str, type_text: str, value: object, element: Element) -> None:
    """Raises MetalError for an array or scalar whose numbers aren't those that the kernel reads."""
    if isinstance(value, (np.ndarray, np.generic)):
        dtype = value.dtype
    elif isinstance(value, ctypes._SimpleCData):
        dtype = np.dtype(type(value))
    else:
        return
    if not _fits(dtype, element):
        wanted = _NAMES.get((element.kind, element.size), "numbers of another type")
        view = ".view(np.uint8)" if isinstance(value, np.ndarray) else ".tobytes()"
        raise MetalError(
            f"{label} is a {type_text}, which holds {wanted}; the array is {dtype}: convert it with .astype(…), "
            f"or pass its bytes as they are with {view}"
        )


def argument(index: int, name: str, value: object, *, written: bool) -> Argument:
    """The bytes of one argument. Raises MetalError for what can't be bound, with the way out."""
    label = f"buffer({index}) {name!r}"
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise MetalError(f"{label}: an array of Python objects has no bytes to bind")
        if not written and value.flags.c_contiguous:
            return Argument(data=_flat(value), target=None)
        if not written:
            copied = np.lib.array_utils.byte_bounds(value)
            return Argument(data=_flat(np.ascontiguousarray(value)), target=None, copied=copied)
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


def _bounds(given: Argument) -> tuple[int, int]:
    start = given.data.__array_interface__["data"][0]
    return given.copied or (start, start + given.data.size)


def place(
    arguments: Mapping[int, Argument | None], slack: Mapping[int, int] | None = None
) -> tuple[dict[int, Slot], dict[int, Piece], int]:
    """Slots by index, pieces by owner, and where the last gap ends. None: unbound, no bytes.

    Each argument has a piece of memory with guard gaps, but for arrays that share memory: one array at two indices (as
    two bindings of one MTLBuffer: kernels compare pointers, llama.cpp binds its softmax's input again where there is no
    mask), and arrays that overlap where one of them is written (one MTLBuffer at two offsets). Those lie in one piece,
    within whose bounds the kernel may go. Inputs that overlap have a copy each, with bounds of its own. `slack`: bytes
    that may be read behind an unbound one.
    """
    ends = {index: _bounds(given) for index, given in arguments.items() if given is not None and given.data.size}
    groups = _groups(arguments, ends)
    groups += [[index] for index in arguments if index not in ends]
    slots: dict[int, Slot] = {}
    pieces: dict[int, Piece] = {}
    cursor = CONTROL_BYTES
    for members in sorted(groups):
        owner = members[0]
        first, last = ends.get(owner, (0, 0))
        if (given := arguments[owner]) is not None and given.copied:
            last = first + given.data.size
        if len(members) > 1:
            # Faults name the array that begins first, and count from there.
            owner = min(members, key=lambda i: (ends[i], i))
            first, last = ends[owner][0], max(ends[i][1] for i in members)
        offset, size = cursor + GAP_BYTES, last - first
        for i in members:
            begin, end = ends.get(i, (0, 0)) if len(members) > 1 else (first, last)
            slots[i] = Slot(offset + begin - first, end - begin, owner)
        # Behind nothing there is no gap: not even the first byte is there.
        room = GAP_BYTES if size else (slack or {}).get(owner, 0)
        cursor = -(-(offset + size + room) // PAGE) * PAGE
        pieces[owner] = Piece(offset, size, cursor - offset - size)
    return slots, pieces, cursor


def _groups(arguments: Mapping[int, Argument | None], ends: Mapping[int, tuple[int, int]]) -> list[list[int]]:
    """Indices whose arrays share memory, together. Raises MetalError where one of them would have to be a copy."""
    groups: list[list[int]] = []
    chain: list[int] = []
    reach = 0
    for begin, end, index in sorted((*bounds, index) for index, bounds in ends.items()):
        if begin >= reach:
            if chain:
                groups += [chain] if len(chain) == 1 else _split(chain, arguments, ends)
            chain = []
        chain.append(index)
        reach = max(reach, end)
    if chain:
        groups += _split(chain, arguments, ends)
    return groups


def _split(
    chain: list[int], arguments: Mapping[int, Argument | None], ends: Mapping[int, tuple[int, int]]
) -> list[list[int]]:
    """Arrays that overlap one after another: together if one is written, else those that are the same array."""
    if len(chain) == 1:
        return [chain]
    chain = sorted(chain)
    given = {i: argument for i in chain if (argument := arguments[i]) is not None}
    written = [i for i in chain if given[i].target is not None]
    if not written:
        same: dict[object, list[int]] = {}
        for i in chain:
            same.setdefault(i if given[i].copied else ends[i], []).append(i)
        return list(same.values())
    for i in chain:
        if given[i].copied:
            raise MetalError(
                f"buffer({i}) is not contiguous and shares memory with buffer({written[0]}), which is written: "
                "pass np.ascontiguousarray(…) or a copy"
            )
    return [chain]
