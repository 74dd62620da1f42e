"""MLX's own Metal kernels, unmodified and by path, on the host: right in both modes, and without a fault."""

import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from engine.metal.library import Kernel, compile

INCLUDES = [*Path(sys.prefix).glob("lib/python*/site-packages/mlx/include")]
KERNELS = "mlx/backend/metal/kernels/"
pytestmark = [
    pytest.mark.skipif(not INCLUDES, reason="mlx's Metal headers are not installed"),
    pytest.mark.parametrize("checked", [False, True], ids=["fast", "checked"]),
]
Floats = npt.NDArray[np.float64]


def kernels(
    headers: list[str], wanted: list[str], *, checked: bool, constants: Mapping[int | str, object] | None = None
) -> list[Kernel]:
    """Kernels of MLX templates; `wanted` are the arguments of its own instantiate_kernel macro, first of all a name."""
    text = "#include <metal_stdlib>\nusing namespace metal;\n"
    text += "".join(f'#include "{KERNELS}{header}"\n' for header in headers)
    text += "".join(f"instantiate_kernel({arguments})\n" for arguments in wanted)
    library = compile(text, include_dirs=INCLUDES, checked=checked, constants=constants)
    return library.build([arguments.split('"')[1] for arguments in wanted])


def softmax(x: Floats) -> Floats:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True), dtype=np.float64)


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    return rng.standard_normal(shape).astype(dtype)


def wide(x: npt.NDArray[np.generic]) -> Floats:
    return x.astype(np.float64)


def unit(dtype: npt.DTypeLike) -> float:
    """Twice the unit roundoff of float32, float16 or bfloat16: 23, 10 and 7 bits behind the leading one."""
    return {"float32": 2.0**-23, "float16": 2.0**-10}.get(np.dtype(dtype).name, 2.0**-7)


def test_softmax(checked: bool) -> None:
    names = [
        '"f", softmax_single_row, float',
        '"h", softmax_single_row, half, float',
        '"b", softmax_single_row, bfloat16_t, float',
    ]
    built = kernels(["utils.h", "softmax.h"], names, checked=checked)
    rng = np.random.default_rng(0)
    for kernel, dtype in zip(built, (np.float32, np.float16, ml_dtypes.bfloat16), strict=True):
        x = normal(rng, (5, 301), dtype)
        out = np.zeros_like(x)
        run = kernel.launch({0: x, 1: out, 2: np.int32(301)}, threadgroups=5, threads=96, outputs=(1,))
        assert run.faults == ()
        expected = softmax(wide(x))
        assert (abs(wide(out) - expected) <= 4 * unit(dtype) * expected + 1e-9).all()


def test_sdpa_vector(checked: bool) -> None:
    heads, kv_heads, keys, dim = 4, 2, 50, 64
    constants: dict[int | str, object] = dict.fromkeys(range(20, 26), False)
    names = ['"f", sdpa_vector, float, 64, 64', '"h", sdpa_vector, half, 64, 64']
    rng = np.random.default_rng(1)
    for kernel, dtype in zip(
        kernels(["utils.h", "sdpa_vector.h"], names, checked=checked, constants=constants),
        (np.float32, np.float16),
        strict=True,
    ):
        q, k, v = (normal(rng, (h, n, dim), dtype) for h, n in ((heads, 1), (kv_heads, keys), (kv_heads, keys)))
        out = np.zeros_like(q)
        strides = {6: np.uint64(keys * dim), 7: np.uint64(dim), 8: np.uint64(keys * dim), 9: np.uint64(dim)}
        scale = np.float32(dim**-0.5)
        run = kernel.launch(
            {0: q, 1: k, 2: v, 3: out, 4: np.int32(heads // kv_heads), 5: np.int32(keys), **strides, 10: scale},
            threadgroups=(heads, 1, 1), threads=1024, outputs=(3,),
        )  # fmt: skip
        assert run.faults == ()
        weights = softmax(wide(q) @ np.repeat(wide(k), 2, 0).swapaxes(1, 2) * dim**-0.5)
        np.testing.assert_allclose(wide(out), weights @ np.repeat(wide(v), 2, 0), rtol=0, atol=4 * unit(dtype))


def quantize(
    weights: Floats,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float16], npt.NDArray[np.float16], Floats]:
    """4-bit affine groups of 64, as MLX packs them: words, scales, biases, and the values that they mean."""
    groups = weights.reshape(len(weights), -1, 64)
    bias = groups.min(-1).astype(np.float16)
    scale = ((groups.max(-1) - groups.min(-1)) / 15).astype(np.float16)
    q = np.clip(np.rint((groups - wide(bias)[..., None]) / wide(scale)[..., None]), 0, 15)
    nibbles = q.reshape(len(weights), -1, 8).astype(np.uint32)
    words = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    return words, scale, bias, (q * wide(scale)[..., None] + wide(bias)[..., None]).reshape(weights.shape)


def test_quantized_matmuls(checked: bool) -> None:
    k, n, m = 512, 64, 37
    names = ['"qmv", affine_qmv, half, 64, 4, false', '"fast", affine_qmv_fast, half, 64, 4, false']
    names += ['"qmm", affine_qmm_t, half, 64, 4, true, false']
    headers = ["utils.h", "steel/gemm/gemm.h", "quantized_utils.h", "quantized.h"]
    qmv, fast, qmm = kernels(headers, names, checked=checked)
    rng = np.random.default_rng(2)
    words, scales, biases, meant = quantize(rng.standard_normal((n, k)))
    sizes = {5: np.int32(k), 6: np.int32(n)}
    for kernel, rows, groups, threads in (
        (qmv, 1, (1, n // 8), (32, 2)),
        (fast, 1, (1, n // 8), (32, 2)),
        (qmm, m, (n // 32, 2), (32, 2, 2)),
    ):
        x, out = normal(rng, (rows, k), np.float16), np.zeros((rows, n), np.float16)
        buffers = {0: words, 1: scales, 2: biases, 3: x, 4: out, **sizes} | ({7: np.int32(m)} if kernel is qmm else {})
        run = kernel.launch(buffers, threadgroups=groups, threads=threads, outputs=(4,))
        assert run.faults == ()
        # Products and partial sums are rounded to half in places: a few units of the largest partial sum.
        bound = 8 * unit(np.float16) * np.sqrt(k) * abs(meant).max()
        assert abs(wide(out) - wide(x) @ meant.T).max() < bound
        assert (run.stats.simdgroup_matrix_operations > 0) == (kernel is qmm)


def test_steel_attention(checked: bool) -> None:
    heads, length, dim = 2, 45, 64
    constants: dict[int | str, object] = {200: False, 201: False, 300: False, 301: True, 302: False, 303: False}
    name = '"attn", attention, float, 32, 16, 64, 64, 4, 1, float, float'
    (kernel,) = kernels(
        ["utils.h", "steel/attn/kernels/steel_attention.h"], [name], checked=checked, constants=constants
    )
    rng = np.random.default_rng(3)
    q, k, v = (normal(rng, (heads, length, dim), np.float32) for _ in range(3))
    out = np.zeros_like(q)
    blocks, key_blocks = -(-length // 32), -(-length // 16)
    counts = (blocks, key_blocks, length // 32, length // 16, length % 32, length % 16, 0)
    params = struct.pack("6if7i", 1, heads, dim, length, length, 1, dim**-0.5, *counts)
    params += struct.pack("3q", heads * length * dim, length * dim, dim) * 4
    run = kernel.launch(
        {0: q, 1: k, 2: v, 3: out, 4: params}, threadgroups=(blocks, heads), threads=(32, 4), outputs=(3,)
    )
    assert run.faults == ()
    scores = wide(q) @ wide(k).swapaxes(1, 2) * dim**-0.5
    scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
    np.testing.assert_allclose(out, softmax(scores) @ wide(v), rtol=0, atol=2e-6)
