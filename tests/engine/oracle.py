"""The decoder in NumPy float64, straight from its formulas, one token at a time and without a cache.

It is what the engine's tests compare with; it knows the probe names and nothing of the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


def forward(weights: Mapping[str, Array], config: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Array]:
    """Every probe of `tokens` (T) under its name, from float64 copies of `weights`."""
    w = dense(weights, config.get("quantization"))
    eps = config["rms_norm_eps"]
    probes: dict[str, Array] = {}
    h = probes["embedding"] = w["model.embed_tokens.weight"][list(tokens)]
    for i in range(config["num_hidden_layers"]):
        weight, name = f"model.layers.{i}.", f"layers.{i}."
        x = probes[name + "attn_norm"] = rms_norm(h, w[weight + "input_layernorm.weight"], eps)
        attn = attention({k.removeprefix(weight + "self_attn."): v for k, v in w.items()}, config, i, x)
        probes |= {f"{name}attn.{k}": v for k, v in attn.items()}
        h = probes[name + "attn_residual"] = h + attn["output"]
        x = probes[name + "mlp_norm"] = rms_norm(h, w[weight + "post_attention_layernorm.weight"], eps)
        moe = mixture({k.removeprefix(weight + "mlp."): v for k, v in w.items()}, config, x)
        probes |= {f"{name}moe.{k}": v for k, v in moe.items()}
        h = probes[name + "residual"] = h + moe["output"]
    h = probes["final_norm"] = rms_norm(h, w["model.norm.weight"], eps)
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    probes["logits"] = h @ head.T
    probes["token"] = probes["logits"].argmax(-1)
    return probes


def dense(weights: Mapping[str, Array], quantization: Mapping[str, int] | None) -> dict[str, Array]:
    """float64 copies of `weights`, MLX's affine triples (codes, scales, biases) as scale · code + bias."""
    values = {name: np.asarray(x).astype(np.float64) for name, x in weights.items()}
    for name in [n for n in values if n.endswith(".scales")]:
        stem, scales, biases = name.removesuffix("scales"), values.pop(name), values.pop(name[:-6] + "biases")
        assert quantization is not None
        codes = unpacked(np.asarray(weights[stem + "weight"]), quantization["bits"])
        codes = codes.reshape(*scales.shape, quantization["group_size"])
        value = codes * scales[..., None] + biases[..., None]
        values[stem + "weight"] = value.reshape(*value.shape[:-2], -1)
    return values


def unpacked(words: Array, bits: int) -> Array:
    """Codes of rows of packed uint32: a little-endian bit stream, element i in bits i·bits … of its row."""
    stream = words.astype(np.uint64)[..., None] >> np.arange(32, dtype=np.uint64) & np.uint64(1)
    stream = stream.reshape(*words.shape[:-1], -1, bits)
    return (stream * (1 << np.arange(bits, dtype=np.uint64))).sum(-1).astype(np.float64)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rope(x: Array, theta: float) -> Array:
    """(T, H, Dh) at positions 0…T−1, half-split."""
    half = x.shape[-1] // 2
    angle = np.arange(len(x))[:, None, None] * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1)


def attention(w: Mapping[str, Array], config: Mapping[str, Any], layer: int, x: Array) -> dict[str, Array]:
    T, Hq, Hkv, Dh = len(x), config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    p = {
        "q_proj": (x @ w["q_proj.weight"].T).reshape(T, Hq, Dh),
        "k_proj": (x @ w["k_proj.weight"].T).reshape(T, Hkv, Dh),
    }
    p["q"], p["k"] = rope(p["q_proj"], config["rope_theta"]), rope(p["k_proj"], config["rope_theta"])
    p["v"] = (x @ w["v_proj.weight"].T).reshape(T, Hkv, Dh)
    window = config["sliding_window"] if config["layer_types"][layer] == "sliding_attention" else T
    p["context"] = np.zeros((T, Hq, Dh))
    for i in range(T):
        first = max(0, i - window + 1)
        for head in range(Hq):
            kv = head // (Hq // Hkv)
            scores = p["k"][first : i + 1, kv] @ p["q"][i, head] * Dh**-0.5
            if config["attention_sinks"]:
                scores = np.append(scores, w["sinks"][head])
            e = np.exp(scores - scores.max())
            p["context"][i, head] = (e / e.sum())[: i + 1 - first] @ p["v"][first : i + 1, kv]
    p["output"] = p["context"].reshape(T, -1) @ w["o_proj.weight"].T
    return p


def select(scores: Array, k: int) -> Array:
    """(T, E) → (T, K): descending, lowest id on ties."""
    return np.argsort(-scores, axis=-1, kind="stable")[:, :k]


def route(x: Array, bias: Array | None, config: Mapping[str, Any]) -> tuple[Array, Array]:
    """(T, E) logits → (T, K) ids and weights."""
    k, kind = config["num_experts_per_tok"], config["scoring_func"]
    if kind == "topk_softmax":
        ids = select(x, k)
        e = np.exp(np.take_along_axis(x, ids, -1) - x.max(-1, keepdims=True))
        return ids, e / e.sum(-1, keepdims=True) * config["routed_scaling_factor"]
    if kind == "softmax":
        e = np.exp(x - x.max(-1, keepdims=True))
        scores = e / e.sum(-1, keepdims=True)
    else:
        scores = 1 / (1 + np.exp(-x)) if kind == "sigmoid" else np.sqrt(np.logaddexp(x, 0))
    ids = select(scores if bias is None else scores + bias, k)
    weights = np.take_along_axis(scores, ids, -1)
    if config["norm_topk_prob"]:
        total = weights.sum(-1, keepdims=True)
        weights = (
            weights / {"sqrtsoftplus": np.maximum(total, 6.1e-5), "sigmoid": total + 1e-20, "softmax": total}[kind]
        )
    return ids, weights * config["routed_scaling_factor"]


def swiglu(gate: Array, up: Array, limit: float | None) -> Array:
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return gate / (1 + np.exp(-gate)) * up


def mixture(w: Mapping[str, Array], config: Mapping[str, Any], x: Array) -> dict[str, Array]:
    limit = config["swiglu_limit"]
    p = {"router_logits": x @ w["gate.weight"].T}
    p["experts"], p["weights"] = route(p["router_logits"], w.get("gate.e_score_correction_bias"), config)
    chosen = {name: w[f"experts.{name}_proj.weight"][p["experts"]] for name in ("gate", "up", "down")}
    p["gate"] = np.einsum("td,tkfd->tkf", x, chosen["gate"])
    p["up"] = np.einsum("td,tkfd->tkf", x, chosen["up"])
    p["act"] = swiglu(p["gate"], p["up"], limit)
    p["down"] = np.einsum("tkf,tkdf->tkd", p["act"], chosen["down"])
    output = (p["weights"][..., None] * p["down"]).sum(1)
    if config["n_shared_experts"]:
        p["shared_gate"] = x @ w["shared_experts.gate_proj.weight"].T
        p["shared_up"] = x @ w["shared_experts.up_proj.weight"].T
        p["shared_act"] = swiglu(p["shared_gate"], p["shared_up"], limit)
        p["shared_down"] = p["shared_act"] @ w["shared_experts.down_proj.weight"].T
        output = output + p["shared_down"]
    p["output"] = output
    return p
