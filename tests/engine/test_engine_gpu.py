"""The engine on this machine's GPU beside its own CPU run. Where MLX offers no GPU the lane is skipped, saying why.

The CPU run is held to the formulas elsewhere; here the question is whether every op exists on the GPU in every dtype
and computes the same thing. Bounds are those of the coarsest arithmetic that a GPU claims: TF32 factors in float32.
What CUDA claims is then measured from both sides: results obey the claim, and break the stronger one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
import pytest

import engine
from engine.arithmetic import arithmetic
from engine.config import parse_config
from engine.device import devices
from engine.layers import gather_mm
from engine.router import sqrtsoftplus, top_k
from tests.engine.tiny import CONFIG, make_checkpoint

Array = np.ndarray[Any, np.dtype[Any]]
TOKENS = [7, 3, 60, 11, 3, 42, 0, 19, 25, 33, 8, 8, 51, 14, 2, 37, 46]
# One layer that visits every expert, so that no routing flip can grow a rounding into another answer. A head size that
# has fused attention and one that has none; shapes that are and aren't multiples of a tile.
OPTIONS: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "num_experts_per_tok": 6}
SHAPES = {"fused": {"hidden_size": 64, "head_dim": 64}, "unfused": {"hidden_size": 96, "head_dim": 24}}
# Unit roundoffs times a dozen roundings in a row; four times that if weights are dequantised in the dtype, since
# scale · q and the bias that it nearly cancels are several times as large as the weight.
ALLOWED = {"float32": 12 * 2.0**-11, "float16": 12 * 2.0**-11, "bfloat16": 12 * 2.0**-8}

_FOUND = devices()
LANES = [
    pytest.param(name, marks=pytest.mark.skipif(not _FOUND[name].available, reason=f"{name}: {_FOUND[name].detail}"))
    for name in ("metal", "cuda")
]
CUDA = LANES[1:]
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def record(folder: Path, dtype: str, device: str, **how: Any) -> dict[str, Array]:
    steps: dict[str, list[Array]] = {}
    model = engine.load(folder, dtype=dtype, device=device)
    model.run(TOKENS, tap=lambda name, x: steps.setdefault(name, []).append(x), **how)
    return {name: np.concatenate(parts).astype(np.float64) for name, parts in steps.items()}


def by_expert(probes: dict[str, Array]) -> dict[str, Array]:
    """Probes with a slot axis reordered by expert id: near-ties may order the slots differently."""
    order = probes["layers.0.moe.experts"].argsort(-1, kind="stable")
    result = dict(probes)
    for name in ("experts", "weights", "gate", "up", "act", "down"):
        x = probes[f"layers.0.moe.{name}"]
        result[f"layers.0.moe.{name}"] = np.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1)
    return result


@pytest.fixture(autouse=True)
def back_to_the_cpu() -> Any:
    yield
    mx.set_default_device(mx.Device(mx.cpu))


@pytest.mark.parametrize("device", LANES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", [{}, {"chunk": 6, "decode": 5}], ids=str)
@pytest.mark.parametrize("bits", [None, 3, 4, 8])
def test_every_probe_is_near_the_cpus(
    tmp_path: Path, device: str, dtype: str, shape: str, how: dict[str, int], bits: int | None
) -> None:
    quantization = None if bits is None else {"group_size": 32, "bits": bits}
    folder = make_checkpoint(tmp_path, 1, stored=dtype, quantization=quantization, **OPTIONS | SHAPES[shape])
    allowed = ALLOWED[dtype] * (4 if bits else 1)
    # The CPU adds up quantised products in the dtype, so what it is compared with there is its float32 run.
    expected = by_expert(record(folder, "float32" if bits else dtype, "cpu"))
    actual = by_expert(record(folder, dtype, device, **how))
    assert list(actual) == list(expected)
    for name, x in actual.items():
        if name == "token":
            continue
        error = np.linalg.norm(x - expected[name]) / np.linalg.norm(expected[name])
        assert error < allowed, f"{name}: {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("device", LANES)
def test_ties_and_cold_logits_are_settled_as_on_the_cpu(device: str) -> None:
    handle = devices()[device].handle
    scores = np.random.default_rng(0).integers(-3, 4, (64, 200)).astype(np.float32)
    scores[:, ::5] *= -0.0
    with mx.stream(handle):
        assert np.array_equal(np.array(top_k(mx.array(scores), 9)), np.argsort(-scores, axis=-1, kind="stable")[:, :9])
        x = np.linspace(-90, 30, 4001, dtype=np.float32)
        actual = np.array(sqrtsoftplus(mx.array(x)))
    assert (np.abs(actual / np.sqrt(np.logaddexp(x.astype(np.float64), 0)) - 1) < 1e-5).all()
    assert (np.diff(actual) >= 0).all()


def claims(device: str, dtype: str, **config: Any) -> dict[str, dict[str, str]]:
    return arithmetic(devices()[device], dtype, parse_config(CONFIG | {"head_dim": 64} | config), packed_experts=False)


def rounded(x: Array, dtype: str) -> Array:
    return x.astype(np.float32).astype(HALVES[dtype]).astype(np.float64)


def to_mx(x: Array, dtype: str) -> mx.array:
    return mx.array(x.astype(np.float32)).astype(getattr(mx, dtype))


def misrounded(actual: mx.array, exact: Array, dtype: str) -> float:
    """Share of elements that are not `exact` rounded once."""
    return float(np.mean(np.array(actual.astype(mx.float32)) != rounded(exact, dtype)))


@pytest.mark.parametrize("device", CUDA)
def test_float32_factors_are_rounded_as_claimed(device: str) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((9, 256)).astype(np.float32), rng.standard_normal((64, 256)).astype(np.float32)
    ids = mx.array(np.sort(rng.integers(0, 3, 96)).astype(np.uint32))
    with mx.stream(devices()[device].handle):
        product = np.array(mx.array(x) @ mx.array(w).T)
        # Beyond float16's largest number, and still far from float32's.
        stack, large = mx.ones((3, 64, 32)).swapaxes(-1, -2), mx.full((96, 1, 32), 2.0**17)
        grouped = np.array(gather_mm(large, stack, ids, in_order=True))
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    error = np.linalg.norm(product - exact) / np.linalg.norm(exact)
    table = claims(device, "float32")
    assert error < 1e-6 if table["linear"]["operand"] == "input" else 1e-5 < error < 2.0**-10
    assert table["experts"]["operand"] == ("float16" if np.isinf(grouped).all() else "input")
    assert np.isinf(grouped).all() or (grouped == 32 * 2.0**17).all()


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("L", [1, 7])
def test_attention_rounds_no_scores_as_claimed(device: str, dtype: str, L: int) -> None:
    rng = np.random.default_rng(1)
    q, k, v = (rounded(rng.standard_normal(shape), dtype) for shape in ((1, 4, L, 64), (1, 4, 33, 64), (1, 4, 33, 64)))
    with mx.stream(devices()[device].handle):
        actual = mx.fast.scaled_dot_product_attention(*(to_mx(x, dtype) for x in (q, k, v)), scale=0.125)

    def attend(scores: Array, kept: Any) -> Array:
        e = np.exp(scores - scores.max(-1, keepdims=True))
        context: Array = kept(e) @ v / e.sum(-1, keepdims=True)
        return context

    scores = 0.125 * q @ k.swapaxes(-1, -2)
    once = attend(scores, (lambda e: rounded(e, dtype)) if L > 1 else (lambda e: e))
    assert claims(device, dtype)["attention"] == {
        "operand": "input", "accumulate": "float32", "intermediate": "float32", "output": "input"
    }  # fmt: skip
    assert misrounded(actual, once, dtype) < 0.05
    assert misrounded(actual, attend(rounded(scores, dtype), lambda e: e), dtype) > 0.2


@pytest.mark.parametrize("device", CUDA)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("bits", "apart"), [(2, 512), (3, 512), (4, 512), (6, 256), (8, None)])
def test_quantised_products_so_far_apart_are_added_up_in_the_dtype(
    device: str, dtype: str, bits: int, apart: int | None
) -> None:
    """Ones are lost beside a number whose successor the dtype hasn't got, exactly where they are added to it there."""
    width, large = 4096, {"float16": 2048.0, "bfloat16": 256.0}[dtype]
    packed = mx.zeros((8, width * bits // 32), mx.uint32)
    zero, one = (to_mx(np.full((8, width // 64), value), dtype) for value in (0.0, 1.0))
    for spread in (128, 256, 512):
        x = np.zeros((1, 1, width))
        x[..., ::spread] = 1
        x[..., 0] = large
        with mx.stream(devices()[device].handle):
            y = mx.quantized_matmul(to_mx(x, dtype), packed, zero, one, transpose=True, group_size=64, bits=bits)
            lost = np.array(y.astype(mx.float32)) == large
        assert (lost == (apart is not None and spread % apart == 0)).all(), spread
    for hidden in (256, 1024):
        config = {"hidden_size": hidden, "moe_intermediate_size": 64, "quantization": {"group_size": 64, "bits": bits}}
        narrow = apart is not None and hidden > apart
        assert claims(device, dtype, **config)["quantized_linear"]["accumulate"] == ("input" if narrow else "float32")
