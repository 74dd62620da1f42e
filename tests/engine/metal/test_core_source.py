"""Reading Metal source: kernels, host names, parameters, function constants, and what the C++ compiler gets to see."""

import re
from pathlib import Path

import pytest

from engine.metal import parameters, rewrite, source
from engine.metal.errors import CompileError, MetalError
from engine.metal.library import compile

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"


def cpp(text: str, *, values: dict[str, str] | None = None) -> str:
    """The rewritten C++ of Metal text without any kernel registered, white space squeezed."""
    return re.sub(r"\s+", " ", rewrite.rewrite(source.read(text), [], values or {}).text)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("kernel void a(device int* p) {}", ["a"]),
        ("[[kernel]] void a(device int* p) {}", ["a"]),
        ('[[host_name("x.y")]] kernel void a(device int* p) {}', ["x.y"]),
        ('kernel void a [[host_name("x" "_y")]] (device int* p) {}', ["x_y"]),
        ("namespace n { namespace m { kernel void a(device int* p) {} } }", ["n::m::a"]),
        ('extern "C" { kernel void a(device int* p) {} }', ["a"]),
        ("kernel void a(device int* p);\nkernel void a(device int* p) {}", ["a"]),
        ("template <typename T> kernel void a(device T* p) {}", []),
        (
            "template <typename T> kernel void a(device T* p) {}\n"
            'template [[host_name("a_f")]] kernel void a<float>(device float*);\n'
            'template [[host_name("a_h")]] [[kernel]] void a<half>(device half*);',
            ["a_f", "a_h"],
        ),
        (
            "template <typename T, int N> [[kernel]] void a(device T* p) {}\ntypedef decltype(a<float, 1>) a_t;\n"
            'template [[host_name("a1")]] kernel a_t a<float, 1>;\n'
            'template [[host_name("a2")]] [[kernel]] decltype(a<vec<float, 4>, (2 > 1)>) a<vec<float, 4>, (2 > 1)>;',
            ["a1", "a2"],
        ),
        ("struct S { int kernel_size; void kernel_like() {} }; void helper(device int* p) {}", []),
        ("struct S { S() : a{1}, b{2} {} int a, b; } s; kernel void a(device int* p) { int x{1}; }", ["a"]),
        ("constant int t[2] = {1, 2}; enum E { A, B }; kernel void a(device int* p) {}", ["a"]),
    ],
)
def test_kernels_are_found_under_their_host_names(text: str, names: list[str]) -> None:
    assert list(source.read(text).kernels) == names


def test_macros_make_instantiations(tmp_path: Path) -> None:
    text = HEAD + (
        "template <typename T> [[kernel]] void f(device T* p [[buffer(0)]]) {}\n"
        '#define make(name, T) template [[host_name("f_" #name)]] [[kernel]] decltype(f<T>) f<T>;\n'
        "make(float, float) make(half, half)\n"
    )
    assert compile(text).kernels == ["f_float", "f_half"]
    path = tmp_path / "two.metal"
    path.write_text('#include "one.h"\n#if WANTED == 3\nkernel void two(device int* p) {}\n#endif\n')
    (tmp_path / "one.h").write_text("kernel void one(device int* p) {}\n")
    assert compile(path, defines={"WANTED": 3}).kernels == ["one", "two"]
    assert compile(str(path)).kernels == ["one"]


def test_parameters_have_kinds_spaces_and_indices() -> None:
    text = (
        "constexpr constant int K = 4;\nstruct args { int n; };\n"
        "kernel void f(constant args & a, device float *b [[buffer(0)]], device atomic_uint* c[[buffer(K + 1)]],\n"
        "  threadgroup half * d [[threadgroup(1)]], threadgroup float* e, device packed_float3* g,\n"
        "  ushort lane [[thread_index_in_simdgroup]], uint3 at [[thread_position_in_grid]],\n"
        "  uint w [[thread_execution_width]]) {}"
    )
    read = source.read(text)
    found = parameters.parameters(read, read.kernels["f"])
    assert [(p.name, p.kind, p.index, p.address_space, p.attribute) for p in found] == [
        ("a", "buffer", 1, "constant", None),  # lowest index that nobody asks for
        ("b", "buffer", 0, "device", None),
        ("c", "buffer", 5, "device", None),
        ("d", "threadgroup", 1, "threadgroup", None),
        ("e", "threadgroup", 0, "threadgroup", None),
        ("g", "buffer", 2, "device", None),
        ("lane", "builtin", None, None, "thread_index_in_simdgroup"),
        ("at", "builtin", None, None, "thread_position_in_grid"),
        ("w", "builtin", None, None, "threads_per_simdgroup"),
    ]
    assert found[0].type_text == "constant args &"


@pytest.mark.parametrize(
    ("parameter", "construct"),
    [
        ("texture2d<float> t [[texture(0)]]", "[[texture]]"),
        ("sampler s [[sampler(0)]]", "[[sampler]]"),
        ("uint x [[render_target_array_index]]", "[[render_target_array_index]]"),
        ("texture2d<float> t", "texture2d"),
        ("device int* p [[buffer(31)]]", "buffer(31)"),
        ("device int* p [[buffer(sizeof(int))]]", "sizeof"),
    ],
)
def test_parameters_that_the_host_lacks_are_named_with_their_line(parameter: str, construct: str) -> None:
    read = source.read(f'# 7 "user.metal"\nkernel void f(device int* out,\n  {parameter}) {{}}')
    with pytest.raises(CompileError, match=re.escape(construct)) as raised:
        parameters.parameters(read, read.kernels["f"])
    assert raised.value.file == "user.metal"
    assert raised.value.line in (7, 8)


@pytest.mark.parametrize(
    ("metal", "expected"),
    [
        ("1.0", "1.0f"), ("1.", "1.f"), (".5", ".5f"), ("1e-3", "1e-3f"), ("2.0f", "2.0f"), ("1.h", "(half(1.))"),
        ("2h", "(half(2.0))"), ("1.5bf", "(bfloat(1.5f))"), ("1e2h", "(half(1e2))"), ("0xbf", "0xbf"),
        ("0x1p3", "0x1p3f"),
        ("12u", "12u"), ("0x12eUL", "0x12eUL"), ("1'000", "1'000"),
    ],
)  # fmt: skip
def test_literals_get_metals_types(metal: str, expected: str) -> None:
    assert f"= {expected};" in cpp(f"int x = {metal};")


@pytest.mark.parametrize(
    ("metal", "expected"),
    [
        ("void f(device int* a, thread float& b, constant T* c);", "void f( int* a, float& b, const T* c);"),
        ("void f(const constant int& a);", "void f(const int& a);"),
        ("struct S { int g() const thread { return 1; } };", "int g() const { return 1; }"),
        ("struct S { int g() const constant { return 1; } };", "int g() const { return 1; }"),
        ("[[maybe_unused]] int a; int b[2][3];", " int a; int b[2][3];"),
        ("#pragma unroll(4)\nint a;", " int a;"),
        ("struct S { static const constant float x = 1; };", "static const constexpr float x = 1;"),
    ],
)
def test_address_spaces_attributes_and_pragmas_vanish(metal: str, expected: str) -> None:
    assert expected.strip() in cpp(metal)


def test_overloads_that_differ_by_address_space_only_are_kept_once() -> None:
    text = cpp(
        "template <typename T> T f(device T* p, int n) { device T* r = p; return r[n]; }\n"
        "template <typename T> T f(threadgroup T* q, int m) { threadgroup T* r = q; return r[m]; }\n"
        "template <typename T> T f(constant T* p, int n) { return p[2]; }\n"
        "template <typename T> T f(device T* p, float n) { return p[3]; }\n"
        "template <typename T> enable_if_t<A> g(device T* p) { 4; }\n"
        "template <typename T> enable_if_t<B> g(device T* p) { 5; }\n"
        "struct S { S(int a) thread : x(a) {6;} S(int b) constant : x(b) {6;}\n"
        "  void s(device S& o) {o;} void s(thread S& n) {n;} };\n"
        "template <typename T> struct P<device T*> { int a = 10; };\n"
        "template <typename T> struct P<thread T*> { int b = 11; };"
    )
    for kept in ("r[n]", "p[2]", "p[3]", "4;", "5;", "6;", "o;", "a = 10"):
        assert text.count(kept) == 1, kept
    for dropped in ("r[m]", "n;}", "b = 11"):
        assert dropped not in text


def test_threadgroup_variables_become_shared_storage_and_pointers_stay() -> None:
    text = cpp(
        "void f() { threadgroup float a[4][N > 1 ? 2 : 3], b; threadgroup vec<int, 4> c[2];\n"
        "  threadgroup float* p = &b;\n  for (int i = 0; i < 2; i++) { threadgroup alignas(16) uchar d[8]; } }"
    )
    assert "auto& a = ::rt::threadgroup_variable<float[(4)][(N > 1 ? 2 : 3)]>(rt_site_0)" in text
    assert "auto& b = ::rt::threadgroup_variable<float>(rt_site_1)" in text
    assert re.search(r"auto& c = ::rt::threadgroup_variable<vec ?< ?int ?, ?4 ?>\[\(2\)\]>\(rt_site_2\)", text)
    assert "uchar[(8)], (16)>(rt_site_3)" in text
    assert re.search(r" float\* p = &b;", text)


def test_a_threadgroup_variable_with_an_initialiser_is_refused() -> None:
    with pytest.raises(CompileError, match="'x' can't have an initialiser") as raised:
        cpp('# 3 "k.metal"\nvoid f() {\n threadgroup int x = 1; }')
    assert (raised.value.file, raised.value.line) == ("k.metal", 4)


CONSTANTS = (
    "constant bool fast [[function_constant(3)]];\nconstant int width [[function_constant(4)]];\n"
    "constant int safe_width = is_function_constant_defined(width) ? width : 8;\n"
    "kernel void guarded(device int* p) { p[0] = safe_width; }\n"
    "int helper() { return width; }\nkernel void plain(device int* p) { p[0] = helper(); }\n"
    "kernel void neither(device int* p) { p[0] = 1; }\n"
)


def test_function_constants_get_values_and_missing_ones_are_named() -> None:
    read = source.read(CONSTANTS)
    text = re.sub(r"\s+", " ", rewrite.rewrite(read, [read.kernels["plain"]], {"width": "5"}).text)
    assert "static constexpr int width = int(5);" in text
    assert "safe_width = true ? width : 8" in text
    assert "false ? width : 8" in cpp(CONSTANTS)
    for name in ("guarded", "neither"):
        rewrite.rewrite(read, [read.kernels[name]], {})
    with pytest.raises(MetalError, match=r"plain reads the function constant 'width' \(index 4\)"):
        rewrite.rewrite(read, [read.kernels["plain"]], {})


def test_unknown_function_constants_and_kernels_are_refused() -> None:
    with pytest.raises(MetalError, match="no function constant 9; it has 3 fast, 4 width"):
        compile(CONSTANTS, constants={9: 1})
    with pytest.raises(MetalError, match="no function constant 'wide'"):
        compile(CONSTANTS, constants={"wide": 1})
    with pytest.raises(MetalError, match="no kernel is named 'plane'; there are plain"):
        compile(CONSTANTS)["plane"]


def test_line_markers_survive_rewriting() -> None:
    text = '# 10 "a.metal"\nvoid f() {\n  threadgroup float a\n    [4];\n}\n# 30 "b.h"\nint x = 1.0;\n'
    lines = rewrite.rewrite(source.read(text), [], {}).text.split("\n")
    assert lines.index('# 30 "b.h"') == 5
    assert lines[6] == "int x = 1.0f;"


def test_preprocessor_errors_name_the_users_line(tmp_path: Path) -> None:
    path = tmp_path / "k.metal"
    path.write_text('#include <metal_stdlib>\n#include "nowhere.h"\n')
    with pytest.raises(CompileError, match=r"nowhere\.h") as raised:
        compile(path)
    assert (raised.value.file, raised.value.line) == (str(path), 2)
    with pytest.raises(CompileError) as raised:
        compile("#include <metal_stdlib>\n\n#error no\n")
    assert (raised.value.file, raised.value.line) == ("program_source", 3)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "the source has no kernel: no function in it is marked `kernel`"),
        ("  // nothing yet\n", "no function in it is marked `kernel`"),
        ("float half_of(float x) { return x / 2; }", "no function in it is marked `kernel`"),
        ("#if 0\nkernel void k(device int * p) {}\n#endif\n", "as far as its #if let the compiler see"),
        (
            "template <typename T> kernel void f(device T * p) {}",
            r"the template f is never instantiated, as `template \[\[",
        ),
    ],
)
def test_a_source_without_any_kernel_is_refused(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=told):
        compile(text)
    path = tmp_path / "none.metal"
    path.write_text(text)
    with pytest.raises(CompileError, match=r"none\.metal has no kernel: "):
        compile(path)


def test_what_the_refusal_of_a_template_says_would_do_it_does_it() -> None:
    text = "template <typename T> kernel void f(device T * p) {}\n"
    with pytest.raises(CompileError) as error:
        compile(text)
    line = str(error.value).split("`")[1]
    assert compile(text + line).kernels == ["f_float"]
