"""A routed-matmul kernel described in TOML: which kernels a source has, what their buffers mean, how they are launched.

So that the wide-tile audit works on kernels that aren't ours, unmodified. docs/wide-tile-audit.md has the keys.
"""

from __future__ import annotations

import ast
import itertools
import operator
import struct
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Roles a buffer can have besides a struct of scalars.
ROLES = ("weights", "x", "counts", "pairs", "experts", "out")
SCALARS = {"i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "f32": "<f"}
# ggml's name of each format, elements and bytes of a block (llama.cpp, ggml-common.h).
FORMATS = {"q8_0": ("Q8_0", 32, 34), "q4_K": ("Q4_K", 256, 144), "q2_K": ("Q2_K", 256, 84)}
FORMATS |= {"iq2_xxs": ("IQ2_XXS", 256, 66), "f16": ("F16", 1, 2)}
RHS = {"f32": "float32", "f16": "float16"}
# Numbers of weight rows (M) to try, where the description has no others: a whole tile, and a ragged last one.
ROWS = (64, 70)
TOP = {"source", "kernel", "include_dirs", "defines", "constants"}
KEYS = {"name", "format", "rhs", "tile", "threads", "threadgroups", "threadgroup_memory", "buffers", "rows"}
GUIDE = "docs/wide-tile-audit.md has the keys, engine/metal/kernels/moe.toml is an example"
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"ceil": lambda a, b: -(-a // b), "min": min, "max": max}


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One kernel: its name in `source`, what it computes with, and expressions for its launch over the sizes of a
    case.
    """

    source: Path
    name: str
    format: str
    rhs: str
    tile: int
    threads: tuple[int, int, int]
    threadgroups: tuple[str, str, str]
    threadgroup_memory: Mapping[int, str]
    buffers: Mapping[int, str | tuple[str, ...]]
    include_dirs: tuple[Path, ...] = ()
    defines: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[int | str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ROWS

    def grid(self, sizes: Mapping[str, int]) -> tuple[int, int, int]:
        """Threadgroups of a launch over `sizes`."""
        x, y, z = (evaluate(text, {**sizes, "tile": self.tile}) for text in self.threadgroups)
        return x, y, z

    def staging(self, sizes: Mapping[str, int]) -> dict[int, int]:
        """Threadgroup memory, in bytes, by its index."""
        return {i: evaluate(text, {**sizes, "tile": self.tile}) for i, text in self.threadgroup_memory.items()}

    def bind(self, arrays: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[int, Any]:
        """What to pass as each buffer: the array of its role, or its scalars packed as C packs a struct."""
        return {
            index: arrays[meaning] if isinstance(meaning, str) else packed(meaning, {**sizes, "tile": self.tile})
            for index, meaning in self.buffers.items()
        }

    @property
    def out(self) -> int:
        """Index of the output buffer."""
        return next(index for index, meaning in self.buffers.items() if meaning == "out")


def read_specs(path: Path) -> list[KernelSpec]:
    """All kernels that a TOML file describes; ValueError, naming the file and the key, for what it doesn't say."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"there is no file {path}; {GUIDE}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can't be read as a TOML file ({error}); {GUIDE}") from error
    try:
        described = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML: {error}; {GUIDE}") from error
    try:
        specs = [spec for entry in described["kernel"] for spec in specs_of(entry, described, path.parent)]
    except KeyError as error:
        raise ValueError(f"{path}: the key {error.args[0]!r} is missing; {GUIDE}") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path}: a value is of another type than it should be ({error}); {GUIDE}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}; {GUIDE}") from error
    if not specs:
        raise ValueError(f"{path} describes no kernel; {GUIDE}")
    if not specs[0].source.is_file():
        raise ValueError(f"{path}: its source {specs[0].source} is no file; a source lies beside the TOML file")
    return specs


def specs_of(entry: Mapping[str, Any], described: Mapping[str, Any], folder: Path) -> Iterator[KernelSpec]:
    """The kernels of one [[kernel]] entry: one for each format, right-hand side and tile that it lists."""
    _check_entry(entry, described)
    buffers = {int(i): tuple(m) if isinstance(m, list) else str(m) for i, m in entry["buffers"].items()}
    threads = entry["threads"]
    gx, gy, gz = (str(text) for text in entry["threadgroups"])
    for kind, rhs, tile in itertools.product(entry["format"], entry["rhs"], entry["tile"]):
        if kind not in FORMATS or rhs not in RHS:
            raise ValueError(
                f"format {kind!r} × {rhs!r} is not known; formats {', '.join(FORMATS)}, rhs {', '.join(RHS)}"
            )
        yield KernelSpec(
            source=folder / described["source"],
            name=str(entry["name"]).format(format=kind, rhs=rhs, tile=tile),
            format=kind,
            rhs=rhs,
            tile=tile,
            threads=(threads[0], threads[1], threads[2]),
            threadgroups=(gx, gy, gz),
            threadgroup_memory={int(i): str(text) for i, text in entry.get("threadgroup_memory", {}).items()},
            buffers=buffers,
            include_dirs=tuple(folder / name for name in described.get("include_dirs", ())),
            defines=dict(described.get("defines", {})),
            constants={int(key) if key.isdigit() else key: v for key, v in described.get("constants", {}).items()},
            rows=tuple(entry.get("rows", ROWS)),
        )


def _check_entry(entry: Any, described: Mapping[str, Any]) -> None:
    """ValueError for a key that there isn't, or a value that it can't have; KeyError for one that is missing."""
    if not isinstance(entry, Mapping):
        raise ValueError("kernel is no list of tables; each begins with [[kernel]]")
    if unknown := [*(set(described) - TOP), *(set(entry) - KEYS)]:
        raise ValueError(f"there is no key {sorted(unknown)[0]!r}; there is {', '.join(sorted(TOP | KEYS))}")
    for name in ("format", "rhs", "tile", "threads", "threadgroups"):
        if not isinstance(entry[name], list):
            raise ValueError(f"{name} is {entry[name]!r}; a list is expected")
    if not isinstance(described.get("include_dirs", []), list):
        raise ValueError(f"include_dirs is {described['include_dirs']!r}; a list of folders is expected")
    for name, what in (("tile", "tokens"), ("threads", "threads"), ("rows", "weight rows")):
        numbers = entry.get(name, list(ROWS))
        if not isinstance(numbers, list) or any(type(n) is not int or n < 1 for n in numbers):
            raise ValueError(f"{name} is {numbers!r}; numbers of {what} from 1 on are expected")
    if not entry.get("rows", ROWS):
        raise ValueError("rows is []; numbers of weight rows from 1 on are expected")
    for name, what in (("threads", "whole numbers"), ("threadgroups", "expressions")):
        if len(entry[name]) != 3:
            raise ValueError(f"{name} is {entry[name]!r}; three {what} are expected")
    if any(not index.isdecimal() for name in ("buffers", "threadgroup_memory") for index in entry.get(name, ())):
        raise ValueError("buffers and threadgroup_memory go by their index, a whole number")
    _check_buffers(entry["buffers"].values())


def _check_buffers(meanings: Collection[Any]) -> None:
    """ValueError for what is neither a role nor a list of scalars, and for roles that are missing."""
    if wrong := [text for m in meanings if isinstance(m, list) for text in m if not isinstance(text, str)]:
        raise ValueError(f"a scalar is {wrong[0]!r}; a type and an expression are expected, such as 'i32 K'")
    if wrong := [m for m in meanings if not isinstance(m, list) and m not in ROLES]:
        raise ValueError(f"a buffer is {wrong[0]!r}; it is a list of scalars or one of {', '.join(ROLES)}")
    if missing := {"weights", "x", "out"} - {m for m in meanings if isinstance(m, str)}:
        raise ValueError(f"no buffer is {sorted(missing)[0]!r}")


def evaluate(text: str, sizes: Mapping[str, int]) -> int:
    """An integer expression over `sizes` with + − * //, ceil(a, b), min and max; ValueError for anything else."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return _FUNCTIONS[name](*(value(argument) for argument in arguments))
        raise ValueError(f"{text!r}: {ast.unparse(node)!r} is none of {', '.join(sorted(sizes))} or a whole number")

    try:
        return value(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError) as error:
        raise ValueError(f"{text!r} is no expression") from error
    except (ZeroDivisionError, TypeError) as error:
        raise ValueError(f"{text!r} can't be computed: {error}") from error


def packed(fields: tuple[str, ...], sizes: Mapping[str, int]) -> bytes:
    """Scalars like "i32 K" or "u64 row_bytes" as the bytes of a C struct: each aligned to its size, the whole
    padded.
    """
    data, widest = b"", 1
    for text in fields:
        kind, _, expression = text.partition(" ")
        if kind not in SCALARS:
            raise ValueError(f"{text!r}: a scalar is one of {', '.join(SCALARS)} and an expression")
        size = struct.calcsize(SCALARS[kind])
        widest = max(widest, size)
        try:
            data += bytes(-len(data) % size) + struct.pack(SCALARS[kind], evaluate(expression, sizes))
        except struct.error as error:
            raise ValueError(f"{text!r} doesn't fit: it is {evaluate(expression, sizes)}") from error
    return data + bytes(-len(data) % widest)
