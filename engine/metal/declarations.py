"""Where the declarations of a Metal source are: functions with their parameters and bodies, variables, instantiations.

A scan at the level of brackets, not a C++ parser: it finds what the rewriter must change (kernels, address spaces,
threadgroup storage) and leaves the meaning of everything else to the compiler. Attributes are recognised by their
double brackets wherever they stand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.metal.tokens import Token, close_angle, matching

_CLASS_KEYS = {"class", "struct", "union", "enum"}
_NOT_DECLARATORS = {"decltype", "alignas", "__attribute__", "noexcept", "sizeof", "static_assert", "requires", "if"}


@dataclass(kw_only=True)
class Function:
    """Token indices of one function: `start` behind its template headers, `open`/`close` its parameter list's parens,
    `body` its braces (None: only declared)."""

    name: str
    scope: tuple[str, ...]
    first: int
    start: int
    name_at: int
    open: int
    close: int
    end: int
    body: tuple[int, int] | None
    member: bool


@dataclass(kw_only=True)
class Span:
    """Tokens `first` up to and without `end`: a variable, or an explicit instantiation."""

    first: int
    end: int
    scope: tuple[str, ...]
    member: bool = False


@dataclass(kw_only=True)
class Class:
    """A class with a body: tokens `key` (struct, class, union) up to `brace` name it."""

    first: int
    key: int
    brace: int
    scope: tuple[str, ...]
    end: int = 0


@dataclass
class Declarations:
    functions: list[Function] = field(default_factory=list)
    classes: list[Class] = field(default_factory=list)
    variables: list[Span] = field(default_factory=list)
    instantiations: list[Span] = field(default_factory=list)


class Scanner:
    """Fills `found` from a token list; `pairs` are its brackets."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.pairs = matching(tokens)
        self.found = Declarations()
        self.scan(0, len(tokens), (), member=False)

    def word(self, index: int) -> str:
        return self.tokens[index].was if index < len(self.tokens) else ""

    def is_attribute(self, index: int) -> bool:
        """Whether `[[` starts here: no subscript can begin with a bracket."""
        return self.word(index) == "[" and self.word(index + 1) == "[" and index in self.pairs

    def scan(self, index: int, end: int, scope: tuple[str, ...], *, member: bool) -> None:
        while index < end:
            if self.word(index) == ";":
                index += 1
            elif member and self.word(index) in ("public", "private", "protected"):
                index += 2
            else:
                index = self.declaration(index, end, scope, member=member)

    def to_semicolon(self, index: int, end: int) -> int:
        while index < end and self.word(index) != ";":
            index = self.pairs[index] + 1 if self.word(index) in ("(", "[", "{") and index in self.pairs else index + 1
        return min(index + 1, end)

    def skip_templates(self, index: int, end: int) -> int:
        while self.word(index) == "template" and self.word(index + 1) == "<":
            close = close_angle(self.tokens, self.pairs, index + 1, end)
            if close is None:
                break
            index = close + 1
        return index

    def namespace(self, index: int, end: int, scope: tuple[str, ...]) -> int:
        at, names = index, scope
        while at < end and self.word(at) not in ("{", ";", "="):
            if self.tokens[at].kind == "name" and self.word(at) not in ("namespace", "inline", "extern"):
                names = (*names, self.word(at))
            at += 1
        if self.word(at) != "{" or at not in self.pairs:
            return self.to_semicolon(at, end)
        self.scan(at + 1, self.pairs[at], names, member=False)
        return self.pairs[at] + 1

    def declaration(self, first: int, end: int, scope: tuple[str, ...], *, member: bool) -> int:
        start = self.skip_templates(first, end)
        word, follows = self.word(start), self.word(start + 1)
        if start == first and word == "template":
            stop = self.to_semicolon(start, end)
            self.found.instantiations.append(Span(first=first, end=stop, scope=scope))
            return stop
        if word == "namespace" or (word == "inline" and follows == "namespace"):
            return self.namespace(start, end, scope)
        if word == "extern" and self.tokens[start + 1].kind == "string" and self.word(start + 2) == "{":
            return self.namespace(start, end, scope)
        if word in ("using", "typedef", "static_assert", "friend"):
            return self.to_semicolon(start, end)
        return self.general(first, start, end, scope, member=member)

    def general(self, first: int, start: int, end: int, scope: tuple[str, ...], *, member: bool) -> int:
        """A class, function or variable. Returns the index behind it."""
        at, class_key, assigned, initialisers = start, -1, False, False
        parens: tuple[int, int] | None = None
        name_at = start
        found: Class | None = None
        while at < end:
            word = self.word(at)
            if word == ";":
                at += 1
                break
            if word == "operator" and parens is None and not assigned:
                name_at = at
                at += 1
                if self.word(at) == "(" and self.word(at + 1) == ")":
                    at += 2
                while at < end and self.word(at) != "(":
                    at += 1
                if at in self.pairs:
                    parens = (at, self.pairs[at])
                    at = parens[1] + 1
                continue
            if word == "(" and at in self.pairs:
                before = self.word(at - 1)
                if parens is None and not assigned and before not in _NOT_DECLARATORS and at > start:
                    parens, name_at = (at, self.pairs[at]), self.name_before(at)
                at = self.pairs[at] + 1
                continue
            if word == "[" and at in self.pairs:
                at = self.pairs[at] + 1
                continue
            if word == "<" and self.tokens[at - 1].kind == "name":
                close = close_angle(self.tokens, self.pairs, at, end)
                at = close + 1 if close is not None else at + 1
                continue
            if word == "{" and at in self.pairs:
                stop = self.pairs[at] + 1
                if class_key >= 0 and parens is None and not assigned:
                    if self.word(class_key) != "enum":
                        found = Class(first=first, key=class_key, brace=at, scope=scope)
                        self.found.classes.append(found)
                        self.scan(at + 1, self.pairs[at], (*scope, self.class_name(class_key, at)), member=True)
                elif parens is not None and not assigned and not (initialisers and self.is_initialiser(at)):
                    self.add_function(first, start, name_at, parens, stop, at, scope, member=member)
                    return stop
                at = stop
                continue
            if word == ":" and parens is not None:
                initialisers = True
            if word in _CLASS_KEYS and class_key < 0 and parens is None:
                class_key = at
            if word == "=" and not (parens is not None and self.word(at + 1) in ("default", "delete", "0")):
                assigned = True
            at += 1
        if found is not None:
            found.end = at
        if parens is not None and not assigned:
            self.add_function(first, start, name_at, parens, at, None, scope, member=member)
        elif class_key < 0:
            self.found.variables.append(Span(first=start, end=at, scope=scope, member=member))
        return at

    def is_initialiser(self, brace: int) -> bool:
        """Whether a brace behind a constructor's colon initialises a member or base: `x{1}`, `base<T>{1}`."""
        return self.tokens[brace - 1].kind == "name" or self.word(brace - 1) == ">"

    def class_name(self, key: int, brace: int) -> str:
        text = []
        for index in range(key + 1, brace):
            if self.word(index) == ":" or self.word(index) == "final":
                break
            text.append(self.word(index))
        return "".join(text) or f"unnamed{key}"

    def name_before(self, paren: int) -> int:
        """The index of the function's name: before the parenthesis, or before the template arguments there."""
        at = paren - 1
        if self.word(at) == ">":
            depth = 0
            while at > 0:
                if self.word(at) == ")" and at in self.pairs:
                    at = self.pairs[at]
                depth += {">": 1, "<": -1}.get(self.word(at), 0)
                at -= 1
                if depth == 0:
                    break
        while self.word(at) == "]" and at in self.pairs:
            at = self.pairs[at] - 1
        return at

    def add_function(
        self, first: int, start: int, name_at: int, parens: tuple[int, int], end: int, brace: int | None,
        scope: tuple[str, ...], *, member: bool,
    ) -> None:  # fmt: skip
        body = (brace, self.pairs[brace]) if brace is not None else None
        name = self.word(name_at)
        if name == "operator":
            name = "".join(self.word(at) for at in range(name_at, parens[0]))
        self.found.functions.append(
            Function(
                name=name, scope=scope, first=first, start=start, name_at=name_at, open=parens[0], close=parens[1],
                end=end, body=body, member=member,
            )
        )  # fmt: skip
