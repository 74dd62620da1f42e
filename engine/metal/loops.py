"""Where lanes of a simdgroup part in a loop, they meet again as on a GPU: at the end of each turn, and behind the loop.

Lanes meet at the call sites of simd functions, and of several sites the lowest address goes first (host/scheduler.cpp).
That isn't enough in a loop: a lane that skips `if (c) { m = simd_max(x); }` comes to the next turn's sites first, and
compilers move whole loops behind what follows them. So a loop with simd functions in it, or with calls of the source's
own functions that have some, is known to the runtime while a thread is in it (rt::Loop); and it counts its turns
unless every lane comes to all of its sites in every turn. Such functions are always inlined, since one site that lanes
reach through two calls would be one place.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from engine.metal.source import Source, is_kernel

_EXCHANGE = re.compile(r"(?:simd|quad)_\w+|simdgroup_barrier")
_LOOPS = {"for", "while", "do"}
_CHOICE = {"if", "else", "switch", "?", "&&", "||", "continue"} | _LOOPS


def know_loops(source: Source) -> None:
    """Put an rt::Loop around every such loop, and inline every such function."""
    own = _own(source)
    for function in source.scanner.found.functions:
        if function.body is None:
            continue
        words = {token.was for token in source.tokens[function.start : function.body[0]]}
        if _sites(source, *function.body, own) and not is_kernel(source, function) and "noinline" not in words:
            head = source.tokens[function.start]
            head.text = "__attribute__((always_inline)) " + head.text
        for at in reversed(range(*function.body)):
            if source.tokens[at].was in _LOOPS and source.tokens[at].kind == "name":
                _know(source, at, own)


def _own(source: Source) -> dict[str, bool]:
    """The source's own functions whose bodies come to a simd function, and whether some lanes may pass it by."""
    bodies = [(function.name, function.body) for function in source.scanner.found.functions if function.body]
    found: dict[str, bool] = {}
    while True:
        new: dict[str, bool] = {}
        for name, body in bodies:
            if sites := _sites(source, *body, found):
                new[name] = new.get(name, False) or _chooses(source, body[0], sites, found)
        if new == found:
            return found
        found = new


def _sites(source: Source, first: int, end: int, own: Mapping[str, bool]) -> list[int]:
    """Where the tokens call a simd function, or one that comes to one."""
    return [
        at
        for at in range(first, end)
        if source.tokens[at].kind == "name"
        and source.scanner.word(at + 1) in ("(", "<")
        and (source.tokens[at].was in own or _EXCHANGE.fullmatch(source.tokens[at].was))
    ]


def _know(source: Source, at: int, own: Mapping[str, bool]) -> None:
    tokens, scanner = source.tokens, source.scanner
    header = scanner.pairs.get(at + 1) if tokens[at].was != "do" else at
    if header is None or scanner.word(header + 1) == ";":  # also the end of do … while
        return
    first, end, behind = header + 1, _statement_end(source, header + 1), _statement_end(source, at)
    sites = _sites(source, at + 1, behind, own)
    if not sites:
        return
    counts = _chooses(source, at + 1, sites, own)
    name = f"rt_loop_{at}"
    tokens[at].text = f"{{ ::rt::Loop {name}({'true' if counts else 'false'}); {tokens[at].text}"
    tokens[behind - 1].text += " }"
    if counts:
        tokens[first].text = f"{{ {name}.turn++; {tokens[first].text}"
        tokens[end - 1].text += " }"


def _chooses(source: Source, first: int, sites: Sequence[int], own: Mapping[str, bool]) -> bool:
    """Whether what is done up to the last site depends on anything, but for loops from a number to a number."""
    return any(own.get(source.tokens[at].was, False) for at in sites) or any(
        source.tokens[at].was in _CHOICE and not _numbered(source, at) for at in range(first, sites[-1])
    )


def _numbered(source: Source, at: int) -> bool:
    """Whether a loop is `for (type i = 16; i > 0; i /= 2)`: its header names a type, a variable and numbers."""
    close = source.scanner.pairs.get(at + 1)
    if source.tokens[at].was != "for" or close is None:
        return False
    return len({token.was for token in source.tokens[at + 2 : close] if token.kind == "name"}) <= 2


def _statement_end(source: Source, at: int) -> int:
    """Behind the statement that begins at `at`."""
    scanner = source.scanner
    word = scanner.word(at)
    if word == "{" and at in scanner.pairs:
        return scanner.pairs[at] + 1
    if word in ("if", "for", "while", "switch"):
        paren = at + 1 if scanner.word(at + 1) == "(" else at + 2  # if constexpr (
        end = _statement_end(source, scanner.pairs.get(paren, paren) + 1)
        return _statement_end(source, end + 1) if word == "if" and scanner.word(end) == "else" else end
    if word == "do":
        return scanner.to_semicolon(_statement_end(source, at + 1), len(source.tokens))
    return scanner.to_semicolon(at, len(source.tokens))
