"""Function constants: the values that a caller gives, as C++ text, and whether a kernel reads one that has none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from engine.metal.errors import MetalError
from engine.metal.source import FunctionConstant, KernelDeclaration, Source, without_attributes

_FLOATS = {"float", "half", "bfloat", "bfloat16_t"}


def values_of(source: Source, given: Mapping[int | str, object]) -> dict[str, str]:
    """C++ text by constant's name. Raises MetalError for a constant that the source doesn't have."""
    by_index = {constant.index: name for name, constant in source.constants.items()}
    values = {}
    for key, value in given.items():
        name = by_index.get(int(key)) if isinstance(key, (int, np.integer)) else key
        if name is None or name not in source.constants:
            known = ", ".join(
                f"{c.index} {n}" for n, c in sorted(source.constants.items(), key=lambda item: item[1].index)
            )
            raise MetalError(f"the source has no function constant {key!r}; it has {known or 'none'}")
        values[name] = _text(source.constants[name].type_text, name, value)
    return values


def _text(type_text: str, name: str, value: object) -> str:
    if isinstance(value, np.ndarray) or (isinstance(value, Sequence) and not isinstance(value, str)):
        element = type_text.rstrip("234")
        return ", ".join(_text(element, name, part) for part in value)
    if isinstance(value, np.generic):
        value = value.item()
    if type_text == "bool":
        return "true" if value else "false"
    if isinstance(value, (int, float)) and type_text in _FLOATS:
        number = float(value)
        if math.isnan(number):
            return '__builtin_nanf("")'
        return f"{'-' if number < 0 else ''}__builtin_inff()" if math.isinf(number) else f"{number.hex()}f"
    if isinstance(value, (bool, int)):
        return str(int(value)) + ("ull" if int(value) > 2**31 - 1 else "ll" if int(value) < -(2**31) + 1 else "")
    raise MetalError(f"function constant {name!r} is a {type_text}: {value!r} is no value for it")


def _guarded(source: Source, first: int, end: int) -> set[str]:
    """Constants that a range of tokens asks about with is_function_constant_defined."""
    return {
        source.tokens[source.scanner.pairs[at + 1] - 1].was
        for at in range(first, end)
        if source.tokens[at].was == "is_function_constant_defined" and at + 1 in source.scanner.pairs
    }


def _dead(source: Source, values: Mapping[str, str]) -> list[tuple[int, int]]:
    """Token ranges of branches that a constant's value takes away: `if (c) {…}`, `if (!c) {…}` and their `else {…}`.

    A function constant without a value may be named there: the specialised function doesn't read it.
    """
    dead = []
    for at, token in enumerate(source.tokens):
        close = source.scanner.pairs.get(at + 1)
        if token.was != "if" or close is None or source.scanner.word(close + 1) != "{":
            continue
        negated = source.scanner.word(at + 2) == "!"
        name = source.scanner.word(close - 1)
        if close != at + 3 + negated or values.get(name) not in ("true", "false"):
            continue
        taken = source.scanner.pairs.get(close + 1, close + 1)
        if (values[name] == "true") == negated:
            dead.append((close + 1, taken))
        elif source.scanner.word(taken + 1) == "else" and taken + 2 in source.scanner.pairs:
            dead.append((taken + 2, source.scanner.pairs[taken + 2]))
    return dead


def _names(source: Source, first: int, end: int, dead: Sequence[tuple[int, int]]) -> set[str]:
    """The names in a range of tokens, those in dead branches left out."""
    within = [(low, high) for low, high in dead if first <= low and high <= end]
    return {
        source.tokens[at].was
        for at in range(first, end)
        if source.tokens[at].kind == "name" and not any(low < at < high for low, high in within)
    }


def _references(source: Source, values: Mapping[str, str]) -> dict[str, tuple[set[str], set[str]]]:
    """For each function and variable at namespace scope: the names in it, and the constants that it guards.

    A constant that keeps the answer (`constant bool use = is_function_constant_defined(n)`) guards where it is used.
    """
    found: dict[str, tuple[set[str], set[str]]] = {}
    declared = source.scanner.found
    dead = _dead(source, values)
    spans = [(f.name, f.first, f.end) for f in declared.functions]
    answers: dict[str, set[str]] = {}
    for span in declared.variables:
        head = without_attributes(source, span.first, span.end - 1)
        names = [t.was for t in head]
        stop = names.index("=") if "=" in names else len(names)
        stop = min([stop, *(i for i, n in enumerate(names) if n in ("[", "{"))])
        if stop and head[stop - 1].kind == "name" and head[stop - 1].was not in source.constants:
            spans.append((head[stop - 1].was, span.first, span.end))
            answers[head[stop - 1].was] = _guarded(source, span.first, span.end)
    for name, first, end in spans:
        names_in, guarded = found.setdefault(name, (set(), set()))
        names_in |= _names(source, first, end, dead)
        guarded |= _guarded(source, first, end).union(*(answers.get(used, set()) for used in names_in - {name}))
    return found


def require(source: Source, kernel: KernelDeclaration, values: Mapping[str, str]) -> None:
    """Metal refuses a pipeline whose function reads a constant without a value; so does the host.

    A read counts unless the same function or variable asks is_function_constant_defined about that constant, itself or
    through a constant that keeps the answer, and unless it lies in a branch that another constant's value takes away
    (llama.cpp leaves out what only such branches read).
    """
    missing: dict[str, FunctionConstant] = {n: c for n, c in source.constants.items() if n not in values}
    if not missing:
        return
    references = _references(source, values)
    pending = [kernel.function.name]
    if kernel.entry:
        pending += [token.was for token in source.tokens[slice(*kernel.entry)]]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        names, guarded = references.get(name, (set(), set()))
        for read in names & missing.keys() - guarded:
            constant = missing[read]
            raise MetalError(
                f"{kernel.host_name} reads the function constant {read!r} (index {constant.index}) without a value: "
                f"pass constants={{{constant.index}: …}} to compile()"
            )
        pending.extend(names - seen)
