"""Making a failing program smaller: fewer operations, then smaller ones, then a smaller cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Case = Mapping[str, Any]
ATTEMPTS = 120


def shrink(case: Case, fails: Callable[[Case], bool], attempts: int = ATTEMPTS) -> dict[str, Any]:
    """The smallest case found that still `fails`; a case that can't be run doesn't."""
    smallest, left, moved = dict(case), attempts, True
    while moved:
        moved = False
        for trial in _simpler(smallest):
            if left == 0:
                return smallest
            left -= 1
            if fails(trial):
                smallest, moved = trial, True
                break
    return smallest


def _simpler(case: Case) -> Iterator[dict[str, Any]]:
    program = case["program"]
    for size in dict.fromkeys((len(program) // 2, len(program) // 4, 1)):
        for start in range(len(program) - size, -1, -size) if size else ():
            yield {**case, "program": [*program[:start], *program[start + size :]]}
    for name in ("heads", "batch"):
        if case[name] > 1:
            yield {**case, name: 1}
    for i, op in enumerate(program):
        for smaller in _smaller(op):
            yield {**case, "program": [*program[:i], smaller, *program[i + 1 :]]}


def _smaller(op: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if op.get("window") is not None:
        yield {**op, "window": None}
    if op.get("array"):
        yield {**op, "array": False}
    n = op.get("n", 1)
    for fewer in dict.fromkeys((1, n // 2, n - 8, n - 1)):
        if 0 < fewer < n:
            yield {**op, "n": fewer}
    if len(op.get("chunks", ())) > 1:
        yield {**op, "chunks": [sum(op["chunks"])]}
