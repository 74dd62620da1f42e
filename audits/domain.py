"""The input domain of a contract: named fields, each a range or a choice whose simplest value comes first.

One description serves three ends: Hypothesis draws from it, the boundary corpus fills what it leaves out from it, and
a failing case is made smaller along it. A case is a plain dict of JSON values, so that it can be stored and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

Case = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """One of `values`, the simplest first."""

    values: tuple[Any, ...]

    @property
    def simplest(self) -> Any:
        return self.values[0]

    @property
    def strategy(self) -> st.SearchStrategy[Any]:
        return st.sampled_from(self.values)

    def simpler(self, value: Any) -> Iterator[Any]:
        """Values to try instead of `value`, the simplest first."""
        yield from self.values[: self.values.index(value)] if value in self.values else self.values


@dataclass(frozen=True)
class Range:
    """An integer from `low` to `high`, both included; smaller is simpler."""

    low: int
    high: int

    @property
    def simplest(self) -> int:
        return self.low

    @property
    def strategy(self) -> st.SearchStrategy[int]:
        return st.integers(self.low, self.high)

    def simpler(self, value: int) -> Iterator[int]:
        """The lowest value, then ever closer ones to `value`."""
        gap = value - self.low
        while gap > 0:
            yield value - gap
            gap //= 2


Field = Choice | Range


def filled(fields: Mapping[str, Field], case: Case) -> dict[str, Any]:
    """`case` with the simplest value of every field that it leaves out, in the order of the fields.

    ValueError for a field that there isn't.
    """
    if unknown := case.keys() - fields.keys():
        raise ValueError(f"a case has no field {sorted(unknown)[0]!r}; the fields are {', '.join(fields)}")
    return {name: case.get(name, field.simplest) for name, field in fields.items()}


def strategy(fields: Mapping[str, Field], valid: Callable[[Case], bool]) -> st.SearchStrategy[dict[str, Any]]:
    """Cases over all fields that are valid together."""
    return st.fixed_dictionaries({name: field.strategy for name, field in fields.items()}).filter(valid)


def shrink(
    fields: Mapping[str, Field],
    case: Case,
    fails: Callable[[Case], bool],
    valid: Callable[[Case], bool],
    attempts: int = 150,
) -> dict[str, Any]:
    """The smallest case found that is valid and still `fails`, one field made simpler at a time until none can be."""
    smallest, left, moved = dict(case), attempts, True
    while moved:
        moved = False
        for name, field in fields.items():
            for value in field.simpler(smallest[name]):
                trial = {**smallest, name: value}
                if not valid(trial):
                    continue
                if left == 0:
                    return smallest
                left -= 1
                if fails(trial):
                    smallest, moved = trial, True
                    break
    return smallest


def residues(modulus: int, count: int, seed: int, *, start: int = 1) -> list[list[int]]:
    """`count` permutations of start … start + modulus − 1, independent of each other.

    Taken side by side they give each of several lengths every residue modulo `modulus`, and so modulo each of its
    divisors, in `modulus` cases, and vary their differences and sums too.
    """
    rng = np.random.default_rng([seed, modulus])
    return [[start + int(i) for i in rng.permutation(modulus)] for _ in range(count)]
