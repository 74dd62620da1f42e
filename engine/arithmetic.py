"""What arithmetic each op of the engine is done in, by device: the claims that its error bounds are derived from.

A claim must never promise more than the backend keeps. Where a backend has several kernels for an op and picks one by
shape, the entry is the weakest of them. The keys of a claim are

    operand       what the two factors of a product are rounded to before it ("input": they are not rounded further)
    accumulate    what a sum is held in
    intermediate  the coarsest rounding of a value between the input and the output
    output        what the result is rounded to, once

and the values are dtype names, with "input" for the run's dtype. Evidence: [M] measured with MLX 0.32.4 by comparing
with float64 (tests/engine/test_engine_arithmetic.py repeats the CPU's), [H] the Metal headers that MLX 0.32.4
installs, [S] MLX's sources of 2026. What the engine itself does in float32 (router, SwiGLU, combine) is its own choice
and the same everywhere.

Not claimed here: how exact exp, sin and cos are. On the CPU exp is off by up to (1.25|x| + 2)·2⁻²⁴ of its value, and is
0 where that would be subnormal, below −87.3 [M]; Metal allows fast::exp 3 + ⌊2|x|⌋ ulp (Metal Shading Language
specification, table of relative errors).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

from engine.config import Config
from engine.device import Device

Claims = dict[str, str]


def arithmetic(device: Device, dtype: str, config: Config, *, packed_experts: bool) -> dict[str, Claims]:
    """Claims by op for a run of `config` in `dtype` on `device`; ops that the model hasn't got are left out.

    `packed_experts` says whether any expert stack is affine-quantised: with experts from a GGUF file none is.
    """
    table = _BACKENDS[device.name](dtype, config, device.detail)
    # Inputs are upcast, and a half number is exact in TF32 too, so only a float32 run can lose bits to it.
    operand = table["linear"]["operand"] if dtype == "float32" else "input"
    table["router"] = {"operand": operand, "accumulate": "float32", "intermediate": "float32", "output": "float32"}
    # One addition of two numbers of the dtype, rounded once [M].
    table["add"] = {"intermediate": "float32", "output": "input"}
    table["swiglu"] = {"intermediate": "float32", "output": "input"}
    table["combine"] = {"accumulate": "float32", "intermediate": "float32", "output": "input"}
    table["logits"] = dict(table["linear"])
    if packed_experts:
        table["experts"] = dict(table["quantized_linear"])
    if config.quantization is None:
        del table["quantized_linear"]
    elif not config.tie_word_embeddings:
        table["logits"] = dict(table["quantized_linear"])
    return table


def _cpu(dtype: str, config: Config, detail: str) -> dict[str, Claims]:
    once = {"operand": "input", "accumulate": "float32", "intermediate": "float32", "output": "input"}
    return {
        # float16 and bfloat16: products and sums in float32, one rounding: 2048 + 63·1 is 2112, not stuck at 2048,
        # and over 99.7% of results are the correctly rounded ones [M]; mlx/backend/cpu/gemms/simd_gemm.h [S].
        "linear": dict(once),
        # Dequantised weight, product and running sum are each rounded to the dtype: 256 + 63·1 stays 256 in bfloat16,
        # 90% of float16 results are off, by 4 u in the median at 256 terms [M]; `T sum` in quantized.cpp [S].
        "quantized_linear": {"operand": "input", "accumulate": "input", "intermediate": "input", "output": "input"},
        # gather_mm runs on float32 copies (engine/layers.py), so as "linear".
        "experts": dict(once),
        # The graph of mlx/fast.cpp [M, S]: x·rsqrt is rounded to the dtype before it is multiplied by the weight.
        "rms_norm": once | {"intermediate": "input"},
        # cos, sin and both products are rounded to the dtype; rounding so reproduces 99.98% of results [M, S].
        "rope": {"operand": "input", "intermediate": "input", "output": "input"},
        # q·scale, scores and probabilities are rounded to the dtype, softmax and sums are float32; rounding so
        # reproduces 99.9% of results [M]; the graph of mlx/fast.cpp [S].
        "attention": {"operand": "input", "accumulate": "float32", "intermediate": "input", "output": "input"},
    }


def _metal(dtype: str, config: Config, detail: str) -> dict[str, Claims]:
    matrix_unit = _has_matrix_unit(detail)
    operand = "tf32" if dtype == "float32" and matrix_unit and _tf32() else "input"
    once = {"operand": operand, "accumulate": "float32", "intermediate": "float32", "output": "input"}
    # Fused attention keeps scores and probabilities in float32 (sdpa_vector.h, steel_attention.h [H]). It exists for
    # prefill and decode alike with these head sizes and up to 32 rows (8 queries by the group) in the vector kernel
    # [S]; other shapes take the graph of mlx/fast.cpp. On the matrix unit the factors' type is Apple's to choose.
    group = config.num_attention_heads // config.num_key_value_heads
    fused = config.head_dim in (64, 96, 128) and group <= 4 and not matrix_unit
    return {
        # Tiles and vectors accumulate in float (steel/gemm/mma.h, gemv.h [H]); the matrix unit multiplies with
        # relaxed precision, float32 included unless MLX_ENABLE_TF32=0 (steel/gemm/nax.h [H], matmul.cpp [S]).
        "linear": dict(once),
        # The tile loader stores dequantised weights in the dtype; sums are float (quantized.h [H]).
        "quantized_linear": once | {"intermediate": "input"},
        "experts": dict(once),
        # rms_norm.metal has rounded x·rsqrt to the dtype in some versions and not in others [S].
        "rms_norm": {"accumulate": "float32", "intermediate": "input", "output": "input"},
        # In float32 but for metal::fast::sin and cos, which promise 2⁻¹³ absolute in [−π, π] alone (Metal Shading
        # Language specification): TF32's 2⁻¹¹ is the next dtype that covers it (rope.metal [S]).
        "rope": {"operand": "input", "intermediate": "tf32", "output": "input"},
        "attention": once | {"intermediate": "float32" if fused else "input"},
    }


def _cuda(dtype: str, config: Config, detail: str) -> dict[str, Claims]:
    operand = "tf32" if dtype == "float32" and _tf32() else "input"
    once = {"operand": operand, "accumulate": "float32", "intermediate": "float32", "output": "input"}
    # qmv.cu: a thread's partial sums are in the dtype for weights of fewer than 8 bits, dequantised weights always [S].
    narrow = config.quantization is not None and config.quantization.bits < 8
    return {
        # cuBLASLt computes float32 as CUBLAS_COMPUTE_32F_FAST_TF32 unless MLX_ENABLE_TF32=0, half types as 32F
        # (cublas_gemm.cpp [S]); on an H200 a float32 product's relative error is 2.9e-4 [M].
        "linear": dict(once),
        "quantized_linear": {
            "operand": "input",
            "accumulate": "input" if narrow else "float32",
            "intermediate": "input",
            "output": "input",
        },
        # gather_gemm.cu, gather_mv and the grouped GEMM multiply float32 as float32 [S]; a grouped GEMM from a vendor
        # library may not, so the claim is the weaker one.
        "experts": dict(once),
        # rms_norm.cu: x·rsqrt is rounded to the dtype before it is multiplied by the weight [S].
        "rms_norm": {"accumulate": "float32", "intermediate": "input", "output": "input"},
        # rope.cu computes in float and rounds once [S].
        "rope": {"operand": "input", "intermediate": "float32", "output": "input"},
        # cuDNN multiplies probabilities of the dtype by v; shapes that neither it nor the vector kernel takes go the
        # graph of mlx/fast.cpp, and in float32 through TF32 matmuls (scaled_dot_product_attention.cpp [S]).
        "attention": once | {"intermediate": "input"},
    }


_BACKENDS: Mapping[str, Callable[[str, Config, str], dict[str, Claims]]] = {
    "cpu": _cpu,
    "metal": _metal,
    "cuda": _cuda,
}


def _tf32() -> bool:
    """Whether MLX may round float32 factors to TF32: yes, unless MLX_ENABLE_TF32 is 0 (mlx/utils.h)."""
    value = os.environ.get("MLX_ENABLE_TF32", "")
    return not re.fullmatch(r"\s*[+-]?0+\s*", value)


def _has_matrix_unit(detail: str) -> bool:
    """Whether MLX may use the GPU's matrix unit: generation 17 on, 18 for phones (device.cpp, is_nax_available)."""
    found = re.search(r"applegpu_g(\d+)([a-z])", detail)
    return found is not None and int(found[1]) >= (18 if found[2] == "p" else 17)
