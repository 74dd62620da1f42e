"""What a preprocessed Metal source offers: its kernels under their host names, and its function constants.

A kernel is a plain function, or a template with explicit instantiations; its parameters are parameters.py's.
"""

from __future__ import annotations

import ast
import operator
import re
from dataclasses import dataclass, field

from engine.metal.declarations import Function, Scanner, Span
from engine.metal.errors import CompileError
from engine.metal.tokens import Token, close_angle, tokenise, words

_STORAGE = {"constant", "const", "constexpr", "static", "volatile"}
# C++ that the compiler would take, and Metal does not (Metal Shading Language Specification, 1.5.4 and 2.1).
_NOT_METAL = {"double", "dynamic_cast", "typeid", "new", "try", "catch", "throw", "goto", "virtual", "thread_local"}


@dataclass(frozen=True, kw_only=True)
class KernelDeclaration:
    """`entry` is the range of tokens that name what C++ takes the address of (an instantiation's `f<…>`), or None for
    the function itself; `scope` the namespaces around it."""

    host_name: str
    entry: tuple[int, int] | None
    scope: tuple[str, ...]
    function: Function
    file: str
    line: int


@dataclass(frozen=True, kw_only=True)
class FunctionConstant:
    name: str
    index: int
    type_text: str
    span: Span


@dataclass(kw_only=True)
class Source:
    """A scanned source. `attributes` maps a token index to the index behind the attribute that begins there."""

    tokens: list[Token]
    tail: str
    scanner: Scanner
    kernels: dict[str, KernelDeclaration] = field(default_factory=dict)
    constants: dict[str, FunctionConstant] = field(default_factory=dict)
    instantiations: list[Span] = field(default_factory=list)
    attributes: dict[int, int] = field(default_factory=dict)

    def fail(self, at: int, message: str) -> CompileError:
        token = self.tokens[min(at, len(self.tokens) - 1)]
        return CompileError(message, file=token.file, line=token.line)


def read(text: str) -> Source:
    """Scan preprocessed text. Raises CompileError for C++ that Metal doesn't have, and for two kernels of one name."""
    tokens, tail = tokenise(text)
    source = Source(tokens=tokens, tail=tail, scanner=Scanner(tokens))
    for at, token in enumerate(tokens):
        if token.was in _NOT_METAL and token.kind == "name":
            raise source.fail(at, f"Metal has no `{token.was}`")
    _find_attributes(source)
    for function in source.scanner.found.functions:
        if is_kernel(source, function):
            _add_plain_kernel(source, function)
    for span in source.scanner.found.instantiations:
        _add_instantiation(source, span)
    for span in source.scanner.found.variables:
        _add_constant(source, span)
    return source


# ---- attributes ---------------------------------------------------------------------------------------------------


def _find_attributes(source: Source) -> None:
    at, scanner = 0, source.scanner
    while at < len(source.tokens):
        if scanner.is_attribute(at):
            source.attributes[at] = scanner.pairs[at] + 1
            at = scanner.pairs[at]
        at += 1


def attributes_in(source: Source, first: int, end: int) -> dict[str, list[Token]]:
    """Attributes within a token range: name → the tokens of its argument."""
    found: dict[str, list[Token]] = {}
    at = first
    while at < end:
        stop = source.attributes.get(at)
        if stop is None:
            at += 1
            continue
        inner = at + 2
        while inner < stop - 2:
            name, argument = source.tokens[inner].was, []
            if source.scanner.word(inner + 1) == "(" and inner + 1 in source.scanner.pairs:
                close = source.scanner.pairs[inner + 1]
                argument = source.tokens[inner + 2 : close]
                inner = close
            found[name] = argument
            inner += 1
            if source.scanner.word(inner) == "," or source.scanner.word(inner) == "::":
                inner += 1
        at = stop
    return found


_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift, ast.BitOr: operator.or_, ast.BitAnd: operator.and_,
}  # fmt: skip


def integer(source: Source, at: int, argument: list[Token]) -> int:
    """The value of an attribute's argument: integers, + - * / << >>, and integer constants of the program."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return int(_OPERATORS[type(node.op)](value(node.left), value(node.right)))
        if isinstance(node, ast.Name):
            for span in source.scanner.found.variables:
                tokens = source.tokens[span.first : span.end - 1]
                names = [token.was for token in tokens]
                if node.id in names and "=" in names[names.index(node.id) :]:
                    return integer(source, at, tokens[names.index("=") + 1 :])
        raise ValueError

    text = re.sub(r"(\d)[uUlL]+\b", r"\1", words(argument)).replace("/", "//").strip("() ")
    text = re.sub(r"\b0(?=\d)", "0o", text)  # C's octal numbers: MLX writes 00 and 01
    try:
        return value(ast.parse(text, mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError):
        raise source.fail(
            at, f"the index {words(argument)!r} is no integer constant that the host executor can see"
        ) from None


# ---- kernels ------------------------------------------------------------------------------------------------------


def is_kernel(source: Source, function: Function) -> bool:
    """Whether the function is marked `kernel`, by keyword or attribute."""
    if function.member:
        return False
    head = range(function.start, function.open)
    if any(
        source.tokens[at].was == "kernel" and source.tokens[at].kind == "name" and not _in_attribute(source, at)
        for at in head
    ):
        return True
    return "kernel" in attributes_in(source, function.start, function.open)


def _in_attribute(source: Source, at: int) -> bool:
    return any(first < at < end for first, end in source.attributes.items())


def _host_name(source: Source, first: int, end: int) -> str | None:
    argument = attributes_in(source, first, end).get("host_name")
    if not argument:
        return None
    return "".join(ast.literal_eval(token.was) for token in argument if token.kind == "string")  # "a" "b" is one string


def _add_plain_kernel(source: Source, function: Function) -> None:
    if function.first != function.start:
        return  # a template: its instantiations are the kernels
    qualified = "::".join((*function.scope, function.name))
    name = _host_name(source, function.start, function.end if function.body is None else function.body[0]) or qualified
    token = source.tokens[function.name_at]
    known = source.kernels.get(name)
    if known is not None and known.function.body is not None:
        if function.body is None:
            return
        raise source.fail(function.name_at, f"two kernels are named {name!r}")
    source.kernels[name] = KernelDeclaration(
        host_name=name, entry=None, scope=function.scope, function=function, file=token.file, line=token.line
    )


def _entity(source: Source, span: Span) -> tuple[int, int]:
    """The tokens `ns::f<…>` of an explicit instantiation: last before its parameter list or its semicolon."""
    scanner, stop = source.scanner, span.end - 1
    while stop > span.first and scanner.word(stop - 1) == "]" and stop - 1 in scanner.pairs:
        stop = scanner.pairs[stop - 1]  # trailing attributes
    if scanner.word(stop - 1) == ")" and stop - 1 in scanner.pairs:
        stop = scanner.pairs[stop - 1]
    first = scanner.name_before(stop)
    while scanner.word(first - 1) == "::":
        first -= 2 if source.tokens[first - 2].kind == "name" else 1
    return first, stop


def _add_instantiation(source: Source, span: Span) -> None:
    attributes = attributes_in(source, span.first, span.end)
    names = {token.was for token in source.tokens[span.first : span.end]}
    if "host_name" not in attributes and "kernel" not in attributes and "kernel" not in names:
        return
    first, stop = _entity(source, span)
    at = first
    while at + 2 < stop and source.scanner.word(at + 1) == "::":
        at += 2
    name = source.tokens[at].was
    candidates = [f for f in source.scanner.found.functions if f.name == name and is_kernel(source, f)]
    candidates.sort(key=lambda f: f.body is None)
    entry = words(source.tokens[first:stop])
    if not candidates:
        raise source.fail(first, f"{entry} is instantiated as a kernel, but no kernel template is named {name}")
    host_name = _host_name(source, span.first, span.end) or entry
    if host_name in source.kernels:
        raise source.fail(first, f"two kernels are named {host_name!r}")
    token = source.tokens[first]
    source.instantiations.append(span)
    source.kernels[host_name] = KernelDeclaration(
        host_name=host_name,
        entry=(first, stop),
        scope=span.scope,
        function=candidates[0],
        file=token.file,
        line=token.line,
    )


# ---- lists ------------------------------------------------------------------------------------------------------


def split(source: Source, first: int, end: int) -> list[tuple[int, int]]:
    """The ranges between commas that no bracket or template argument list encloses."""
    parts, at, begin = [], first, first
    scanner = source.scanner
    while at < end:
        word = scanner.word(at)
        if word in ("(", "[", "{") and at in scanner.pairs:
            at = scanner.pairs[at]
        elif word == "<" and source.tokens[at - 1].kind == "name":
            at = close_angle(source.tokens, scanner.pairs, at, end) or at
        elif word == ",":
            parts.append((begin, at))
            begin = at + 1
        at += 1
    if begin < end:
        parts.append((begin, end))
    return parts


def without_attributes(source: Source, first: int, end: int) -> list[Token]:
    """Tokens of a range, attributes left out."""
    kept, at = [], first
    while at < end:
        if at in source.attributes:
            at = source.attributes[at]
            continue
        kept.append(source.tokens[at])
        at += 1
    return kept


# ---- function constants -------------------------------------------------------------------------------------------


def _add_constant(source: Source, span: Span) -> None:
    argument = attributes_in(source, span.first, span.end).get("function_constant")
    if argument is None:
        return
    tokens = [t for t in without_attributes(source, span.first, span.end - 1) if t.was not in _STORAGE]
    name = tokens[-1].was
    source.constants[name] = FunctionConstant(
        name=name, index=integer(source, span.first, argument), type_text=words(tokens[:-1]), span=span
    )
