"""What a program of cache operations is, whether one that somebody wrote makes sense, and how people write one.

A program is a list of operations, each a dict of JSON values. Caches have numbers: 0 is made by the factory, and
operations that make another say which number it gets ("as"), so that operations can be left out of a program without
renaming the rest.

    feed        on n window array        ask for the mask, update, judge
    right_pad   on lengths chunks        prepare(lengths, right_padding), the chunks, finalize
    left_pad    on left_padding          prepare(left_padding) of an empty batch
    trim        on n                     trim_front  on
    restore     on as                    state and meta_state into a fresh cache
    copy        on as                    its own way of copying
    new         as left_padding          another batch
    filter      on rows                  extend      on with
    extract     on row as                single      like as        (an empty cache of that class)
    merge       of as
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

Op = Mapping[str, Any]
# What each operation says of itself, as in the table above; the rest may be left out.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "feed": ("on", "n"),
    "right_pad": ("on", "lengths", "chunks"),
    "left_pad": ("on", "left_padding"),
    "trim": ("on", "n"),
    "trim_front": ("on",),
    "restore": ("on", "as"),
    "copy": ("on", "as"),
    "new": ("as", "left_padding"),
    "filter": ("on", "rows"),
    "extend": ("on", "with"),
    "extract": ("on", "row", "as"),
    "single": ("like", "as"),
    "merge": ("of", "as"),
}
LISTS = ("lengths", "chunks", "left_padding", "rows", "of")


def check_program(program: Any) -> None:
    """ValueError for what is no list of operations that say what they need to."""
    if not isinstance(program, list) or not all(isinstance(op, Mapping) for op in program):
        raise ValueError("a program is a list of operations")
    for i, op in enumerate(program):
        name = op.get("op")
        if not isinstance(name, str) or name not in FIELDS:
            raise ValueError(f"operation {i} is {name!r}; there is {', '.join(FIELDS)}")
        for field_ in FIELDS[name]:
            value = op.get(field_)
            good = isinstance(value, list) and bool(value) and all(map(_count, value))
            if not (good if field_ in LISTS else _count(value)):
                kind = "a list of whole numbers" if field_ in LISTS else "a whole number"
                raise ValueError(f"operation {i}, {name}, has {field_} {value!r}; {kind} is expected")
        if not (op.get("window") is None or _count(op["window"])):
            raise ValueError(f"operation {i}, {name}, has window {op['window']!r}; a whole number or null is expected")


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def op_text(op: Op) -> str:
    """An operation as people write it: feed(3, window=4), trim(2, on=1)."""
    usual = {"on": 0, "window": None, "array": False}
    told = [str(op["n"])] if "n" in op else []
    rest = {name: value for name, value in op.items() if name not in ("op", "n") and value != usual.get(name, "")}
    return f"{op.get('op')}({', '.join([*told, *(f'{name}={value}' for name, value in rest.items())])})"


def program_text(program: Sequence[Op]) -> str:
    """A program as people write it: feed(3) trim(2) feed(1)×4."""
    runs = [(text, len(list(run))) for text, run in groupby(map(op_text, program))]
    return " ".join(text if count == 1 else f"{text}×{count}" for text, count in runs)
