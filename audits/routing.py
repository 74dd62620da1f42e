"""Which experts were chosen: is a choice right for the scores it was made from, and where do two runs part?

A *flip* is a (token, slot) whose expert one run has and the other has not. The margin is the gap between the expected
run's scores of the expert that it kept and of the one that came in instead. A flip is explained when that margin is no
larger than what the two runs' scores differ by there, plus their bounds: then the same rule, fed with the drifted
scores, flips.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One expert (or token) that replaced another: `old` in the expected run, `new` in the actual one."""

    probe: str
    token: int
    slot: int  # the slot that `old` had in the expected run
    old: int
    new: int
    margin: float  # expected score of old − expected score of new
    drift: float  # how far the two scores moved between the runs
    bound: float  # what the score's own arithmetic may add

    @property
    def explained(self) -> bool:
        """Whether the drifted scores account for the flip (NaN never does)."""
        return self.margin <= self.drift + self.bound


@dataclass(frozen=True, kw_only=True)
class WrongChoice:
    """A chosen id that its own scores don't allow: `missed` scored higher by `margin`, beyond `bound`."""

    token: int
    slot: int
    chosen: int
    missed: int
    margin: float
    bound: float


def wrong_choices(chosen: Array, scores: Array, bound: Array) -> list[WrongChoice]:
    """Every place in `chosen` [T,K] (or [T]) that `scores` [T,N], known to within `bound`, rule out.

    A chosen id must be in range, chosen once, and score no lower than every rejected one, up to the two scores' bounds:
    a tie within them may fall either way.
    """
    found: list[WrongChoice] = []
    for t, row in enumerate(chosen.reshape(len(chosen), -1).astype(np.int64)):
        if np.isfinite(scores[t]).all() and np.isfinite(bound[t]).all():
            found += _wrong_in_row(t, row.tolist(), scores[t], bound[t])
        else:
            found.append(WrongChoice(token=t, slot=0, chosen=int(row[0]), missed=-1, margin=float("nan"), bound=0.0))
    return found


def _wrong_in_row(token: int, row: list[int], scores: Array, bound: Array) -> list[WrongChoice]:
    """Who is among `row` but not among the best is paired, by rank, with who is among the best but not in `row`."""
    best = np.argsort(-scores, kind="stable")[: len(row)].tolist()
    missed = [expert for expert in best if expert not in row]
    invalid = [s for s, pick in enumerate(row) if not 0 <= pick < len(scores) or pick in row[:s]]
    found = [
        WrongChoice(token=token, slot=s, chosen=row[s], missed=missed.pop(0), margin=float("inf"), bound=0.0)
        for s in invalid
    ]
    intruders = [s for s, pick in enumerate(row) if s not in invalid and pick not in best]
    for s, expert in zip(sorted(intruders, key=lambda s: -scores[row[s]]), missed, strict=True):
        margin, allowed = float(scores[expert] - scores[row[s]]), float(bound[expert] + bound[row[s]])
        if not margin <= allowed:
            found.append(WrongChoice(token=token, slot=s, chosen=row[s], missed=expert, margin=margin, bound=allowed))
    return found


def slot_order(actual: Array, expected: Array) -> Array:
    """For ids [T,K] of two runs: [T,K] slots of `expected` in the order in which `actual` has the same experts.

    An expert that only one run chose takes a slot that is left over.
    """
    order = np.empty(actual.shape, dtype=np.int64)
    for t, (a_row, e_row) in enumerate(zip(actual.tolist(), expected.tolist(), strict=True)):
        places = {expert: slot for slot, expert in enumerate(e_row)}
        free = iter([slot for expert, slot in places.items() if expert not in a_row])
        order[t] = [places[expert] if expert in places else next(free, 0) for expert in a_row]
    return order


def flips(probe: str, actual: Array, expected: Array, scores: tuple[Array, Array], bound: Array) -> list[Flip]:
    """All flips between two runs' choices [T,K]; `scores` are (actual, expected) [T,N], `bound` [T,N] both runs'
    bounds.

    The order of slots doesn't matter; who left is paired with who came in by rank.
    """
    now, before = scores
    found: list[Flip] = []
    a_rows, e_rows = actual.reshape(len(actual), -1), expected.reshape(len(expected), -1)
    for t, (a_row, e_row) in enumerate(zip(a_rows, e_rows, strict=True)):
        left = [int(i) for i in e_row if i not in a_row]
        came = [int(i) for i in a_row if i not in e_row]
        for old, new in zip(left, came, strict=False):
            if not 0 <= new < before.shape[1]:
                margin = drift = allowed = float("nan")
            else:
                margin = float(before[t, old] - before[t, new])
                drift = float(abs(now[t, old] - before[t, old]) + abs(now[t, new] - before[t, new]))
                allowed = float(bound[t, old] + bound[t, new])
            slot = int(np.flatnonzero(e_row == old)[0])
            found.append(
                Flip(probe=probe, token=t, slot=slot, old=old, new=new, margin=margin, drift=drift, bound=allowed)
            )
    return found
