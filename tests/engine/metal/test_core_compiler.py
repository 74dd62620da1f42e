"""Which compiler is asked, and that its answer is its own: ASSAY_CXX."""

import ctypes
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.metal import compiler
from engine.metal.errors import MetalError
from engine.metal.library import compile

TEXT = "kernel void f(device int* p) { p[0] = 41; }"
ZIG = shlex.join([sys.executable, "-m", "ziglang", "c++"])


def pretender(folder: Path, name: str, says: str) -> str:
    """A compiler that answers the question for its version and can do nothing else."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {shlex.quote(says)}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ("/nowhere/clang++", r"the compiler /nowhere/clang\+\+ does not start"),
        ("  ", "ASSAY_CXX='  ' names no compiler"),
        ("clang++ 'half", "is no command line: No closing quotation"),
        ("false", "ASSAY_CXX='false' is no clang: kernels need clang"),
        ("echo", "ASSAY_CXX='echo' is no clang"),
    ],
)
def test_nonsense_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, own: str, message: str) -> None:
    monkeypatch.setenv("ASSAY_CXX", own)
    with pytest.raises(MetalError, match=message) as refused:
        compile(TEXT)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ('answer __clang_major__ __apple_build_version__ "13.2.0"', "is no clang: kernels need"),
        ('answer 15 __apple_build_version__ "15.0.7 (abc)"', r"is clang 15.0.7 \(abc\): kernels need clang\+\+ 16"),
        ('answer 14 14000029 "14.0.0 (clang-1400.0.29)"', r"is clang 14.0.0 \(clang-1400.0.29\): kernels need"),
        ('answer 16 __apple_build_version__ "16.0.6"', ""),
        ('answer 15 15000040 "15.0.0 (clang-1500.0.40)"', ""),
    ],
)
def test_clang_before_16_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, says: str, message: str) -> None:
    monkeypatch.setenv("ASSAY_CXX", pretender(tmp_path, "clang++", says))
    # Preprocessing goes through with a clang that is new enough: what the pretender prints is the text then.
    with pytest.raises(MetalError, match=message or "the source has no kernel"):
        compile(TEXT)


def test_it_is_read_at_every_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSAY_CXX", raising=False)
    library = compile(TEXT)
    monkeypatch.setenv("ASSAY_CXX", "/nowhere/clang++")
    with pytest.raises(MetalError, match="does not start"):
        compile(TEXT)
    with pytest.raises(MetalError, match="does not start"):
        library["f"]
    monkeypatch.setenv("ASSAY_CXX", "")
    p = np.zeros(1, np.int32)
    library["f"].launch({0: p}, threads=1, threadgroups=1)
    assert p[0] == 41


def test_each_compiler_has_libraries_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys = set()
    for own in ("", ZIG, ZIG + " -DNOTHING", *(pretender(tmp_path, n, 'answer 18 x "18.1"') for n in ("one", "two"))):
        monkeypatch.setenv("ASSAY_CXX", own)
        keys.add(compiler._key("text"))
        assert compiler._key("text") in keys
    assert len(keys) == 5


def test_a_clang_of_ones_own_runs_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_CXX", ZIG)
    p = np.zeros(1, np.int32)
    compile(TEXT)["f"].launch({0: p}, threads=1, threadgroups=1)
    assert p[0] == 41


def test_char_is_signed_wherever_the_compiler_has_it_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_CXX", ZIG + " -funsigned-char")
    exported = 'extern "C" __attribute__((visibility("default")))'
    text = f"using namespace metal;\n{exported} int f(int bits) {{ return char(bits); }}\n"
    function = ctypes.CDLL(str(compiler.module(text, checked=False))).f
    assert function(255) == -1
