"""From Metal to C++: what the compiler must see of a scanned source so that the shim can give it Metal's meaning.

Every change keeps line breaks where they are. Address spaces vanish (overloads that differ by nothing else are
dropped), literals get Metal's types, `threadgroup` variables in bodies become references to storage that the
threadgroup's threads share, function constants get their values, and each kernel asked for is registered behind the
text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.metal.constants import require
from engine.metal.declarations import Function
from engine.metal.errors import CompileError
from engine.metal.graphics import left_out
from engine.metal.lockstep import keep_step
from engine.metal.loops import know_loops
from engine.metal.own_arrays import own_arrays
from engine.metal.parameters import Parameter, parameters
from engine.metal.source import (
    KernelDeclaration,
    Source,
    is_kernel,
    split,
    without_attributes,
)
from engine.metal.swizzles import swizzles
from engine.metal.tokens import Token, close_angle

_DROPPED = {"device", "thread", "threadgroup", "ray_data", "object_data", "kernel"}
_FLOAT = re.compile(r"(?:[0-9][0-9']*)?\.?[0-9']*(?:[eE][+-]?[0-9]+)?")
_NOTHING = re.compile(r"[={},]|0[.0]*[fFhH]?")
_QUALIFIERS = {"const", "volatile", "static", "constexpr", "typename"}


@dataclass(frozen=True, kw_only=True)
class Rewritten:
    """C++ text, and the names of the threadgroup variables in it by the number that faults carry."""

    text: str
    variables: dict[int, str]


def rewrite(source: Source, kernels: Sequence[KernelDeclaration], values: Mapping[str, str]) -> Rewritten:
    """The C++ of a source, registering `kernels`; `values` are function constants' C++ values by name.

    Raises CompileError (what the host does not support) and MetalError (a constant that a kernel reads has no value).
    """
    for token in source.tokens:
        token.text = _literal(token.was) if token.kind == "number" else token.was
    for first, end in source.attributes.items():
        _blank(source, first, end)
    absent = left_out(source, kernels)
    _address_spaces(source)
    swizzles(source)
    keep_step(source)
    own_arrays(source)
    know_loops(source)
    _settled_branches(source)
    for function in source.scanner.found.functions:
        if is_kernel(source, function):
            source.tokens[function.start].text = "inline " + source.tokens[function.start].text
    _constants(source, values)
    variables: dict[int, str] = {}
    for at in _threadgroup_words(source):
        _threadgroup_variable(source, at, variables)
    for kernel in kernels:
        require(source, kernel, values)
    registrations = [_registration(source, kernel, number) for number, kernel in enumerate(kernels)]
    _drop_duplicates(source)
    for span in [*source.instantiations, *(item.declared for item in absent)]:
        _blank(source, span.first, span.end)
    text = "".join(token.space + token.text for token in source.tokens) + source.tail
    lines = (line if not line.lstrip().startswith("#pragma") else "" for line in text.split("\n"))
    tail = '\n# 1 "kernel.registration"\n#include "kernel.h"\n' + "\n".join(registrations) + "\n"
    return Rewritten(text="\n".join(lines) + tail, variables=variables)


def _blank(source: Source, first: int, end: int) -> None:
    for token in source.tokens[first:end]:
        token.text = ""


# ---- literals -----------------------------------------------------------------------------------------------------


def _literal(word: str) -> str:
    """A number with Metal's type: no suffix means float (there is no double), `h` half, `bf` bfloat.

    Metal Shading Language Specification, 2.1: scalar data types.
    """
    lower = word.lower()
    if lower.startswith("0x"):
        return word + "f" if "p" in lower and lower[-1] not in "fh" else word
    if lower.endswith("bf") and _FLOAT.fullmatch(word[:-2]):
        return f"(bfloat({_with_point(word[:-2])}f))"
    if lower.endswith("h") and _FLOAT.fullmatch(word[:-1]):
        return f"(half({_with_point(word[:-1])}))"
    if ("." in word or "e" in lower) and _FLOAT.fullmatch(word):
        return word + "f"
    return word


def _with_point(digits: str) -> str:
    return digits if "." in digits or "e" in digits.lower() else digits + ".0"


# ---- address spaces -----------------------------------------------------------------------------------------------


def _address_spaces(source: Source) -> None:
    for index, token in enumerate(source.tokens):
        if token.kind != "name" or not token.text:
            continue
        if token.was in _DROPPED:
            token.text = ""
        elif token.was == "constant":
            # Behind a member function's parameters `const constant` must not become `const const`.
            before = source.tokens[index - 1].was if index else ""
            token.text = "" if before == "const" else "const"
        elif token.was == "coherent" and source.scanner.word(index + 1) in ("(", "device"):
            close = source.scanner.pairs.get(index + 1, index)
            _blank(source, index, close + 1)
    for function in source.scanner.found.functions:
        if function.member and function.name == function.scope[-1].split("<")[0]:  # a constructor can't be const
            for token in source.tokens[function.close + 1 : function.body[0] if function.body else function.end]:
                token.text = "" if token.was == "constant" else token.text
    for span in source.scanner.found.variables:
        words = [token.was for token in source.tokens[span.first : span.end]]
        # In Metal a static constant member may be of any type; C++ wants constexpr for all but integers.
        if span.member and {"static", "constant", "="} <= set(words) and not {"constexpr", "*", "&"} & set(words):
            source.tokens[span.first + words.index("constant")].text = "constexpr"


def _parameter_type(source: Source, first: int, end: int) -> str:
    """A parameter's type for comparing overloads: no name, no default, address spaces only as far as C++ sees them."""
    tokens = [token for token in without_attributes(source, first, end) if token.text]
    texts = [token.was if token.was != "constant" else "const" for token in tokens]
    if "=" in texts:
        texts, tokens = texts[: texts.index("=")], tokens[: texts.index("=")]
    suffix = ""
    if "[" in texts:
        cut = texts.index("[")
        suffix, texts, tokens = "*", texts[:cut], tokens[:cut]
    plain = [text for text in texts if text not in _QUALIFIERS]
    if tokens and tokens[-1].kind == "name" and len(plain) > 1 and texts[-2] != "::":
        texts = texts[:-1]
    const = "const " if "const" in texts and ("*" in texts or "&" in texts) else ""
    return const + " ".join(text for text in texts if text not in ("const", "volatile")) + suffix


def _signature(source: Source, function: Function) -> tuple[object, ...]:
    header = " ".join(token.was for token in source.tokens[function.first : function.start])
    trailer_end = function.body[0] if function.body else function.end - 1
    trailer = [t.text for t in source.tokens[function.close + 1 : trailer_end] if t.text]
    if ":" in trailer:
        trailer = trailer[: trailer.index(":")]
    name = " ".join(token.text for token in source.tokens[function.name_at : function.open] if token.text)
    types = [_parameter_type(source, first, end) for first, end in split(source, function.open + 1, function.close)]
    # Templates may differ in their return type alone (enable_if).
    returns = " ".join(token.text for token in source.tokens[function.start : function.name_at] if token.text)
    return function.scope, header, returns.removeprefix("inline "), name, tuple(types), tuple(trailer)


def _words(source: Source, function: Function) -> list[str]:
    """A body's tokens without the address spaces, and with numbers for the parameters' names."""
    assert function.body is not None
    numbers: dict[str, str] = {}
    for n, (first, end) in enumerate(split(source, function.open + 1, function.close)):
        names = [token.was for token in source.tokens[first:end] if token.kind == "name"]
        if names:
            numbers[names[-1]] = f"parameter {n}"
    words = (token.was for token in source.tokens[slice(*function.body)])
    return [numbers.get(word, word) for word in words if word not in _DROPPED and word != "constant"]


def _drop_duplicates(source: Source) -> None:
    """Of functions that differ by address space only, keep the first that is defined; the host has one space.

    Raises CompileError where that would change what is computed: the bodies of the two say different things.
    """
    defined: dict[tuple[object, ...], Function] = {}
    for function in source.scanner.found.functions:
        spaced = any(
            token.was in _DROPPED or token.was == "constant"
            for token in source.tokens[function.start : function.body[0] if function.body else function.end]
        )
        if function.body is None and not function.member:
            continue
        key = _signature(source, function)
        if key in defined and (spaced or function.member):
            first = defined[key]
            if first.body and function.body and _words(source, first) != _words(source, function):
                raise CompileError(
                    f"{source.tokens[function.name_at].was} differs from an earlier overload by address space alone,"
                    " and does something else: the host can't tell their arguments apart",
                    file=source.tokens[function.name_at].file,
                    line=source.tokens[function.name_at].line,
                )
            _blank(source, function.first, function.end)
        defined.setdefault(key, function)
    specialised = set()
    for found in source.scanner.found.classes:  # pointer_element<device T*>, pointer_element<threadgroup T*>
        header = " ".join(token.text for token in source.tokens[found.first : found.key])
        head = (
            found.scope,
            header,
            " ".join(token.text for token in source.tokens[found.key : found.brace] if token.text),
        )
        if "<" in head[2] and head in specialised:
            _blank(source, found.first, found.end)
        specialised.add(head)


# ---- branches that templates settle ------------------------------------------------------------------------------


def _settled_branches(source: Source) -> None:
    """`if (Flag)` on a template's bool parameter becomes `if constexpr`: the branch not taken isn't instantiated.

    Metal converts a bfloat to an integer without being asked, and C++ can't convert it both ways (msl/bfloat.h); where
    one text serves values and indices (MLX's sort), the branch not taken is where such conversions are.
    """
    found = source.scanner.found
    templates = [(f.first, f.start, f.end) for f in found.functions] + [(c.first, c.key, c.end) for c in found.classes]
    for first, header_end, end in templates:
        header = [token.was for token in source.tokens[first:header_end]]
        flags = {header[at + 1] for at in range(len(header) - 1) if header[at] == "bool"} - {",", ">", "=", "..."}
        for at in range(header_end, end) if flags else ():
            condition = [source.scanner.word(at + n) for n in range(1, 4)]
            if source.tokens[at].was == "if" and condition[0] == "(" and condition[1] in flags and condition[2] == ")":
                source.tokens[at].text = source.tokens[at].text.replace("if", "if constexpr")


# ---- threadgroup variables ----------------------------------------------------------------------------------------


def _threadgroup_words(source: Source) -> list[int]:
    """Indices of the word `threadgroup` at the start of a statement in a function's body."""
    found = []
    for function in source.scanner.found.functions:
        if function.body is None:
            continue
        for at in range(function.body[0] + 1, function.body[1]):
            token = source.tokens[at]
            if (
                token.was != "threadgroup"
                or token.kind != "name"
                or any(a < at < b for a, b in source.attributes.items())
            ):
                continue
            before = at - 1
            while source.tokens[before].was in _QUALIFIERS:
                before -= 1
            if source.tokens[before].was in ("{", "}", ";", ")", ":"):
                found.append(at)
            elif (
                source.tokens[before].kind == "name"
                and source.tokens[at + 1].kind == "name"
                and source.scanner.word(at + 2) in ("[", ";", ",", "=")
            ):
                raise source.fail(at, "write `threadgroup` before the type of a threadgroup variable")
    return found


def _threadgroup_variable(source: Source, at: int, variables: dict[int, str]) -> None:
    """Turn `threadgroup T x[A][B], y;` into references to the threadgroup's storage; leave pointers and references."""
    scanner, tokens = source.scanner, source.tokens
    end = at
    while scanner.word(end) != ";":
        end = scanner.pairs[end] + 1 if scanner.word(end) in ("(", "[", "{") and end in scanner.pairs else end + 1
        if end >= len(tokens):
            raise source.fail(at, "a threadgroup variable's declaration does not end")
    first = at
    while tokens[first - 1].was in _QUALIFIERS:
        first -= 1
    align = ""
    type_first = at + 1
    if scanner.word(type_first) == "alignas" and type_first + 1 in scanner.pairs:
        close = scanner.pairs[type_first + 1]
        align = ", " + "".join(token.text for token in tokens[type_first + 1 : close + 1])
        type_first = close + 1
    parts = split(source, type_first, end)
    if any(token.was in ("*", "&") for token in _declarator_head(source, *parts[0])):
        return
    name_at = _declared_name(source, *parts[0])
    type_text = " ".join(token.text for token in tokens[type_first:name_at] if token.text)
    if not type_text:
        raise source.fail(at, "this use of `threadgroup` is not supported on the host")
    out = []
    for begin, stop in [(name_at, parts[0][1]), *parts[1:]]:
        name, extents, index = tokens[begin].text, "", begin + 1
        while index < stop:
            if all(_NOTHING.fullmatch(token.was) for token in tokens[index:stop]):
                break  # `= {0}` initialises nothing: threadgroup memory holds what was there before
            if scanner.word(index) != "[":
                raise source.fail(index, f"threadgroup variable {name!r} can't have an initialiser")
            close = scanner.pairs[index]
            extents += "[(" + " ".join(token.text for token in tokens[index + 1 : close]) + ")]"
            index = close + 1
        number = len(variables)
        variables[number] = name
        site = f"rt_site_{number}"
        out.append(
            f'static const ::rt::Site {site} = {{"{name}", {tokens[at].line}, {number}}}; '
            f"auto& {name} = ::rt::threadgroup_variable<{type_text}{extents}{align}>({site})"
        )
    _blank(source, first, end)
    tokens[at].text = "; ".join(out)


def _declarator_head(source: Source, first: int, end: int) -> list[Token]:
    """Tokens of the first declarator up to its extents, template arguments left out."""
    kept: list[Token] = []
    at = first
    while at < end and source.scanner.word(at) not in ("[", "="):
        if source.scanner.word(at) == "<":
            at = _skip_angle(source, at, end)
        kept.append(source.tokens[at])
        at += 1
    return kept


def _skip_angle(source: Source, at: int, end: int) -> int:
    return close_angle(source.tokens, source.scanner.pairs, at, end) or at


def _declared_name(source: Source, first: int, end: int) -> int:
    at, name = first, first
    while at < end and source.scanner.word(at) not in ("[", "="):
        if source.scanner.word(at) == "<":
            at = _skip_angle(source, at, end)
        elif source.tokens[at].kind == "name":
            name = at
        at += 1
    return name


# ---- function constants -------------------------------------------------------------------------------------------


def _constants(source: Source, values: Mapping[str, str]) -> None:
    for constant in source.constants.values():
        _blank(source, constant.span.first, constant.span.end)
        value = values.get(constant.name)
        source.tokens[
            constant.span.first
        ].text = f"static constexpr {constant.type_text} {constant.name} = {constant.type_text}({value or ''});"
    for index, token in enumerate(source.tokens):
        if token.was == "is_function_constant_defined" and index + 1 in source.scanner.pairs:
            close = source.scanner.pairs[index + 1]
            name = source.tokens[close - 1].was
            _blank(source, index, close + 1)
            token.text = "true" if name in values else "false"


# ---- registration -------------------------------------------------------------------------------------------------


def _registration(source: Source, kernel: KernelDeclaration, number: int) -> str:
    given = parameters(source, kernel)
    if kernel.entry is None:
        entry = "::" + "::".join((*kernel.scope, kernel.function.name))
    else:
        entry = " ".join(token.text for token in source.tokens[slice(*kernel.entry)] if token.text)
        if "::" not in (token.was for token in source.tokens[kernel.entry[0] : kernel.entry[0] + 2]):
            entry = "".join(f"{part}::" for part in kernel.scope) + entry
    named = "&" + entry
    if kernel.entry is not None and kernel.function.first != kernel.function.start and entry[-1] != ">":
        # An instantiation without `<…>` says by its parameters which one it is.
        close = source.scanner.pairs[kernel.entry[1]]
        types = " ".join(token.text for token in source.tokens[kernel.entry[1] + 1 : close] if token.text)
        named = f"static_cast<void (*)({types})>({named})"
    rows = ", ".join(_descriptor(parameter) for parameter in given)
    return (
        f"static constexpr rt::Parameters<{len(given)}> rt_parameters_{number} = {{{{{rows}}}}};\n"
        f"using rt_entry_{number} = rt::Entry<({named}), rt_parameters_{number}>;\n"
        f"static const rt::Registration rt_registration_{number}({{{_quoted(kernel.host_name)}, "
        f"rt_entry_{number}::invoke, rt_parameters_{number}.at, rt_entry_{number}::infos, {len(given)}}});"
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _descriptor(parameter: Parameter) -> str:
    return f"{{rt::param_{parameter.kind}, rt::{parameter.attribute or 'no_builtin'}, {parameter.index or 0}}}"
