"""C++ that includes the metal_stdlib shim, compiled with the flags of kernels and called through ctypes.

For functions that need no simdgroup: kernels test the rest. Arrays are passed as pointers, unchecked.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np

from engine.metal import compiler

_PREFIX = """using namespace metal;
#define EXPORT extern "C" __attribute__((visibility("default")))
#line 1 "test.cpp"
"""


@functools.cache
def load(text: str) -> ctypes.CDLL:
    """The compiled module of a test's C++ text; `EXPORT` marks what can be called."""
    return ctypes.CDLL(str(compiler.module(_PREFIX + text, checked=False)))


def source(name: str) -> str:
    """The text of a C++ file beside the tests."""
    return (Path(__file__).parent / "shim" / name).read_text()


def call(module: ctypes.CDLL, name: str, *arguments: np.ndarray[Any, Any] | int) -> None:
    """Call a void function with arrays (as pointers) and integers (as size_t)."""
    function = getattr(module, name)
    function.restype = None
    function(*(ctypes.c_size_t(a) if isinstance(a, int) else ctypes.c_void_p(a.ctypes.data) for a in arguments))
