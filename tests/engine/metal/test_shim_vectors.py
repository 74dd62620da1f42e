"""Vectors, swizzles, conversions and matrices of the shim (checks in shim/vectors.cpp), and what must not compile."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from engine.metal.errors import CompileError
from tests.engine.metal.shim_module import load, source


def failing_lines(function: str) -> list[str]:
    text = source("vectors.cpp")
    lines = np.zeros(64, dtype=np.int32)
    count = getattr(load(text), function)(ctypes.c_void_p(lines.ctypes.data))
    return [text.splitlines()[line - 1].strip() for line in lines[: min(count, 64)]]


def test_vectors_swizzles_and_matrices() -> None:
    assert failing_lines("failures") == []


def test_a_failing_check_is_seen() -> None:
    assert failing_lines("checks_can_fail") == ["CHECK(same(float2(1, 2), float2(2, 1)));"]


@pytest.mark.parametrize(
    ("statement", "names"),
    [
        ("float4(1) + half4(1);", "invalid operands"),
        ("half4 h = float4(1);", "no viable conversion"),
        ("float4 v = float4(1, 2);", "no matching constructor|no matching conversion"),
        ("bfloat b = 1.0f;", "no viable conversion"),
        ("as_type<half>(1.0f);", "differ in size"),
        ("simdgroup_matrix<int, 8, 8> m;", "float, half or bfloat"),
        ("texture2d<float> t;", "texture2d"),
    ],
)
def test_what_metal_rejects_does_not_compile(statement: str, names: str) -> None:
    with pytest.raises(CompileError, match=names):
        load(f"EXPORT void f() {{ {statement} }}")
