"""Where kernels count on a simdgroup's lanes running in lockstep, lanes are made to: at `if`s about the lane.

`if (lane == 0) { shared[0] = sum; }` behind what all lanes read of `shared`, or reading what all of them wrote, is
right on a GPU without a barrier. Metal promises nothing of the kind, and checked mode reports it as a race. Run one
after another, the first lane would be through before the second has read. So at such an `if` each lane lets the others
come as far (rt::keep_step), unless a seed permutes them: then the reliance shows.

This sees each `if` whose condition names [[thread_index_in_simdgroup]] and whose branches name threadgroup memory, by
the names that the function gives them. Lockstep elsewhere is not kept.
"""

from __future__ import annotations

from engine.metal.declarations import Function
from engine.metal.source import Source
from engine.metal.tokens import close_angle


def keep_step(source: Source) -> None:
    """Put a call into the parentheses of every such `if`."""
    lanes = _lanes(source)
    for function in source.scanner.found.functions:
        if function.body is None or not lanes:
            continue
        shared = _threadgroup_names(source, function)
        for at in range(*function.body):
            close = source.scanner.pairs.get(at + 1)
            if source.tokens[at].was != "if" or close is None or source.scanner.word(at + 1) != "(":
                continue
            condition = {token.was for token in source.tokens[at + 2 : close]}
            branches = {token.was for token in source.tokens[close + 1 : _branches_end(source, close)]}
            # A `;` means that a statement of its own stands there already.
            if condition & lanes and branches & shared and ";" not in condition:
                source.tokens[at + 1].text = "(::rt::keep_step(); "


def _lanes(source: Source) -> set[str]:
    """What any function calls the index of a lane."""
    return {
        source.tokens[first - 1].was
        for first, end in source.attributes.items()
        if any(token.was == "thread_index_in_simdgroup" for token in source.tokens[first:end])
    }


def _threadgroup_names(source: Source, function: Function) -> set[str]:
    """Parameters and variables declared with the word `threadgroup`: the memory itself, or pointers to it."""
    assert function.body is not None
    found = set()
    for at in range(function.open, function.body[1]):
        if source.tokens[at].was != "threadgroup":
            continue
        stop = at + 1
        while source.scanner.word(stop) not in (",", ";", ")", "=", "[", "{", "("):
            angle = source.scanner.word(stop) == "<"
            stop = (close_angle(source.tokens, source.scanner.pairs, stop, function.end) if angle else None) or stop + 1
        if source.tokens[stop - 1].kind == "name":  # else a cast
            found.add(source.tokens[stop - 1].was)
    return found


def _branches_end(source: Source, close: int) -> int:
    """Behind the statements that an `if` whose condition ends at `close` chooses from."""
    end = close
    while True:
        first = end + 1
        block = source.scanner.word(first) == "{" and first in source.scanner.pairs
        behind = source.scanner.pairs[first] + 1 if block else source.scanner.to_semicolon(first, len(source.tokens))
        if source.scanner.word(behind) != "else":
            return behind
        end = behind
