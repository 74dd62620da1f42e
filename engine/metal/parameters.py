"""A kernel's parameters: names, kinds, indices and attributes, and Metal's rule for the indices that are left out.

C++ finds their types when it compiles; what the host doesn't have (textures, samplers, …) is refused here, by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from engine.metal.declarations import Span
from engine.metal.errors import CompileError
from engine.metal.source import KernelDeclaration, Source, attributes_in, integer, split, without_attributes
from engine.metal.tokens import words

BUILTINS = (
    "thread_position_in_grid", "thread_position_in_threadgroup", "thread_index_in_threadgroup",
    "thread_index_in_simdgroup", "thread_index_in_quadgroup", "threadgroup_position_in_grid", "threadgroups_per_grid",
    "threads_per_grid", "threads_per_threadgroup", "dispatch_threads_per_threadgroup", "threads_per_simdgroup",
    "simdgroup_index_in_threadgroup", "simdgroups_per_threadgroup", "dispatch_simdgroups_per_threadgroup",
    "quadgroup_index_in_threadgroup", "quadgroups_per_threadgroup", "dispatch_quadgroups_per_threadgroup",
    "grid_origin", "grid_size",
)  # fmt: skip
# Metal's older name for the same value (Metal Shading Language Specification, 5.2.3.6).
_ALIASES = {"thread_execution_width": "threads_per_simdgroup"}
ADDRESS_SPACES = {"device", "constant", "threadgroup", "thread"}
MOST_BUFFERS = 31


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a kernel: `kind` is buffer, threadgroup or builtin; `attribute` names the builtin."""

    name: str
    index: int | None
    kind: str
    address_space: str | None
    type_text: str
    attribute: str | None = None


def parameters(source: Source, kernel: KernelDeclaration) -> tuple[Parameter, ...]:
    """A kernel's parameters in order. Raises CompileError for what the host executor does not support.

    A buffer or threadgroup pointer without an index gets the lowest one that is free, in order (Metal Shading Language
    Specification, 5.2.1).
    """
    function = kernel.function
    raw = [_parameter(source, kernel, first, end) for first, end in split(source, function.open + 1, function.close)]
    taken = {kind: {p.index for p in raw if p.kind == kind} for kind in ("buffer", "threadgroup")}
    result = []
    for parameter in raw:
        if parameter.kind in taken and parameter.index is None:
            index = next(i for i in range(MOST_BUFFERS + len(raw)) if i not in taken[parameter.kind])
            taken[parameter.kind].add(index)
            parameter = replace(parameter, index=index)
        if parameter.index is not None and not 0 <= parameter.index < MOST_BUFFERS:
            raise source.fail(
                function.name_at,
                f"{parameter.kind}({parameter.index}) of {kernel.host_name}: indices end at {MOST_BUFFERS - 1}",
            )
        result.append(parameter)
    return tuple(result)


def _parameter(source: Source, kernel: KernelDeclaration, first: int, end: int) -> Parameter:
    tokens = without_attributes(source, first, end)
    attributes = attributes_in(source, first, end)
    extent = next((at for at, token in enumerate(tokens) if token.was == "["), len(tokens))
    tokens, extents = tokens[:extent], tokens[extent:]
    text = [token.was for token in tokens]
    name = tokens[-1].was if len(tokens) > 1 and tokens[-1].kind == "name" else ""
    type_text = words((tokens[:-1] if name else tokens) + extents)
    if extents and name:  # `T x[3]` is `T* x`
        text.insert(len(text) - 1, "*")
    label = f"parameter {name or type_text!r} of {kernel.host_name}"
    builtins = [_ALIASES.get(word, word) for word in attributes if _ALIASES.get(word, word) in BUILTINS]
    if builtins:
        return Parameter(
            name=name, index=None, kind="builtin", address_space=None, type_text=type_text, attribute=builtins[0]
        )
    known = {"buffer", "threadgroup", "function_constant", "maybe_unused", "unused"}
    unknown = [word for word in attributes if word not in known]
    if unknown:
        raise source.fail(first, f"{label}: [[{unknown[0]}]] is not supported on the host")
    spaces = [word for word in text if word in ADDRESS_SPACES]
    # The first address space belongs to the outermost pointer of `constant T* device* p`; there a pointer to pointers
    # would need addresses of the GPU in a buffer.
    if not spaces or not any(word in ("*", "&") for word in text):
        raise source.fail(first, f"{label}: {type_text} has no attribute that the host executor supports")
    space = spaces[-1] if text.count("*") + text.count("&") > 1 else spaces[0]
    kind = "threadgroup" if space == "threadgroup" else "buffer"
    argument = attributes.get(kind)
    index = integer(source, first, argument) if argument else None
    pointer = _pointer_in(source, text[: len(text) - bool(name)], set()) if kind == "buffer" else None
    if pointer is not None:
        held = words(source.tokens[pointer.first : pointer.end - 1])
        raise source.fail(first, f"{label} holds the pointer `{held}`: argument buffers are not supported on the host")
    return Parameter(name=name, index=index, kind=kind, address_space=space, type_text=type_text)


def _pointer_in(source: Source, type_words: Sequence[str], seen: set[int]) -> Span | None:
    """The member that is a pointer or reference of a type's classes, or of their members' classes."""
    for found in source.scanner.found.classes:
        head = [token.was for token in source.tokens[found.key + 1 : found.brace]]
        if found.brace in seen or not set(head[: head.index(":")] if ":" in head else head) & set(type_words):
            continue
        seen.add(found.brace)
        for span in source.scanner.found.variables:
            if not (span.member and found.brace < span.first < found.end):
                continue
            member = [token.was for token in without_attributes(source, span.first, span.end - 1)]
            member = member[: member.index("=")] if "=" in member else member
            if {"*", "&"} & set(member) and ADDRESS_SPACES & set(member):
                return span
            nested = _pointer_in(source, member[:-1], seen)
            if nested is not None:
                return nested
    return None


def optional(
    source: Source, kernel: KernelDeclaration, found: Sequence[Parameter], values: Mapping[str, str]
) -> frozenset[int]:
    """Indices of buffers that a launch may leave out.

    Those that [[function_constant(c)]] takes away, or may take away where c's value isn't plain; and those that the
    body names nowhere but in blocks of an `if` about constants, which may be dead code (MLX leaves out what only
    batched kernels use).
    """
    function = kernel.function
    spans = split(source, function.open + 1, function.close)
    varying = {parameter.name for parameter in found} | (_locals(source, *function.body) if function.body else set())
    needed = _used_anyway(source, *function.body, varying) if function.body else set()
    indices = set()
    for parameter, (first, end) in zip(found, spans, strict=True):
        if parameter.kind != "buffer" or parameter.index is None:
            continue
        guard = attributes_in(source, first, end).get("function_constant")
        if parameter.name not in needed or (guard and values.get(guard[0].was) != "true"):
            indices.add(parameter.index)
    return frozenset(indices)


def _locals(source: Source, first: int, end: int) -> set[str]:
    """Names that a body declares: a name or `*`, `&`, `>` before them, and `=`, `;`, `,` or a bracket behind."""
    found = set()
    for at in range(first + 1, end - 1):
        before, token = source.tokens[at - 1], source.tokens[at]
        typed = before.was in ("*", "&", ">") or (before.kind == "name" and before.was != "return")
        if token.kind == "name" and typed and source.tokens[at + 1].was in ("=", ";", ",", "[", "{", "(", ":"):
            found.add(token.was)
    return found


def _used_anyway(source: Source, first: int, end: int, varying: set[str]) -> set[str]:
    """Names in a body outside the blocks of an `if` (and its `else`) whose condition has no name that varies."""
    names, at, pairs = set(), first, source.scanner.pairs
    skipped = -1  # the end of the last block that was left out
    while at < end:
        token = source.tokens[at]
        block = -1
        if token.was == "if" and at + 1 in pairs:
            condition = {t.was for t in source.tokens[at + 1 : pairs[at + 1]] if t.kind == "name"}
            block = -1 if condition & varying else pairs[at + 1] + 1
        elif token.was == "else" and at == skipped + 1:
            block = at + 1
        if token.kind == "name":
            names.add(token.was)
        if block in pairs and source.scanner.word(block) == "{":
            at = skipped = pairs[block]
        at += 1
    return names


def most_threads(source: Source, kernel: KernelDeclaration) -> int | None:
    """What [[max_total_threads_per_threadgroup(n)]] allows, where n is a number and no template argument."""
    function = kernel.function
    end = function.body[0] if function.body else function.end
    argument = attributes_in(source, function.start, end).get("max_total_threads_per_threadgroup")
    try:
        return integer(source, function.name_at, argument) if argument else None
    except CompileError:
        return None
