"""Libraries that hold more than compute kernels on buffers: what is left out, and what is refused, where and why."""

from __future__ import annotations

import numpy as np
import pytest

from engine.metal.errors import CompileError
from engine.metal.library import compile

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
MIXED = (
    HEAD
    + """
struct Vertex { float4 position [[position]]; float2 uv; };
struct Material { texture2d<float> map; float shine; };
constexpr sampler linear(filter::linear, address::clamp_to_edge);
vertex Vertex corner(uint i [[vertex_id]], constant float4* places [[buffer(0)]]) {
  Vertex v; v.position = places[i]; return v;
}
fragment float4 shade(Vertex v [[stage_in]], texture2d<float> map [[texture(0)]]) { return map.sample(linear, v.uv); }
[[fragment]] float4 plain(Vertex v [[stage_in]]) { return v.position; }
float4 sampled(texture2d<float, access::sample> t, float2 at) { return t.sample(linear, at); }
float shininess(thread Material& m) { return m.shine; }
kernel void blur(texture2d<float, access::read> from [[texture(0)]], device float4* out [[buffer(0)]]) {
  out[0] = from.read(uint2(0));
}
float4 indirectly(device float4* out);
kernel void through(device float4* out) { out[0] = indirectly(out); }
float4 indirectly(device float4* out) { return sampled(out[0], 0); }
kernel void twice(device float* x, uint i [[thread_position_in_grid]]) { int sampler = 2; x[i] *= sampler; }
"""
)


def test_compute_kernels_beside_graphics_run() -> None:
    library = compile(MIXED)
    assert library.kernels == ["blur", "through", "twice"]
    x = np.arange(4, dtype=np.float32)
    assert library["twice"].launch({0: x}, threadgroups=1, threads=4).faults == ()
    assert x.tolist() == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("kernel", "message", "line"),
    [("blur", "blur uses `texture2d`", 14), ("through", "through uses `texture2d` through sampled", 12)],
)
def test_a_kernel_that_needs_a_texture_is_refused_at_its_line(kernel: str, message: str, line: int) -> None:
    with pytest.raises(CompileError, match=message) as raised:
        compile(MIXED)[kernel]
    assert raised.value.line == line


@pytest.mark.parametrize(
    "parameter",
    [
        "sampler s [[sampler(0)]]",
        "visible_function_table<int(int)> t [[buffer(1)]]",
        "instance_acceleration_structure s [[buffer(1)]]",
        "imageblock<int> b",
        "tensor<device half, dextents<int, 2>> t [[buffer(1)]]",
    ],
)
def test_types_without_a_place_on_the_host_are_named(parameter: str) -> None:
    name = parameter.split("<")[0].split(" ")[0]
    with pytest.raises(CompileError, match=f"k uses `{name}`: it is not supported on the host") as raised:
        compile(f"{HEAD}kernel void k(device int* o,\n  {parameter}) {{}}")["k"]
    assert raised.value.line == 4


@pytest.mark.parametrize(
    "members", ["device float* x; int n;", "int n; constant float& x [[id(1)]];", "array<device float*, 4> x;"]
)
def test_argument_buffers_are_refused_with_the_member(members: str) -> None:
    text = f"{HEAD}struct Inner {{ {members} }};\nstruct Outer {{ int n; Inner inner; }};\n"
    with pytest.raises(CompileError, match=r"'a' of k holds the pointer `.*x.*argument buffers") as raised:
        compile(text + "kernel void k(constant Outer& a, device float* o) {}")["k"]
    assert raised.value.line == 5


def test_structs_without_pointers_are_none() -> None:
    text = HEAD + "struct P { int n; static constant int m = 2 * 3; float f(constant P* p) { return p->n; } };\n"
    made = compile(text + "kernel void k(constant P& a, device float* o) { o[0] = a.n; }")
    assert [p.kind for p in made["k"].parameters] == ["buffer", "buffer"]
