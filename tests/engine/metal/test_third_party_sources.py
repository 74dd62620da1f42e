"""llama.cpp's own Metal sources: every kernel compiles, and a choice of them computes what NumPy does, checked and not.

They are not part of the repository: ASSAY_THIRD_PARTY names a folder of unpacked packages that hold them (llama.rn and
whisper.rn from npm, llama-cpp-python's source distribution from PyPI; docs/metal-executor.md says which were tried).
Without it these tests are skipped. Arguments and dispatches are those of ggml-metal-ops.cpp.
"""

from __future__ import annotations

import functools
import os
import re
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from engine.metal.library import Library, compile

Array = np.ndarray[Any, Any]
FOLDER = os.environ.get("ASSAY_THIRD_PARTY", "")
HEADER = "ggml-metal-impl.h"
PACKAGES = sorted(p for p in Path(FOLDER).iterdir() if any(p.rglob(HEADER))) if FOLDER else []
MODES = pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"])
pytestmark = [
    pytest.mark.skipif(not PACKAGES, reason="ASSAY_THIRD_PARTY names no folder with llama.cpp's sources"),
    pytest.mark.parametrize("package", PACKAGES, ids=[p.name for p in PACKAGES]),
]
_C = {"int8_t": "i1", "int16_t": "i2", "int": "i4", "int32_t": "i4", "int64_t": "i8", "uint32_t": "u4",
      "uint64_t": "u8", "size_t": "u8", "float": "f4", "bool": "?"}  # fmt: skip
# Values that some host gives, by the end of the constant's name; 1 (or true) for the others.
_VALUES = {"nsg": 2, "nxpsg": 8, "ncpsg": 32, "nqptg": 8, "ns10": 128, "ns20": 128, "nwg": 4, "NWG": 4, "DV": 128,
           "ne20": 128, "tri_n": 16, "tri_k": 8}  # fmt: skip


def opened(path: Path, checked: bool, constants: dict[int | str, object] | None = None) -> Library:
    folders = [path.parent, *path.parents[1:3], path.parents[2] / "include"]
    defines = {f"{prefix}GGML_METAL_HAS_BF16": 1 for prefix in ("", "LM_", "WSP_")}
    return compile(path, checked=checked, include_dirs=folders, defines=defines, constants=constants or {})


def header(path: Path) -> Path | None:
    """The header of argument structs beside a Metal source or, where kernels have a folder, above it."""
    return next((h for h in (path.parent / HEADER, path.parents[1] / HEADER) if h.is_file()), None)


@functools.cache
def kernels(package: Path) -> dict[str, Path]:
    """Which file of a package holds a kernel."""
    sources = [path for path in sorted(package.rglob("*.metal")) if header(path)]
    return {name: path for path in sources for name in opened(path, False).kernels}


@functools.cache
def library(path: Path, checked: bool, constants: tuple[tuple[int, object], ...]) -> Library:
    return opened(path, checked, dict(constants))


@functools.cache
def records(package: Path) -> dict[str, np.dtype[Any]]:
    """The argument structs of ggml-metal-impl.h by name, without the prefix."""
    found_at = header(next(iter(kernels(package).values())))
    assert found_at is not None
    text = found_at.read_text()
    found = {}
    for body, name in re.findall(r"typedef struct\s*\{(.*?)\}\s*(\w+);", text, re.DOTALL):
        fields = re.findall(r"^\s*(\w+)\s+(\w+)(?:\[(\d+)\])?;", body, re.MULTILINE)
        plain = [(n, _C[t], (int(extent),)) if extent else (n, _C[t]) for t, n, extent in fields if t in _C]
        if len(plain) == len(fields):
            found[name.partition("kargs_")[2]] = np.dtype(plain, align=True)
    return found


def kargs(package: Path, name: str, **fields: object) -> bytes:
    made = np.zeros((), records(package)[name])
    for field, value in fields.items():
        made[field] = value
    return made.tobytes()


def launch(
    package: Path, name: str, checked: bool, buffers: dict[int, object], *, out: int, smem: int = 0,
    constants: dict[int, object] | None = None, **shape: Any,
) -> None:  # fmt: skip
    """Run a kernel whose only output is buffer `out`, with threadgroup(0) of `smem` bytes if it has one. No faults."""
    kernel = library(kernels(package)[name], checked, tuple((constants or {}).items()))[name]
    memory = {p.index: smem for p in kernel.parameters if p.kind == "threadgroup" and p.index is not None}
    run = kernel.launch(buffers, threadgroup_memory=memory, outputs=(out,), timeout=60, **shape)
    assert [fault.message for fault in run.faults] == []


def strides(prefix: str, array: Array) -> dict[str, int]:
    return {f"nb{prefix}{i}": array.strides[3 - i] for i in range(1, 4)}


def blocks(rng: np.random.Generator, rows: int, columns: int, name: str) -> tuple[Array, Array]:
    """Random rows in ggml's format, whose scales are small, and their values."""
    kind = gguf.GGMLQuantizationType[name]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    made = rng.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
    for at in {"Q4_K": (0, 2), "Q2_K": (80, 82), "Q6_K": (208,)}.get(name, (0,)):
        made[:, :, at : at + 2] = rng.uniform(0.01, 0.1, (*made.shape[:2], 1)).astype(np.float16).view(np.uint8)
    raw = made.reshape(rows, -1)
    return raw, gguf.dequantize(raw, kind)


@MODES
def test_every_kernel_compiles(package: Path, checked: bool) -> None:
    for path in sorted(set(kernels(package).values())):
        scanned = opened(path, checked)._source.constants
        given: dict[int | str, object] = {
            name: next((v for end, v in _VALUES.items() if name.endswith(end)), 1) for name in scanned
        }
        made = opened(path, checked, given)
        began = time.monotonic()
        for first in range(0, len(made.kernels), 40):
            made.build(made.kernels[first : first + 40])
        print(f"{path.name}: {len(made.kernels)} kernels in {time.monotonic() - began:.0f} s")


@MODES
@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ4_NL"])
def test_rows_and_products_of_a_format(package: Path, checked: bool, name: str) -> None:
    rng, rows, columns, tokens = np.random.default_rng(1), 64, 256, 32
    raw, values = blocks(rng, rows, columns, name)
    lower, size = name.lower().replace("_k", "_K"), gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    ids, out = np.array([3, 0, 63, 63], np.int32), np.empty((4, columns), np.float32)
    args = kargs(
        package, "get_rows", ne00t=columns // 16, ne00=columns, nb01=raw.strides[0], ne10=4, nb10=4, nb1=out.strides[0]
    )
    launch(
        package,
        f"kernel_get_rows_{lower}",
        checked,
        {0: args, 1: raw, 2: ids, 3: out},
        out=3,
        threadgroups=4,
        threads=16,
    )
    np.testing.assert_allclose(out, values[ids], rtol=1e-6)

    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    product, expected = np.empty((tokens, rows), np.float32), x.astype(np.float64) @ values.T.astype(np.float64)
    args = kargs(
        package, "mul_mm", ne00=columns, ne02=1, nb01=raw.strides[0], ne12=1, nb10=4, nb11=x.strides[0],
        ne0=rows, ne1=tokens, r2=1, r3=1,
    )  # fmt: skip
    launch(
        package, f"kernel_mul_mm_{lower}_f32", checked, {0: args, 1: raw, 2: x, 3: product}, out=3, smem=6144,
        constants={700: False, 701: False, 702: 1, 703: 1, 704: 1, 705: 1}, threadgroups=(1, 1, 1), threads=(32, 4, 1),
    )  # fmt: skip
    # Both operands are staged as halves.
    assert np.all(np.abs(product - expected) <= 2.0**-10 * (np.abs(x) @ np.abs(values.T)) + 2.0**-20)

    groups = {"Q4_0": (4, 2), "Q8_0": (2, 4), "Q2_K": (4, 2), "IQ2_XXS": (4, 2)}.get(name, (2, 2))
    args = kargs(
        package, "mul_mv", ne00=columns, ne01=rows, ne02=1, nb00=size, nb01=raw.strides[0], ne10=columns, ne11=1,
        ne12=1, nb10=4, nb11=x.strides[0], ne0=rows, ne1=1, nr0=groups[0], r2=1, r3=1,
    )  # fmt: skip
    each = groups[0] * (1 if name == "Q8_0" else groups[1])
    one = np.empty(rows, np.float32)
    launch(
        package, f"kernel_mul_mv_{lower}_f32", checked, {0: args, 1: raw, 2: x, 3: one}, out=3, smem=2176,
        constants={600: groups[1], 602: 1, 603: 1, 604: 1}, threadgroups=rows // each, threads=(32, groups[1], 1),
    )  # fmt: skip
    assert np.all(np.abs(one - expected[0]) <= 2.0**-16 * (np.abs(x[0]) @ np.abs(values.T)))


@MODES
@pytest.mark.parametrize("width", [64, 203])
@pytest.mark.parametrize("masked", [False, True])
def test_softmax(package: Path, checked: bool, width: int, masked: bool) -> None:
    rng = np.random.default_rng(2)
    x, mask = rng.standard_normal((1, 2, 3, width)).astype(np.float32), np.zeros((1, 1, 3, width), np.float16)
    mask[0, 0, 1, width // 2 :] = -np.inf
    out = np.empty_like(x)
    args = kargs(
        package, "soft_max", ne00=width, ne01=3, ne02=2, ne11=3, ne12=1, ne13=1, scale=0.5, m0=1, m1=1, n_head_log2=2,
        **strides("0", x), **strides("1", mask), **strides("", out),
    )  # fmt: skip
    name, threads = ("kernel_soft_max_f16_4", 32) if width % 4 == 0 else ("kernel_soft_max_f16", 256)
    buffers: dict[int, object] = {0: args, 1: x, 2: mask if masked else x, 3: x, 4: out}
    launch(package, name, checked, buffers, out=4, smem=128, threadgroups=(3, 2, 1), threads=threads)
    scores = x.astype(np.float64) * 0.5 + (mask.astype(np.float64) if masked else 0)
    wide = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(out, wide / wide.sum(-1, keepdims=True), rtol=2e-5, atol=1e-8)


@MODES
@pytest.mark.parametrize("width", [80, 203])
def test_rms_norm_times_weight(package: Path, checked: bool, width: int) -> None:
    rng = np.random.default_rng(3)
    x, weight = (rng.standard_normal((1, 1, n, width)).astype(np.float32) for n in (3, 1))
    out, wide = np.empty_like(x), width // 4 if width % 4 == 0 else width
    args = kargs(
        package, "norm", ne00=width, ne00_t=wide, eps=1e-5, nef1=[3, 1, 1], nef2=[1, 1, 1], nef3=[1, 1, 1],
        nbf1=[4 * width] * 3, nbf2=[x.nbytes] * 3, nbf3=[x.nbytes] * 3, **strides("", out),
    )  # fmt: skip
    name = "kernel_rms_norm_mul_f32" + ("_4" if width % 4 == 0 else "")
    buffers: dict[int, object] = {0: args, 1: x, 2: weight, 3: x, 4: out}
    launch(package, name, checked, buffers, out=4, smem=128, threadgroups=3, threads=min(wide, 256))
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@MODES
def test_argsort(package: Path, checked: bool) -> None:
    x = np.random.default_rng(4).standard_normal((3, 50)).astype(np.float32)
    out = np.empty((3, 50), np.int32)
    args = kargs(
        package, "argsort", ne00=50, ne01=3, ne02=1, ne03=1, nb00=4, nb01=200, ne0=50, ne1=3, ne2=1, ne3=1, top_k=64
    )
    buffers: dict[int, object] = {0: args, 1: x, 2: out}
    launch(package, "kernel_argsort_f32_i32_desc", checked, buffers, out=2, smem=256, threadgroups=3, threads=64)
    assert np.array_equal(out, np.argsort(-x, -1))
