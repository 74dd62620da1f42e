"""Where the engine's own implementation of each contract is: "module:name" by contract, imported when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from engine.arithmetic import operand
from engine.device import Device

# The contracts whose op multiplies matrices.
PRODUCTS = ("matmul", "quantized_matmul", "moe_matmul", "sdpa", "quantized_sdpa")
IMPLEMENTATIONS = {
    "softmax": "engine.ops:softmax",
    "rms_norm": "engine.ops:rms_norm",
    "rope": "engine.ops:rope",
    "swiglu": "engine.ops:swiglu",
    "matmul": "engine.ops:matmul",
    "quantized_matmul": "engine.ops:quantized_matmul",
    "quantize": "engine.ops:quantize",
    "moe_matmul": "engine.ops:moe_matmul",
    "router": "engine.ops:router",
    "top_k": "engine.ops:top_k",
    "sdpa": "engine.ops:sdpa",
    "quantized_sdpa": "engine.ops:quantized_sdpa",
    "attention_mask": "engine.masks:attention_mask",
    "penalties": "engine.penalties:penalties",
    "sampler": "engine.ops:sampler",
    "kv_cache": "engine.caches:KVCache",
    "rotating_kv_cache": "engine.caches:RotatingKVCache",
    "chunked_kv_cache": "engine.caches:ChunkedKVCache",
    "quantized_kv_cache": "engine.caches:QuantizedKVCache",
    "batch_kv_cache": "engine.caches:BatchKVCache",
    "batch_rotating_kv_cache": "engine.caches:BatchRotatingKVCache",
    "batch_quantized_kv_cache": "engine.caches:BatchQuantizedKVCache",
}


def implementation(contract: str) -> Any:
    """The engine's implementation of `contract`; ValueError if it has none."""
    if contract not in IMPLEMENTATIONS:
        raise ValueError(f"the engine implements no contract {contract!r}")
    module, name = IMPLEMENTATIONS[contract].split(":")
    return getattr(import_module(module), name)


def claims(contract: str, device: Device, dtype: str) -> dict[str, str]:
    """What the engine's implementation of `contract` may round on `device` beyond honest code of `dtype`, as claims.

    Only matrix units differ: they round float32 factors to TF32 unless MLX_ENABLE_TF32=0 (engine/arithmetic.py).
    """
    if dtype != "float32" or contract not in PRODUCTS or device.name == "cpu":
        return {}
    return {"operand": operand(device)}
