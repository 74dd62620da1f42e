"""Swizzles as values and as targets: chained, deduced by templates, in conditions, kept by `auto`."""

from __future__ import annotations

import re

import numpy as np
import pytest

from engine.metal import rewrite, source
from engine.metal.errors import CompileError
from engine.metal.library import compile

SOURCE = """
#include <metal_stdlib>
using namespace metal;
struct Box { float2 ab; float4 v; };
template <typename T> vec<T, 2> twice(vec<T, 2> v) { return v + v; }
template <typename T, int N> T total(vec<T, N> v) { T s = 0; for (int i = 0; i < N; ++i) s += v[i]; return s; }
template <typename V> void dependent(V a, V b, device float* o) {
  auto k = a.zyx;
  a.xyz.zx = b.xy;
  o[0] = k.xz.y, o[1] = a.z, o[2] = a.x, o[3] = (a.xy + b.zw).y;
}
kernel void reads(device const float4* in, device float* o, constant bool& first) {
  const float4 a = in[0], b = in[1];
  const packed_float3 p = packed_float3(a.xyz);
  o[0] = a.zw.x, o[1] = twice(a.yx).x, o[2] = total(b.xyz), o[3] = (first ? a.xy : b.zw).y;
  auto kept = b.wzyx;
  o[4] = kept.yx.x + kept.w, o[5] = total(p.zy), o[6] = total(select(a.xy, b.xy, a.xy < b.xy));
  o[7] = in->wz.y, o[8] = max(half2(a.xy).yx, 1.5h).y, o[9] = sizeof(a.xyz), o[10] = a.rgb.bg.g;
  dependent(a, b, o + 11);
}
kernel void writes(device float4* v, device uint4* u) {
  v[0].zw.y = 9, v[0].xy = v[0].yx, ++v[0].xy, v[0].zw++;
  v[1].zw += v[0].xy, (v[1].xy) = 0, v[1].rgb.bg.y = 7;
  thread float4* p = new_thread_address(v[2]);
  p->xy = p->zw, v[2] = *p;
  u[0].xy >>= 1, u[0].zw <<= u[0].xy, u[0].yz[0] = 77;
  Box box;
  box.ab = v[0].xy, box.ab.x = 3, box.v = float4(box.ab.yx, box.ab);
  v[3] = box.v;
}
"""
# Metal has no address of a swizzle; a copy of a vector has one.
SOURCE = SOURCE.replace("thread float4* p = new_thread_address(v[2]);", "float4 copy = v[2]; thread float4* p = &copy;")


@pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
def test_swizzles_of_swizzles_read_and_written(checked: bool) -> None:
    library = compile(SOURCE, checked=checked)
    library.build(library.kernels)
    data, out = np.arange(1, 9, dtype=np.float32).reshape(2, 4), np.zeros(15, np.float32)
    run = library["reads"].launch({0: data, 1: out, 2: np.bool_(True)}, threadgroups=1, threads=1)
    assert run.faults == ()
    assert out.tolist() == [3, 4, 18, 2, 12, 5, 11, 3, 1.5, 16, 2, 1, 5, 6, 10]

    v, u = np.arange(1, 17, dtype=np.float32).reshape(4, 4), np.array([1, 2, 3, 4], np.uint32)
    run = library["writes"].launch({0: v, 1: u}, threadgroups=1, threads=1)
    assert run.faults == ()
    assert v.tolist() == [[3, 2, 4, 10], [0, 7, 10, 10], [11, 12, 11, 12], [2, 3, 3, 2]]
    assert u.tolist() == [0, 77, 3, 8]


def cpp(text: str) -> str:
    return re.sub(r"\s+", " ", rewrite.rewrite(source.read(text), [], {}).text)


@pytest.mark.parametrize(
    ("metal", "expected"),
    [
        ("a.xy + b.w", "a.xy() + b.w"), ("a->zyx", "a->zyx()"), ("f(x)[2].rgb", "f(x)[2].rgb()"),
        ("a.xyz.zy", "a.xyz().zy()"),
        ("a.xy = b.zw", "a.xy = b.zw()"), ("a.xy == b.zw", "a.xy() == b.zw()"), ("a.zw.x += 1", "a.z += 1"),
        ("a.rgb.bg = b.xy", "a.zy = b.xy()"), ("a.xy[1] = 2", "a.xy[1] = 2"), ("++s.p[0].xy", "++s.p[0].xy"),
        ("(a.xy) = 1", "(a.xy) = 1"), ("f(a.xy)", "f(a.xy())"), ("a.xy >= b.xy", "a.xy() >= b.xy()"),
        ("a.xy >>= 1", "a.xy >>= 1"), ("a.xg", "a.xg"), ("a.xyzwx", "a.xyzwx"), ("xy(a)", "xy(a)"),
    ],
)  # fmt: skip
def test_a_swizzle_that_is_read_gives_a_vector(metal: str, expected: str) -> None:
    assert f"{{ {expected}; }}" in cpp(f"void f() {{ {metal}; }}")


def test_members_of_ones_own_are_no_swizzles() -> None:
    text = cpp("struct S { float2 xy; int bar; void f() { xy = 1; } }; void f(S s, float4 v) { s.xy.x; s.bar; v.zw; }")
    assert "s.xy.x; s.bar; v.zw(); }" in text


def test_a_component_that_a_swizzle_lacks_is_named_with_its_line() -> None:
    with pytest.raises(CompileError, match=r"`\.xy\.z`: a vector of 2 has no `z`") as raised:
        cpp('# 4 "k.metal"\nvoid f() {\n a.xy.z = 1; }')
    assert (raised.value.file, raised.value.line) == ("k.metal", 5)
