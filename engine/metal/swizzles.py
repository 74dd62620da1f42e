"""Swizzles as Metal's: `v.zyx` is a vec wherever it is read, `v.zw.x = 1` assigns to a component of v.

In the shim a swizzle is a member that lies over the vector's elements (msl/swizzle.h), so that it can be assigned. What
it is not is a vec, which templates deduce, `c ? a.xy : b.zw` joins and `auto` keeps: so every swizzle that is read gets
a call, `v.zyx()`, that gives one, and a swizzle of a swizzle that is assigned becomes one of the vector. Names that the
source declares as members of its own (`struct { float2 xy; }`) are left alone.
"""

from __future__ import annotations

import re

from engine.metal.source import Source

_WORD = re.compile(r"[xyzw]{2,4}|[rgba]{2,4}")
_PART = re.compile(r"[xyzw]{1,4}|[rgba]{1,4}")
_ASSIGNS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", "++", "--"}
_ORDER = "xyzw"


def swizzles(source: Source) -> None:
    """Change the tokens of every swizzle of two components or more, as said above."""
    scanner, own = source.scanner, _members(source)
    for at, token in enumerate(source.tokens):
        if token.kind != "name" or not token.text or not _WORD.fullmatch(token.was) or token.was in own:
            continue
        if scanner.word(at - 1) not in (".", "->") or scanner.word(at + 1) == "(":
            continue
        if _assigned(source, at):
            _merge(source, at, own)
        else:
            token.text += "()"


def _members(source: Source) -> set[str]:
    """Names in class bodies that could be swizzles and stand behind no dot."""
    found: set[str] = set()
    for at, token in enumerate(source.tokens):
        if token.was not in ("struct", "class", "union"):
            continue
        brace = at + 1
        while source.scanner.word(brace) not in ("{", ";", "(", ")", ",", "=", ">", ""):
            brace += 1
        if source.scanner.word(brace) != "{":
            continue
        for inside in range(brace, source.scanner.pairs.get(brace, brace)):
            word = source.tokens[inside].was
            if _WORD.fullmatch(word) and source.tokens[inside - 1].was not in (".", "->"):
                found.add(word)
    return found


def _assigned(source: Source, at: int) -> bool:
    """Whether the swizzle at `at`, or a part of it, is what an assignment, ++ or -- changes."""
    scanner, behind = source.scanner, at + 1
    begin = _begin(source, at)
    while True:
        word = scanner.word(behind)
        if word == "[" and behind in scanner.pairs:
            behind = scanner.pairs[behind] + 1
        elif word == "." and _PART.fullmatch(scanner.word(behind + 1)):
            behind += 2
        elif word == ")" and scanner.pairs.get(behind) == begin - 1 and source.tokens[begin - 2].kind != "name":
            begin, behind = begin - 1, behind + 1
        else:
            break
    shifts = word == ">" and scanner.word(behind + 1) == ">=" and not source.tokens[behind + 1].space  # >>=
    return word in _ASSIGNS or shifts or scanner.word(begin - 1) in ("++", "--")


def _begin(source: Source, at: int) -> int:
    """Where the expression `a.b(…)[…].xy` that ends at `at` begins."""
    scanner = source.scanner
    while scanner.word(at - 1) in (".", "->", "::"):
        at -= 2
        while scanner.word(at) in (")", "]") and at in scanner.pairs:
            opening = scanner.pairs[at]
            if scanner.word(at) == ")" and source.tokens[opening - 1].kind != "name":
                return opening
            at = opening - 1
    return at


def _merge(source: Source, at: int, own: set[str]) -> None:
    """`zw.x` becomes `z`: components are named by xyzw, whatever the source calls them."""
    scanner, token = source.scanner, source.tokens[at]
    while scanner.word(at + 1) == "." and _PART.fullmatch(part := scanner.word(at + 2)) and part not in own:
        letters = token.text.translate(str.maketrans("rgba", _ORDER))
        places = ["xyzw".find(letter) for letter in part.translate(str.maketrans("rgba", _ORDER))]
        if max(places) >= len(letters):
            raise source.fail(at + 2, f"`.{token.text}.{part}`: a vector of {len(letters)} has no `{part}`")
        token.text = "".join(letters[place] for place in places)
        source.tokens[at + 1].text = source.tokens[at + 2].text = ""
        at += 2
