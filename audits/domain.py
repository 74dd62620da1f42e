"""The input domain of a contract: named fields, each a range or a choice whose simplest value comes first.

One description serves three ends: Hypothesis draws from it, the boundary corpus fills what it leaves out from it, and
a failing case is made smaller along it. A case is a plain dict of JSON values, so that it can be stored and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

Case = Mapping[str, Any]

# Hypothesis also draws numbers above 100 that it finds in the source of whatever modules are loaded, so that one seed
# would give other cases beside other modules. No source has numbers out here.
FAR = 2**100


@dataclass(frozen=True)
class Choice:
    """One of `values`, the simplest first."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return "one of " + ", ".join(map(repr, self.values))

    @property
    def simplest(self) -> Any:
        return self.values[0]

    @property
    def strategy(self) -> st.SearchStrategy[Any]:
        return st.sampled_from(self.values)

    def takes(self, value: Any) -> bool:
        """Whether a case may have this value: one of `values`, or another number where there are such numbers."""
        alike = [x for x in self.values if type(x) is type(value)]
        if not alike or type(value) not in (int, float):
            return value in alike
        return isfinite(value) if type(value) is float else value >= min(0, *alike)

    def simpler(self, value: Any) -> Iterator[Any]:
        """Values to try instead of `value`, the simplest first."""
        yield from self.values[: self.values.index(value)] if value in self.values else self.values


@dataclass(frozen=True)
class Range:
    """An integer from `low` to `high`, both included; smaller is simpler."""

    low: int
    high: int

    def __str__(self) -> str:
        return f"an integer from {self.low} to {self.high}, or beyond"

    @property
    def simplest(self) -> int:
        return self.low

    @property
    def strategy(self) -> st.SearchStrategy[int]:
        return st.integers(FAR + self.low, FAR + self.high).map(lambda far: far - FAR)

    def takes(self, value: Any) -> bool:
        """Whether a case may have this value: the corpus goes beyond the range, though not below 1 for that."""
        return type(value) is int and value >= min(self.low, 1)

    def simpler(self, value: int) -> Iterator[int]:
        """The lowest value, then ever closer ones to `value`."""
        gap = value - self.low
        while gap > 0:
            yield value - gap
            gap //= 2


Field = Choice | Range


def filled(fields: Mapping[str, Field], case: Case) -> dict[str, Any]:
    """`case` with the simplest value of every field that it leaves out, in the order of the fields.

    ValueError for a field that there isn't, and for a value that it can't have.
    """
    if unknown := case.keys() - fields.keys():
        raise ValueError(f"a case has no field {sorted(unknown)[0]!r}; the fields are {', '.join(fields)}")
    for name, value in case.items():
        if not fields[name].takes(value):
            raise ValueError(f"{name} can't be {value!r}; it is {fields[name]}")
    return {name: case.get(name, field.simplest) for name, field in fields.items()}


def strategy(fields: Mapping[str, Field], valid: Callable[[Case], bool]) -> st.SearchStrategy[dict[str, Any]]:
    """Cases over all fields that are valid together."""
    return st.fixed_dictionaries({name: field.strategy for name, field in fields.items()}).filter(valid)


def draw(cases: st.SearchStrategy[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` cases or fewer, before any is judged, so that Hypothesis sees no failure and shrinks nothing."""
    found: list[dict[str, Any]] = []

    @seeded(seed)
    @settings(
        max_examples=max(count, 1),
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def collect(case: dict[str, Any]) -> None:
        found.append(case)

    if count:
        collect()
    return found


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


def turn(i: int, count: int, seed: int) -> int:
    """Which of `count` things has its turn at place i: the sum of i's digits in base `count`, which has no period.

    A corpus takes its other options in turn too; i % count would always pair the same dtype with the same option.
    """
    total = seed
    while i and count > 1:
        i, digit = divmod(i, count)
        total += digit
    return total % count
