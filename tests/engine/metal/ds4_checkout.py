"""A checkout of ds4, as its host compiles and launches it: a prelude in ds4_metal.m, then the files that it lists.

ds4 is not part of the repository: ASSAY_THIRD_PARTY names a folder with checkouts of it (or copies of ds4_metal.m and
metal/). Argument structs are read from the sources, so that versions whose structs differ are served too.
"""

from __future__ import annotations

import ast
import functools
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from engine.metal.launch import Run
from engine.metal.library import Library, compile

Array = np.ndarray[Any, Any]
FOLDER = os.environ.get("ASSAY_THIRD_PARTY", "")
HOST = "ds4_metal.m"
CHECKOUTS = [p for p in sorted(Path(FOLDER).iterdir()) if (p / HOST).is_file()] if FOLDER else []
_C = {"int": "i4", "int16_t": "i2", "short": "i2", "int32_t": "i4", "int64_t": "i8", "uint": "u4", "uint32_t": "u4",
      "ulong": "u8", "uint64_t": "u8", "float": "f4", "bool": "?"}  # fmt: skip
_STRING = re.compile(r'^"(?:[^"\\]|\\.)*"', re.MULTILINE)


def assemble(host: str, folder: Path) -> str:
    """The library's text: the strings of ds4_gpu_source, then every file that the host names, in its order."""
    prelude, rest = re.split(r";[ \t]*\n\s*\n", host.partition("*ds4_gpu_source =")[2], maxsplit=1)
    names = dict.fromkeys(re.findall(r'@"(metal/[\w.]+\.metal)"', rest.partition("required_sources =")[2]))
    missing = [name for name in names if not (folder / name).is_file()]
    assert not missing, f"{folder} lacks {', '.join(missing)}"
    texts = [ast.literal_eval(string) for string in _STRING.findall(prelude)]
    return "".join(texts) + "\n".join((folder / name).read_text() for name in names)


@functools.cache
def source(checkout: Path) -> str:
    return assemble((checkout / HOST).read_text(), checkout)


@functools.cache
def library(checkout: Path, checked: bool, constants: tuple[tuple[str, object], ...] = ()) -> Library:
    return compile(source(checkout), checked=checked, constants=dict(constants))


@functools.cache
def _record(checkout: Path, name: str) -> np.dtype[Any]:
    found = re.search(rf"struct ds4_metal_(?:args_)?{name} \{{(.*?)\}};", source(checkout), re.DOTALL)
    assert found, name
    fields: list[tuple[str, str, tuple[int, ...]]] = []
    for declared in re.sub(r"//.*|/\*.*?\*/", "", found[1]).split(";")[:-1]:
        kind, _, members = declared.strip().partition(" ")
        for member in members.split(","):
            field, extent = re.fullmatch(r"\s*(\w+)\s*(?:\[(\d+)\])?", member).groups()  # type: ignore[union-attr]
            fields.append((field, _C[kind], (int(extent),) if extent else ()))
    return np.dtype(fields, align=True)


def kargs(checkout: Path, name: str, **fields: object) -> bytes:
    """The bytes of struct ds4_metal_args_NAME; what this version of it lacks is left out."""
    made = np.zeros((), _record(checkout, name))
    for field, value in fields.items():
        if made.dtype.names and field in made.dtype.names:
            made[field] = value
    return made.tobytes()


def launch(
    checkout: Path, name: str, checked: bool, buffers: dict[int, object], *, out: tuple[int, ...],
    constants: dict[str, object] | None = None, memory: int = 0, **shape: Any,
) -> Run:  # fmt: skip
    """One dispatch, with threadgroup(0) of `memory` bytes if there are any."""
    kernel = library(checkout, checked, tuple((constants or {}).items()))[name]
    return kernel.launch(buffers, outputs=out, timeout=120, threadgroup_memory={0: memory} if memory else None, **shape)


def run(checkout: Path, name: str, checked: bool, buffers: dict[int, object], **options: Any) -> None:
    """One dispatch without a fault."""
    faults = launch(checkout, name, checked, buffers, **options).faults
    assert not faults, "\n".join(fault.message for fault in faults)
