"""What arithmetic each op of the engine is done in, by device: the claims that its error bounds are derived from.

A claim must never promise more than the backend keeps. Where a backend has several kernels for an op and picks one by
shape, the entry is the weakest of them. The keys of a claim are

    operand       what the two factors of a product are rounded to before it ("input": they are not rounded further)
    accumulate    what a sum is held in
    intermediate  the coarsest rounding of a value between the input and the output
    output        what the result is rounded to, once

and the values are dtype names, with "input" for the run's dtype. Evidence: [M] measured with MLX 0.32.4 by comparing
with float64 (tests/engine/test_engine_arithmetic.py repeats the CPU's; docs/evidence/cuda.md has CUDA's, on an H200),
[H] the Metal headers that MLX 0.32.4 installs, [S] MLX's sources of 2026. What the engine itself does in float32
(router, SwiGLU, combine) is its own choice and the same everywhere.

Not claimed here: how exact exp, sin and cos are, and which way a sum is rounded. Tensor cores truncate: the sum of two
exact products may be off by a whole ulp [M]. On the CPU exp is off by up to (1.25|x| + 2)·2⁻²⁴ of its value, and is
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


def arithmetic(
    device: Device, dtype: str, config: Config, *, packed_experts: bool, own_kernels: bool = False
) -> dict[str, Claims]:
    """Claims by op for a run of `config` in `dtype` on `device`; ops that the model hasn't got are left out.

    `packed_experts` says whether any expert stack is affine-quantised: with experts from a GGUF file none is.
    `own_kernels`: this engine's own Metal kernels compute, on the host executor or an Apple GPU, what they can.
    """
    table = _BACKENDS[device.name](dtype, config, device.detail)
    # Inputs are upcast, and a half number is exact in TF32 too, so only a float32 run can lose bits to it.
    factor = table["linear"]["operand"] if dtype == "float32" else "input"
    table["router"] = {"operand": factor, "accumulate": "float32", "intermediate": "float32", "output": "float32"}
    # One addition of two numbers of the dtype, rounded once [M].
    table["add"] = {"intermediate": "float32", "output": "input"}
    table["swiglu"] = {"intermediate": "float32", "output": "input"}
    table["combine"] = {"accumulate": "float32", "intermediate": "float32", "output": "input"}
    table["logits"] = dict(table["linear"])
    if packed_experts:
        table["experts"] = dict(table["quantized_linear"])
    if own_kernels:
        table |= {op: dict(claims) for op, claims in _OWN_KERNELS.items()}
    if config.quantization is None:
        del table["quantized_linear"]
    elif not config.tie_word_embeddings:
        table["logits"] = dict(table["quantized_linear"])
    return table


def operand(device: Device) -> str:
    """What the factors of a float32 matrix product are rounded to on `device`: "input" or, by a matrix unit, "tf32"."""
    rounds = device.name == "cuda" or (device.name == "metal" and _has_matrix_unit(device.detail))
    return "tf32" if rounds and _tf32() else "input"


def _cpu(dtype: str, config: Config, detail: str) -> dict[str, Claims]:
    once = {"operand": "input", "accumulate": "float32", "intermediate": "float32", "output": "input"}
    return {
        # float16 and bfloat16: products and sums in float32, one rounding: 2048 + 63·1 is 2112, not stuck at 2048,
        # and over 99.7% of results are the correctly rounded ones [M]; mlx/backend/cpu/gemms/simd_gemm.h [S].
        "linear": dict(once),
        # In float32 with one rounding at the end, because engine/layers.py keeps scales and biases in float32 here:
        # left in the dtype, the running sum would be in it too (256 + 63·1 stays 256 in bfloat16 [M]; quantized.cpp
        # [S]).
        "quantized_linear": {"accumulate": "float32", "intermediate": "float32", "output": "input"},
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
    factor = "tf32" if dtype == "float32" and matrix_unit and _tf32() else "input"
    once = {"operand": factor, "accumulate": "float32", "intermediate": "float32", "output": "input"}
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
    tf32 = dtype == "float32" and _tf32()
    once = {
        "operand": "tf32" if tf32 else "input",
        "accumulate": "float32",
        "intermediate": "float32",
        "output": "input",
    }
    # With few rows, weights of fewer than 8 bits are multiplied in the dtype, and a thread adds up every 256th product
    # (512th with 4 bits or fewer) in it; threads are added up in float32 [M]; qmv.cu [S].
    bits = 8 if config.quantization is None else config.quantization.bits
    narrow = bits in _PRODUCTS_APART and _longest_sum(config) > _PRODUCTS_APART[bits]
    # cuDNN (prefill) keeps scores and the softmax's total in float32 and rounds exp(score − max) to the dtype, as an
    # operand of the product with v; the vector kernel (decode) rounds nothing but the result. Rounding so reproduces
    # over 97% of results, and rounding scores too under 60% [M]. Other head sizes decode by the graph of mlx/fast.cpp,
    # where scores are rounded to the dtype [M, S].
    fused = config.head_dim in (64, 96, 128) and _has_cudnn_attention(detail)
    return {
        # cuBLASLt rounds float32 factors to TF32 unless MLX_ENABLE_TF32=0: off by 3e-4 of the result, and by 1e-7 from
        # the product of rounded factors; a single row is multiplied in float32 (gemv.cu). Half types: float32 sums,
        # over 99% of results are the correctly rounded ones [M].
        "linear": dict(once),
        # Weights are dequantised with one fma, rounded to the dtype; with 8 bits, or with 32 rows, 99.9% of the
        # results are the exact sums over those, rounded once. float32 factors stay float32, TF32 or not [M].
        "quantized_linear": {
            "operand": "input",
            "accumulate": "input" if narrow else "float32",
            "intermediate": "input",
            "output": "input",
        },
        # Sorted rows go through a grouped GEMM that converts float32 factors to float16 unless MLX_ENABLE_TF32=0: what
        # is below 2⁻²⁵ becomes 0, and from 65520 on infinite [M]. Unsorted ones are multiplied in float32.
        "experts": once | {"operand": "float16" if tf32 else "input"},
        # x·rsqrt is rounded to the dtype before it is multiplied by the weight; rounding so reproduces 99.99% of
        # results [M]; rms_norm.cu [S].
        "rms_norm": {"accumulate": "float32", "intermediate": "input", "output": "input"},
        # In float32, rounded once: within the float32 bound at positions up to 4095 [M]; rope.cu [S].
        "rope": {"operand": "input", "intermediate": "float32", "output": "input"},
        # float32 takes the graph of mlx/fast.cpp through TF32 matmuls, except to decode these head sizes [M].
        "attention": once | {"intermediate": "float32" if fused else "input"},
    }


# In engine/metal/kernels/*.metal everything is float inside and rounded once, to the run's dtype, on its way out.
# Attention is not here: the kernel is as exact, but has single queries alone, so that MLX's claims are the weaker ones.
_OWN_KERNELS: Mapping[str, Claims] = {
    # mul_mm_id rounds weights and x to half, multiplies exactly and adds in float. mul_mv_id rounds neither; each
    # product's own rounding in float is less than what rounding its factors may do.
    "experts": {
        "operand": "float16",
        "accumulate": "float32",
        "intermediate": "float32",
        "output": "input",
    },
    "rms_norm": {"accumulate": "float32", "intermediate": "float32", "output": "input"},
    "rope": {"operand": "input", "intermediate": "float32", "output": "input"},
}

# By bits: how many products apart those are that one thread adds up. A warp's 32 threads take 16 or 8 each in a row.
_PRODUCTS_APART = {2: 512, 3: 512, 4: 512, 6: 256}

_BACKENDS: Mapping[str, Callable[[str, Config, str], dict[str, Claims]]] = {
    "cpu": _cpu,
    "metal": _metal,
    "cuda": _cuda,
}


def _tf32() -> bool:
    """Whether MLX may round float32 factors to TF32: yes, unless MLX_ENABLE_TF32 is 0 (mlx/utils.h)."""
    value = os.environ.get("MLX_ENABLE_TF32", "")
    return not re.fullmatch(r"\s*[+-]?0+\s*", value)


def _longest_sum(config: Config) -> int:
    """The longest sum in a quantised product of the model."""
    shared = config.moe_intermediate_size * config.n_shared_experts
    heads = config.num_attention_heads * config.head_dim
    return max(config.hidden_size, config.moe_intermediate_size, shared, heads)


def _has_cudnn_attention(detail: str) -> bool:
    """Whether MLX gives prefill in half types to cuDNN: from Ampere on (scaled_dot_product_attention.cpp [S])."""
    found = re.search(r"sm_(\d+)", detail)
    return found is not None and int(found[1]) >= 80 and os.environ.get("MLX_CUDA_USE_CUDNN_SDPA", "1").strip() == "1"


def _has_matrix_unit(detail: str) -> bool:
    """Whether MLX may use the GPU's matrix unit: generation 17 on, 18 for phones (device.cpp, is_nax_available)."""
    found = re.search(r"applegpu_g(\d+)([a-z])", detail)
    return found is not None and int(found[1]) >= (18 if found[2] == "p" else 17)
