"""The engine on this machine's GPU beside its own CPU run. Where MLX offers no GPU the lane is skipped, saying why.

The CPU run is held to the formulas elsewhere; here the question is whether every op exists on the GPU in every dtype
and computes the same thing. Bounds are those of the coarsest arithmetic that a GPU claims: TF32 factors in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import engine
from engine.device import devices
from engine.router import sqrtsoftplus, top_k
from tests.engine.tiny import make_checkpoint

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
