"""The arithmetic that provenance claims: measured on the CPU against float64, derived for the devices that are absent.

A claim that promises too much makes honest results look like faults; one that promises too little hides them. So the
CPU's claims are tested from both sides: results obey the claim, and break the stronger one.
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
from engine.config import Config, Quantization, parse_config
from engine.device import Device
from engine.layers import QuantizedLinear, QuantizedSwitchLinear, gather_mm, swiglu, widen
from engine.module import Module
from engine.moe import combine
from tests.engine.tiny import CONFIG, make_checkpoint

Array = np.ndarray[Any, np.dtype[Any]]
HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# The first integer whose successor the dtype doesn't have: adding ones to it one by one leads nowhere.
STUCK = {"float16": 2048.0, "bfloat16": 256.0}
CPU = Device(name="cpu", available=True, detail="x86_64")


@pytest.fixture(autouse=True)
def on_the_cpu() -> Any:
    with mx.stream(mx.cpu):
        yield


def claims(dtype: str, **config: Any) -> dict[str, dict[str, str]]:
    return arithmetic(CPU, dtype, parse_config(CONFIG | config), packed_experts=False)


def half(rng: np.random.Generator, dtype: str, *shape: int, scale: float = 1.0) -> Array:
    return (scale * rng.standard_normal(shape)).astype(np.float32).astype(HALVES[dtype])


def to_mx(x: Array) -> mx.array:
    return mx.array(x.astype(np.float32)).astype(mx.bfloat16 if x.dtype == ml_dtypes.bfloat16 else mx.float16)


def values(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def wide(x: Array) -> Array:
    return x.astype(np.float64)


def misrounded(actual: mx.array, exact: Array, dtype: str) -> float:
    """Share of elements that are not the exact result rounded once (by way of float32)."""
    return float(np.mean(values(actual) != wide(exact.astype(np.float32).astype(HALVES[dtype]))))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 2, 17, 40])
def test_linear_accumulates_in_float32_and_rounds_once(dtype: str, rows: int) -> None:
    rng = np.random.default_rng(rows)
    assert claims(dtype)["linear"] == {
        "operand": "input",
        "accumulate": "float32",
        "intermediate": "float32",
        "output": "input",
    }
    x, w = half(rng, dtype, rows, 256), half(rng, dtype, 64, 256)
    assert misrounded(to_mx(x) @ to_mx(w).T, wide(x) @ wide(w).T, dtype) < 0.01
    ones = np.ones((rows, 64), HALVES[dtype])
    ones[:, 0] = STUCK[dtype]
    assert values(to_mx(ones) @ to_mx(np.ones((8, 64), HALVES[dtype])).T).min() > STUCK[dtype] + 32


@pytest.mark.parametrize("dtype", HALVES)
def test_experts_accumulate_in_float32_and_round_once(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w = half(rng, dtype, 9, 1, 1, 128), half(rng, dtype, 4, 32, 128)
    ids = rng.integers(0, 4, (9, 3))
    stack = to_mx(w).astype(mx.float32).swapaxes(-1, -2)
    actual = gather_mm(to_mx(x), stack, mx.array(ids), in_order=False)
    assert actual.dtype == to_mx(x).dtype
    exact = np.einsum("td,tkfd->tkf", wide(x)[:, 0, 0], wide(w)[ids])
    assert misrounded(actual.squeeze(-2), exact, dtype) < 0.01


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantised_products_sum_in_float32_only_because_they_are_widened(dtype: str, bits: int) -> None:
    """MLX's own sum of ones stays where the dtype has no next integer; with float32 scales it doesn't."""
    config = {"quantization": {"group_size": 32, "bits": bits}}
    assert claims(dtype, **config)["quantized_linear"]["accumulate"] == "float32"
    kind = to_mx(np.ones(1, HALVES[dtype])).dtype
    packed = mx.zeros((8, 64 * bits // 32), mx.uint32)
    x = np.ones((1, 64), HALVES[dtype])
    x[:, 0] = STUCK[dtype]
    zero, one = mx.zeros((8, 2), kind), mx.ones((8, 2), kind)
    stuck = mx.quantized_matmul(to_mx(x), packed, zero, one, transpose=True, group_size=32, bits=bits)
    assert values(stuck).tolist() == [[STUCK[dtype]] * 8]

    layer = QuantizedLinear(64, 8, Quantization(group_size=32, bits=bits))
    layer.weight, layer.scales, layer.biases = packed, zero, one
    stack = QuantizedSwitchLinear(1, 64, 8, Quantization(group_size=32, bits=bits))
    stack.weight, stack.scales, stack.biases = packed[None], zero[None], one[None]
    both = Module()
    both.layer, both.stack = layer, stack
    widen(both)
    # 2048 + 63 and 256 + 63 lie between two numbers of the dtype: rounded once, to the nearest.
    exact = np.array([[STUCK[dtype] + 63.0]]).astype(HALVES[dtype]).astype(np.float64)
    assert values(layer(to_mx(x))).tolist() == [exact.tolist()[0] * 8]
    assert values(stack(to_mx(x)[:, None, None], mx.array([[0]]))).flatten().tolist() == exact.tolist()[0] * 8


@pytest.mark.parametrize("dtype", HALVES)
def test_rms_norm_rounds_before_the_weight(dtype: str) -> None:
    rng = np.random.default_rng(1)
    assert claims(dtype)["rms_norm"]["intermediate"] == "input"
    x, w = half(rng, dtype, 50, 256), half(rng, dtype, 256)
    normed = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + 1e-6)
    actual = mx.fast.rms_norm(to_mx(x), to_mx(w), 1e-6)
    twice = wide(normed.astype(np.float32).astype(HALVES[dtype])) * wide(w)
    assert misrounded(actual, twice, dtype) < 0.01
    assert misrounded(actual, normed * wide(w), dtype) > 0.1


@pytest.mark.parametrize("dtype", HALVES)
def test_rope_rounds_cosines_and_products(dtype: str) -> None:
    rng = np.random.default_rng(2)
    assert claims(dtype)["rope"] == {"operand": "input", "intermediate": "input", "output": "input"}
    x = half(rng, dtype, 1, 2, 40, 32)
    angle = np.arange(40)[:, None] * 10000.0 ** (-np.arange(16) / 16)

    def kept(v: Array) -> Array:
        return wide(v.astype(np.float32).astype(HALVES[dtype]))

    a, b = wide(x)[..., :16], wide(x)[..., 16:]
    cos, sin = np.cos(angle), np.sin(angle)
    once = np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)
    c, s = kept(cos), kept(sin)
    each = np.concatenate([kept(a * c) - kept(b * s), kept(a * s) + kept(b * c)], -1)
    actual = mx.fast.rope(to_mx(x), 32, traditional=False, base=10000.0, scale=1.0, offset=0)
    assert misrounded(actual, each, dtype) < 0.01
    assert misrounded(actual, once, dtype) > 0.1


@pytest.mark.parametrize("dtype", HALVES)
def test_attention_rounds_scores_and_probabilities(dtype: str) -> None:
    rng = np.random.default_rng(3)
    assert claims(dtype)["attention"] == {
        "operand": "input", "accumulate": "float32", "intermediate": "input", "output": "input"
    }  # fmt: skip
    q, k, v = half(rng, dtype, 1, 4, 7, 64), half(rng, dtype, 1, 4, 33, 64, scale=3), half(rng, dtype, 1, 4, 33, 64)

    def attend(kept: Any) -> Array:
        scores = kept(wide(q) * 0.125 @ wide(k).swapaxes(-1, -2))
        e = np.exp(scores - scores.max(-1, keepdims=True))
        weights: Array = kept(e / e.sum(-1, keepdims=True)) @ wide(v)
        return weights

    actual = mx.fast.scaled_dot_product_attention(to_mx(q), to_mx(k), to_mx(v), scale=0.125)
    assert misrounded(actual, attend(lambda x: wide(x.astype(np.float32).astype(HALVES[dtype]))), dtype) < 0.01
    assert misrounded(actual, attend(lambda x: x), dtype) > 0.3


@pytest.mark.parametrize("dtype", HALVES)
def test_swiglu_and_combine_round_once(dtype: str) -> None:
    rng = np.random.default_rng(4)
    g, u = half(rng, dtype, 50, 64, scale=3), half(rng, dtype, 50, 64, scale=3)
    clamped, bounded = np.minimum(wide(g), 2.0), np.clip(wide(u), -2.0, 2.0)
    assert misrounded(swiglu(to_mx(g), to_mx(u), 2.0), clamped / (1 + np.exp(-clamped)) * bounded, dtype) < 0.01
    down, shared = half(rng, dtype, 20, 6, 64), half(rng, dtype, 20, 64)
    weights = rng.uniform(0, 1, (20, 6)).astype(np.float32)
    actual = combine(to_mx(down), mx.array(weights), to_mx(shared))
    exact = (wide(weights)[..., None] * wide(down)).sum(1) + wide(shared)
    assert misrounded(actual, exact, dtype) < 0.01
    assert misrounded(to_mx(g) + to_mx(u), wide(g) + wide(u), dtype) == 0


def test_the_cpus_exp_is_as_exact_as_stated() -> None:
    for low, high in ((-4.0, 0.0), (-20.0, -16.0), (-87.0, -80.0)):
        x = np.linspace(low, high, 20001, dtype=np.float32)
        exact = np.exp(wide(x))
        assert (np.abs(values(mx.exp(mx.array(x))) - exact) / exact <= (1.25 * np.abs(x) + 2) * 2.0**-24).all()


def config(**change: Any) -> Config:
    return parse_config(CONFIG | {"head_dim": 64} | change)


def on(device: str, dtype: str, detail: str = "", **change: Any) -> dict[str, dict[str, str]]:
    place = Device(name=device, available=True, detail=detail)
    return arithmetic(place, dtype, config(**change), packed_experts="quantization" in change)


def test_cuda_rounds_float32_factors_to_tf32_unless_told_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    assert {op: on("cuda", "float32")[op]["operand"] for op in ("linear", "router", "logits")} == {
        "linear": "tf32", "router": "tf32", "logits": "tf32"
    }  # fmt: skip
    assert on("cuda", "float16")["router"]["operand"] == "input"
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    assert on("cuda", "float32")["linear"]["operand"] == "input"
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    assert on("cuda", "float32")["linear"]["operand"] == "tf32"


def test_metal_claims_follow_the_gpus_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    details = ["Apple M1 applegpu_g13g", "M4 Max applegpu_g16s", "M5 applegpu_g17g", "applegpu_g17p", "applegpu_g18p"]
    operands = [on("metal", "float32", detail)["linear"]["operand"] for detail in details]
    assert operands == ["input", "input", "tf32", "input", "tf32"]


def test_metal_claims_float32_scores_where_attention_is_fused() -> None:
    m1 = "Apple M1 applegpu_g13g"
    assert on("metal", "float16", m1)["attention"]["intermediate"] == "float32"
    for change in ({"head_dim": 32}, {"head_dim": 256}, {"num_attention_heads": 8, "num_key_value_heads": 1}):
        assert on("metal", "float16", m1, **change)["attention"]["intermediate"] == "input"


@pytest.mark.parametrize(("bits", "accumulate"), [(4, "input"), (8, "float32")])
def test_cudas_quantised_sums_depend_on_the_bits(bits: int, accumulate: str) -> None:
    wide = {"hidden_size": 1024, "tie_word_embeddings": False}
    table = on("cuda", "float16", quantization={"group_size": 32, "bits": bits}, **wide)
    assert table["quantized_linear"]["accumulate"] == accumulate
    assert table["experts"] == table["logits"] == table["quantized_linear"]


def test_cuda_claims_what_was_measured_on_an_h200() -> None:
    assert on("cuda", "float16", "NVIDIA H200 sm_90", head_dim=64)["attention"]["intermediate"] == "float32"
    assert on("cuda", "float32")["experts"]["operand"] == "float16"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "metal", "cuda"])
def test_every_op_is_claimed_for_in_known_words(device: str, dtype: str) -> None:
    table = on(device, dtype, quantization={"group_size": 32, "bits": 4})
    products = {"linear", "quantized_linear", "experts", "router", "attention", "combine", "logits"}
    assert set(table) == products | {"rms_norm", "rope", "swiglu", "add"}
    for op, claim in table.items():
        assert claim["output"] == ("float32" if op == "router" else "input")
        assert set(claim) <= {"operand", "accumulate", "intermediate", "output"}
        assert set(claim.values()) <= {"input", "float32", "tf32", "float16"}
    assert "quantized_linear" not in on(device, dtype)


def test_provenance_names_engine_version_device_and_dtype(tmp_path: Path) -> None:
    from importlib.metadata import version

    model = engine.load(make_checkpoint(tmp_path), dtype="float16", device="cpu")
    provenance = model.provenance
    assert provenance["device_info"]
    assert provenance["arithmetic"] == claims("float16")
    assert provenance["kernels"] == {}
    del provenance["device_info"], provenance["arithmetic"], provenance["kernels"]
    assert provenance == {"engine": "mlx", "version": version("mlx"), "device": "cpu", "dtype": "float16"}
