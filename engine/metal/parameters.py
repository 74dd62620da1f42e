"""A kernel's parameters: names, kinds, indices and attributes, and Metal's rule for the indices that are left out.

C++ finds their types when it compiles; what the host doesn't have (textures, samplers, …) is refused here, by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    text = [token.was for token in tokens]
    name = tokens[-1].was if len(tokens) > 1 and tokens[-1].kind == "name" else ""
    type_text = words(tokens[:-1] if name else tokens)
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
    return Parameter(name=name, index=index, kind=kind, address_space=space, type_text=type_text)


def most_threads(source: Source, kernel: KernelDeclaration) -> int | None:
    """What [[max_total_threads_per_threadgroup(n)]] allows, where n is a number and no template argument."""
    function = kernel.function
    end = function.body[0] if function.body else function.end
    argument = attributes_in(source, function.start, end).get("max_total_threads_per_threadgroup")
    try:
        return integer(source, function.name_at, argument) if argument else None
    except CompileError:
        return None
