"""What a thread writes outside an array of its own reaches nothing, as on a GPU, which has no stack to go down.

`for (int i = n; i < 8; i++) x[i] = 0` with a negative n (MLX's layer_norm, in threads past the row's end) would change
whatever lies below x here. Guarded are subscripts by the variable of a `for` that doesn't start at a number, and no
others: with a guard at each, tiles of a matmul would stay in memory.
"""

from __future__ import annotations

from engine.metal.source import Source

_NOT_OWN = {"threadgroup", "constant", "static", "device", "extern", "*", "&"}
_NO_TYPE = {"return", "case", "goto", "else", "do"}


def own_arrays(source: Source) -> None:
    """Turn `x[i]`, as said above, into a call of the runtime's `element`."""
    for function in source.scanner.found.functions:
        if function.body is None:
            continue
        arrays = _declared(source, *function.body)
        for at in range(*function.body) if arrays else ():
            variable = _variable(source, at)
            if variable:
                _guard(source, _block(source, source.scanner.pairs[at + 1] + 1), arrays, variable)


def _declared(source: Source, first: int, end: int) -> set[str]:
    """Names of the arrays in thread memory that a body declares."""
    found = set()
    for at in range(first + 2, end - 1):
        before, token = source.tokens[at - 1], source.tokens[at]
        typed = before.was == ">" or (before.kind == "name" and before.was not in _NO_TYPE)
        if token.kind != "name" or not typed or source.scanner.word(at + 1) != "[":
            continue
        begin = at
        while begin > first and source.tokens[begin - 1].was not in (";", "{", "}"):
            begin -= 1
        if not _NOT_OWN & {token.was for token in source.tokens[begin:at]}:
            found.add(token.was)
    return found


def _variable(source: Source, at: int) -> str | None:
    """The variable of the `for` at `at` whose start is no number."""
    if source.tokens[at].was != "for" or at + 1 not in source.scanner.pairs:
        return None
    init = source.tokens[at + 2 : source.scanner.pairs[at + 1]]
    words = [token.was for token in init]
    if ";" not in words or "=" not in words[: words.index(";")]:
        return None
    equals, end = words.index("="), words.index(";")
    if end == equals + 2 and init[equals + 1].kind == "number":
        return None
    return words[equals - 1]


def _block(source: Source, first: int) -> range:
    """The tokens of the statement or block that begins at `first`."""
    at, pairs = first, source.scanner.pairs
    while at < len(source.tokens) and source.scanner.word(at) != ";":
        if source.scanner.word(at) == "{":
            return range(first, pairs.get(at, at))
        at = pairs[at] + 1 if source.scanner.word(at) in ("(", "[") and at in pairs else at + 1
    return range(first, at)


def _guard(source: Source, block: range, arrays: set[str], variable: str) -> None:
    for at in block:
        token = source.tokens[at]
        member = source.scanner.word(at - 1) in (".", "->", "::")
        subscript = [source.scanner.word(at + n) for n in (1, 2, 3)] == ["[", variable, "]"]
        if token.was in arrays and token.text == token.was and subscript and not member:
            token.text = f"::rt::element({token.was}"
            source.tokens[at + 1].text = ","
            source.tokens[at + 3].text = ")"
