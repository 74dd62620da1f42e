"""Tokens of preprocessed Metal source, with the file and line of each.

White space, line markers and pragmas belong to the token behind them, so that a rewritten token list still prints with
every line where it was: the C++ compiler's messages and line tables then speak of the user's own file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""
    (?P<space>(?:[ \t\r\f\v\n]+|\\\n)+)
  | (?P<directive>\#[^\n]*)
  | (?P<string>(?:u8|[uUL])?"(?:[^"\\\n]|\\.)*")
  | (?P<char>'(?:[^'\\\n]|\\.)+')
  | (?P<number>\.?[0-9](?:[eEpP][+-]|'[0-9a-zA-Z_]|[0-9a-zA-Z_.])*)
  | (?P<name>[A-Za-z_$][A-Za-z0-9_$]*)
  | (?P<punct>::|\.\.\.|->\*?|<<=|<=>|<<|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_MARKER = re.compile(r'#\s*(?:line\s+)?(\d+)(?:\s+"((?:[^"\\]|\\.)*)")?')


@dataclass(slots=True)
class Token:
    """`text` is what will be printed (rewriting changes it), `was` what the source says; `space` precedes it."""

    kind: str
    text: str
    was: str
    space: str
    file: str
    line: int

    def __repr__(self) -> str:
        return f"{self.was}@{self.line}"


def tokenise(text: str) -> tuple[list[Token], str]:
    """The tokens of preprocessed text, and the white space behind the last one.

    `>>` stays two tokens, so that nested template arguments close one by one.
    """
    tokens: list[Token] = []
    space, file, line = "", "", 1
    for found in _TOKEN.finditer(text):
        kind, word = found.lastgroup or "punct", found.group()
        if kind == "space":
            space += word
            line += word.count("\n")
        elif kind == "directive":
            marker = _MARKER.match(word)
            if marker:
                # The marker's own line end is counted when the white space behind it is read.
                line = int(marker[1]) - 1
                file = marker[2] if marker[2] is not None else file
                space += word
        else:
            tokens.append(Token(kind, word, word, space, file, line))
            space = ""
    return tokens, space


def render(tokens: Iterable[Token], tail: str) -> str:
    """The text of rewritten tokens."""
    return "".join(token.space + token.text for token in tokens) + tail


def words(tokens: Iterable[Token]) -> str:
    """The source text of tokens on one line, for names and messages."""
    joined = " ".join(token.was for token in tokens)
    return re.sub(r"\s*(::|[<>,()\[\]])\s*", lambda match: match[1] + (" " if match[1] == "," else ""), joined).strip()


def matching(tokens: list[Token]) -> dict[int, int]:
    """For each opening bracket's index, its closing one's, and back. Unbalanced brackets have no entry."""
    pairs: dict[int, int] = {}
    closes = {")": "(", "]": "[", "}": "{"}
    open_: list[int] = []
    for index, token in enumerate(tokens):
        if token.kind != "punct":
            continue
        if token.was in "([{":
            open_.append(index)
        elif token.was in closes and open_ and tokens[open_[-1]].was == closes[token.was]:
            pairs[index] = open_.pop()
            pairs[pairs[index]] = index
    return pairs


def close_angle(tokens: list[Token], pairs: dict[int, int], start: int, end: int) -> int | None:
    """The index of the `>` that closes the `<` at `start`, or None where it is a comparison."""
    depth, index = 0, start
    while index < end:
        word = tokens[index].was if tokens[index].kind == "punct" else ""
        if word in ("(", "[", "{") and index in pairs:
            index = pairs[index]
        elif word == "<":
            depth += 1
        elif word == ">":
            depth -= 1
            if depth == 0:
                return index
        elif word in (";", ")", "]", "}"):
            return None
        index += 1
    return None
