"""What the host leaves out of a library: vertex and fragment functions, and whatever uses textures or the like.

A library may hold them beside the compute kernels that are asked for: they are taken away, so that these compile. A
kernel that is asked for and needs one of them is refused, with the construct and its line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

from engine.metal.declarations import Class, Function
from engine.metal.source import KernelDeclaration, Source, attributes_in

_STAGES = {"vertex", "fragment", "mesh", "object"}
# Types of the Metal Shading Language Specification, chapters 2.8 to 2.21, that compute on buffers does without.
_TYPES = {
    "sampler", "imageblock", "visible_function_table", "intersection_function_table", "acceleration_structure",
    "primitive_acceleration_structure", "instance_acceleration_structure", "intersector", "intersection_query",
    "intersection_result", "mesh_grid_properties", "tensor", "cooperative_tensor", "command_buffer", "compute_command",
    "render_command", "compute_pipeline_state", "render_pipeline_state", "depth_stencil_state",
}  # fmt: skip
_TEXTURE = re.compile(r"(?:texture|depth)(?:1d|2d|3d|cube|_buffer)\w*")


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A function or class without a place on the host; token `at`, in a function called `within`, says why."""

    declared: Function | Class
    at: int
    within: str


def left_out(source: Source, kernels: Sequence[KernelDeclaration]) -> list[LeftOut]:
    """Everything to take away. Raises CompileError for a kernel of `kernels` that is among it."""
    found = _found(source)
    _add_callers(source, found)
    for kernel in kernels:
        item = next((item for item in found if item.declared is kernel.function), None)
        if item is not None:
            through = "" if item.within == kernel.function.name else f" through {item.within}"
            raise source.fail(
                item.at,
                f"{kernel.host_name} uses `{source.tokens[item.at].was}`{through}: it is not supported on the host",
            )
    return found


def _add_callers(source: Source, found: list[LeftOut]) -> None:
    """What calls a function that is gone goes too, unless another function of that name stays."""
    out = {id(item.declared) for item in found}
    if not out:
        return
    functions = [function for function in source.scanner.found.functions if not function.member]
    changed = True
    while changed:
        changed = False
        kept = {function.name for function in functions if function.body and id(function) not in out}
        gone = {item.declared.name: item for item in found if isinstance(item.declared, Function)}
        for function in functions:
            called = None if id(function) in out else _called(source, function, gone.keys() - kept)
            if called is not None:
                found.append(LeftOut(declared=function, at=gone[called].at, within=gone[called].within))
                out.add(id(function))
                changed = True


def _called(source: Source, function: Function, names: Set[str]) -> str | None:
    first, end = function.body or (function.end, function.end)
    return next(
        (source.tokens[i].was for i in range(first, end)
         if source.tokens[i].was in names and source.scanner.word(i + 1) in ("(", "<")),
        None,
    )  # fmt: skip


def _found(source: Source) -> list[LeftOut]:
    absent = _TYPES - {name for found in source.scanner.found.classes for name in _names(source, found)}
    found: list[LeftOut] = []
    for item in source.scanner.found.classes:  # a class that holds a texture is as absent as the texture
        at = _use(source, item.brace, item.end, absent)
        if at is not None:
            found.append(LeftOut(declared=item, at=at, within=""))
            absent = absent | _names(source, item)
    for function in source.scanner.found.functions:
        if function.member:
            continue
        at = _stage(source, function)
        if at is None:
            at = _use(source, function.start, function.end, absent)
        if at is not None:
            found.append(LeftOut(declared=function, at=at, within=function.name))
    return found


def _names(source: Source, declared: Class) -> set[str]:
    head = [token.was for token in source.tokens[declared.key + 1 : declared.brace]]
    return set(head[: head.index(":")] if ":" in head else head)


def _use(source: Source, first: int, end: int, absent: set[str]) -> int | None:
    """The first token of a range that names an absent type and is used as a type."""
    for at in range(first, end):
        token = source.tokens[at]
        if token.kind != "name" or not (token.was in absent or _TEXTURE.fullmatch(token.was)):
            continue
        following = source.tokens[at + 1] if at + 1 < end else None
        if following is not None and (following.kind == "name" or following.was in ("<", "&", "*")):
            return at
    return None


def _stage(source: Source, function: Function) -> int | None:
    """Where a function says that it is a vertex or fragment function, by keyword or attribute."""
    at = function.start
    while at in source.attributes:
        at = source.attributes[at]
    if source.tokens[at].was in _STAGES and at + 1 < function.name_at:
        return at
    if _STAGES & attributes_in(source, function.start, function.open).keys():
        return function.name_at
    return None
