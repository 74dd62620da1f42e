"""What is asked for again and again, and is the same for every candidate: a case's operands, and what is due for them.

A sweep comes back to a case's operands for every relation, layout and dtype that it tries, and a process that audits
many candidates comes back to all of them. NumPy arrays that are kept are read-only: candidates get copies, and who
writes into one of ours by mistake hears of it. Whatever is kept is dropped again, the longest unused first, when there
is no more room.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
ROOM = 256 << 20  # bytes, in each process; a quick sweep of attention keeps 120 MB, of any other contract less
LARGEST = 2 << 20  # one larger result would push out many, each of which takes as long to make again
ENTRY = 1 << 10  # what a result takes besides its arrays, about


class Kept:
    """Results by key, up to `room` bytes of them and none of more than `largest`."""

    def __init__(self, room: int = ROOM, largest: int = LARGEST) -> None:
        self.room, self.largest, self.held = room, largest, 0
        self.results: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def once(self, key: Hashable, work: Callable[[], T]) -> T:
        """The result of `work`, which must depend on `key` alone: kept from the last time, if it still is."""
        if key in self.results:
            self.results.move_to_end(key)
            return self.results[key][0]  # type: ignore[no-any-return]  # it is what this key's `work` gave
        made = work()
        arrays = list(_arrays(made))
        # What is read-only is kept with another result, as a call's operands are with the call.
        size = ENTRY + sum(x.nbytes for x in arrays if not _read_only(x))
        if size > self.largest:
            return made
        for x in arrays:
            if isinstance(x, np.ndarray):
                x.flags.writeable = False
        self.results[key] = made, size
        self.held += size
        while self.held > self.room:
            _, (_, size) = self.results.popitem(last=False)
            self.held -= size
        return made


def _read_only(x: Any) -> bool:
    return isinstance(x, np.ndarray) and not x.flags.writeable


def _arrays(tree: Any) -> Iterator[Any]:
    """Every array and tensor in tuples, lists, mappings and dataclasses."""
    if isinstance(tree, np.ndarray | torch.Tensor):
        yield tree
    elif isinstance(tree, tuple | list):
        for part in tree:
            yield from _arrays(part)
    elif isinstance(tree, Mapping):
        yield from _arrays(list(tree.values()))
    elif is_dataclass(tree):
        yield from _arrays([getattr(tree, field.name) for field in fields(tree)])


KEPT = Kept()
once = KEPT.once
