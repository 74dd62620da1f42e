"""Grouped-query attention with RoPE, a sliding window on some layers and, where the model has them, attention sinks.

B batch, L new tokens, S keys, D hidden_size, Hq and Hkv heads, Dh head_dim. Probes are taken token-major, (B, L, H,
Dh). What a token sees is the cache's to say: position, mask and keys come from there, for one sequence or for a batch.
"""

from __future__ import annotations

import mlx.core as mx

from engine.caches import Cache
from engine.caches.codecs import Fetched
from engine.caches.kinds import Quantized
from engine.config import Config
from engine.layers import linear
from engine.masks import Mask
from engine.module import Module
from engine.probes import Probe
from engine.sdpa import quantized_sdpa, sdpa, softmax


class Attention(Module):
    """(B, L, D) → (B, L, D): softmax(q·kᵀ·Dh^−½ over the visible keys and the sink) · v, projected."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.n_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        self.rope_theta = config.rope_theta
        D, queries, keys = config.hidden_size, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        self.q_proj = linear(D, queries, config.quantization)
        self.k_proj = linear(D, keys, config.quantization)
        self.v_proj = linear(D, keys, config.quantization)
        self.o_proj = linear(queries, D, config.quantization)
        if config.attention_sinks:
            self.sinks = mx.zeros((self.n_heads,))

    def __call__(self, x: mx.array, cache: Cache, probe: Probe | None = None) -> mx.array:
        B, L, _ = x.shape
        q = self.q_proj(x).reshape(B, L, self.n_heads, self.head_dim)
        k = self.k_proj(x).reshape(B, L, self.n_kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(B, L, self.n_kv_heads, self.head_dim)
        if probe is not None:
            probe("q_proj", q)
            probe("k_proj", k)
        offset = cache.offset
        q = self.rope(q.swapaxes(1, 2), offset, "q")
        k = self.rope(k.swapaxes(1, 2), offset, "k")
        if probe is not None:
            probe("q", q.swapaxes(1, 2))
            probe("k", k.swapaxes(1, 2))
            probe("v", v)

        mask = cache.make_mask(L)
        keys, values = cache.update_and_fetch(k, v.swapaxes(1, 2))
        context = self.attend(q, keys, values, mask, cache).swapaxes(1, 2)
        output = self.o_proj(context.reshape(B, L, -1))
        if probe is not None:
            probe("context", context)
            probe("output", output)
        return output

    def attend(self, q: mx.array, keys: Fetched, values: Fetched, mask: Mask, cache: Cache) -> mx.array:
        """q (B, Hq, L, Dh) over what `cache` returned → (B, Hq, L, Dh), by the route that fits its form."""
        sinks: mx.array | None = self.get("sinks")
        if isinstance(keys, mx.array) and isinstance(values, mx.array):
            return sdpa(q, keys, values, scale=self.scale, mask=mask, sinks=sinks)
        assert isinstance(cache, Quantized) and isinstance(keys, tuple) and isinstance(values, tuple)
        return quantized_sdpa(
            q,
            keys,
            values,
            scale=self.scale,
            mask=mask,
            sinks=sinks,
            group_size=cache.group_size,
            bits=cache.bits,
            softmax=self.softmax,
        )

    def softmax(self, scores: mx.array) -> mx.array:
        """(…, S) float32 → (…, S): softmax over the last axis, for quantised keys; dense ones have it fused."""
        return softmax(scores)

    def rope(self, x: mx.array, offset: int | mx.array, probe: str) -> mx.array:
        """(B, H, L, Dh) at positions offset…, one offset for all rows or (B,): half-split pairs (j, j + Dh/2), angle
        position · theta^(−2j/Dh). `probe` says what is turned, q or k."""
        return mx.fast.rope(x, self.head_dim, traditional=False, base=self.rope_theta, scale=1.0, offset=offset)
