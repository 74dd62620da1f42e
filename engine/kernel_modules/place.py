"""Where the engine's own kernels run, and how a module of the decoder gets its arrays there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from engine.metal.kernels import apple, host, ops
from engine.probes import to_numpy

# Called with the probe that a launch is for and the kernel's name, by what launches it.
Note = Callable[[str, str], None]


@dataclass(frozen=True, kw_only=True)
class Place:
    """How kernels are launched, how MLX's arrays come in and go out, and what holds weights that only kernels read."""

    launch: Callable[..., list[Any]]
    enter: Callable[[mx.array], Any]
    leave: Callable[[Any], mx.array]
    hold: Callable[[np.ndarray[Any, Any]], Any]

    def run(self, note: Note, probe: str) -> ops.Run:
        """What an op of ops.py launches its kernels with, each noted as one that computes `probe`."""
        return partial(self.launch, note=partial(note, probe))


def scoped_note(note: Note, prefix: str) -> Note:
    """`note` with `prefix.` before every probe."""
    return lambda probe, kernel: note(f"{prefix}.{probe}", kernel)


def _same(x: Any) -> Any:
    return x


# By the names that `engine.load` takes. On the host arrays leave MLX and come back; on an Apple GPU they stay.
PLACES: Mapping[str, Place] = {
    "host": Place(launch=host.run, enter=to_numpy, leave=mx.array, hold=_same),
    "metal": Place(launch=apple.run, enter=_same, leave=_same, hold=mx.array),
}
