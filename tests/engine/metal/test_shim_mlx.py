"""MLX's own kernel headers, unmodified, against the shim: they compile and compute what NumPy does."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx
import numpy as np
import pytest

from engine.metal import library

Array = np.ndarray[Any, Any]
INCLUDE = Path(next(iter(mlx.__path__))) / "include"
HEADERS = "mlx/backend/metal/kernels"
TYPES: dict[str, Any] = {"float": np.float32, "half": np.float16, "bfloat16_t": ml_dtypes.bfloat16}
# Half a unit in the last place of the output's type, on top of float32 arithmetic.
ROUNDING = {"float": 2.0**-20, "half": 2.0**-11, "bfloat16_t": 2.0**-8}

pytestmark = pytest.mark.skipif(not (INCLUDE / HEADERS).is_dir(), reason="this MLX has no Metal headers")


def build(
    folder: Path, headers: list[str], kernels: list[str], constants: dict[int | str, object] | None = None
) -> library.Library:
    """A library of MLX template instantiations: a kernel's host name is its `template<arguments>`."""
    lines = [f'#include "{HEADERS}/{header}"' for header in ("utils.h", *headers)]
    lines = ["#include <metal_stdlib>", "using namespace metal;", *lines]
    for kernel in kernels:
        name, arguments = kernel[:-1].split("<", 1)
        lines.append(f'instantiate_kernel("{kernel}", {name}, {arguments})')
    path = folder / "kernels.metal"
    path.write_text("\n".join(lines) + "\n")
    return library.compile(path, include_dirs=[INCLUDE], constants=constants or {})


def as_buffer(array: Array) -> Array:
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


@pytest.mark.parametrize("name", TYPES)
def test_softmax(name: str, tmp_path: Path) -> None:
    kernel = f"softmax_single_row<{name}, float>"
    rows, width = 3, 203
    x = (np.random.default_rng(10).standard_normal((rows, width)) * 4).astype(TYPES[name])
    out = np.zeros_like(x)
    run = build(tmp_path, ["softmax.h"], [kernel])[kernel].launch(
        {0: as_buffer(x), 1: as_buffer(out), 2: np.int32(width)}, threadgroups=(rows, 1, 1), threads=(64, 1, 1)
    )
    assert run.faults == ()
    wide = np.exp(x.astype(np.float64) - x.astype(np.float64).max(1, keepdims=True))
    expected = wide / wide.sum(1, keepdims=True)
    assert np.all(np.abs(out.astype(np.float64) - expected) <= ROUNDING[name] * expected + 2.0**-25)


@pytest.mark.parametrize("name", TYPES)
def test_steel_gemm_by_fragments(name: str, tmp_path: Path) -> None:
    kernel = f"gemm<{name}, 32, 32, 16, 2, 2, false, true>"
    m, n, k = 40, 48, 72  # m, n and k all end inside a tile
    constants: dict[int | str, object] = {"has_batch": False, "use_out_source": False, "do_axpby": False}
    constants |= {"align_M": False, "align_N": False, "align_K": False}
    rng = np.random.default_rng(11)
    a, b = (rng.standard_normal(shape).astype(TYPES[name]) for shape in ((m, k), (n, k)))
    out = np.zeros((m, n), TYPES[name])
    # GEMMParams of steel/gemm/params.h.
    tiles = (-(-n // 32), -(-m // 32))
    params = struct.pack("8i3q3i4x", m, n, k, k, k, n, *tiles, 0, 0, 0, 0, k // 16, 0)
    made = build(tmp_path, ["steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"], [kernel], constants)
    run = made[kernel].launch(
        {0: as_buffer(a), 1: as_buffer(b), 3: as_buffer(out), 4: params}, threadgroups=(*tiles, 1), threads=(32, 2, 2)
    )
    assert run.faults == ()
    left, right = a.astype(np.float64), b.astype(np.float64)
    expected = left @ right.T
    allowed = ROUNDING[name] * np.abs(expected) + 2.0**-20 * (np.abs(left) @ np.abs(right.T))
    assert np.all(np.abs(out.astype(np.float64) - expected) <= allowed)


ATTENTION: dict[int | str, object] = dict.fromkeys(
    ("has_mask", "query_transposed", "do_causal", "bool_mask", "float_mask", "has_sinks"), True
)
FAMILIES: list[tuple[list[str], list[str], dict[int | str, object]]] = [
    (["sdpa_vector.h"], [f"sdpa_vector<{t}, 64, 64>" for t in TYPES], ATTENTION | {"blocks": 4}),
    (
        ["steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"],
        ["affine_qmv_fast<bfloat16_t, 64, 4, false>", "affine_qmm_t<half, 64, 4, true, false>"],
        {},
    ),
    (["binary_ops.h", "scan.h"], ["contiguous_scan<half, half, CumMax<half>, 4, true, false>"], {}),
    (["sort.h"], ["block_sort<bfloat16_t, bfloat16_t, false, 128, 4>"], {}),
    (["unary_ops.h", "unary.h"], [f"unary_v<bfloat16_t, bfloat16_t, {f}>" for f in ("Erf", "Log1p", "Sigmoid")], {}),
    (["unary_ops.h", "unary.h"], ["unary_v<complex64_t, complex64_t, Exp>"], {}),
    (["atomic.h", "reduction/ops.h", "reduce.h"], ["all_reduce<half, float, Sum<float>>"], {}),
]


@pytest.mark.parametrize(("headers", "kernels", "constants"), FAMILIES)
def test_every_family_compiles(
    headers: list[str], kernels: list[str], constants: dict[int | str, object], tmp_path: Path
) -> None:
    made = build(tmp_path, headers, kernels, constants)
    assert sorted(made.kernels) == sorted(kernels)
    assert [kernel.name for kernel in made.build(made.kernels)] == made.kernels
