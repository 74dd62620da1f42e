"""The decoder: embedding, layers of attention and mixture of experts, final norm, head. One module tree whose flattened
parameter names are the checkpoint's tensor names.

B batch, L tokens, D hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx

from engine.attention import Attention
from engine.caches import Cache
from engine.config import Config, Quantization
from engine.layers import linear
from engine.module import Module
from engine.moe import MoE
from engine.probes import Probe, scoped

# Which quantisation each stacked projection (gate, up, down) of a layer has; experts from a GGUF file have none.
ExpertQuantization = Mapping[int, tuple[Quantization | None, Quantization | None, Quantization | None]]


class RMSNorm(Module):
    """(…, D) → (…, D): x / sqrt(mean(x²) + eps) · weight."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = mx.ones((config.hidden_size,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)


class Embedding(Module):
    """(B, L) ids → (B, L, D); also the head of a model with tied embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = mx.zeros((config.vocab_size, config.hidden_size))

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.weight[tokens]

    def as_linear(self, x: mx.array) -> mx.array:
        """(B, L, D) → (B, L, V)."""
        return x @ self.weight.T


class DecoderLayer(Module):
    """(B, L, D) → (B, L, D): h += attention(norm(h)); h += moe(norm(h))."""

    def __init__(self, config: Config, experts: tuple[Quantization | None, ...]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MoE(config, experts)

    def __call__(self, h: mx.array, cache: Cache, probe: Probe | None = None) -> mx.array:
        x = self.input_layernorm(h)
        if probe is not None:
            probe("attn_norm", x)
        h = h + self.self_attn(x, cache, scoped(probe, "attn"))
        x = self.post_attention_layernorm(h)
        if probe is not None:
            probe("attn_residual", h)
            probe("mlp_norm", x)
        h = h + self.mlp(x, scoped(probe, "moe"))
        if probe is not None:
            probe("residual", h)
        return h


class DecoderStack(Module):
    """(B, L) ids → (B, L, D): everything under the checkpoint's `model.`."""

    def __init__(self, config: Config, experts: ExpertQuantization) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config)
        self.layers = [DecoderLayer(config, experts[i]) for i in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config)

    def __call__(self, tokens: mx.array, cache: Sequence[Cache], probe: Probe | None = None) -> mx.array:
        h = self.embed_tokens(tokens)
        if probe is not None:
            probe("embedding", h)
        for i, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            h = layer(h, layer_cache, scoped(probe, f"layers.{i}"))
        h = self.norm(h)
        if probe is not None:
            probe("final_norm", h)
        return h


class Decoder(Module):
    """(B, L) int32 ids → (B, L, V) logits in the run's dtype."""

    def __init__(self, config: Config, experts: ExpertQuantization) -> None:
        super().__init__()
        self.model = DecoderStack(config, experts)
        if not config.tie_word_embeddings:
            self.lm_head = linear(config.hidden_size, config.vocab_size, config.quantization)

    def __call__(self, tokens: mx.array, cache: Sequence[Cache], probe: Probe | None = None) -> mx.array:
        h = self.model(tokens, cache, probe)
        logits = self.lm_head(h) if "lm_head" in self else self.model.embed_tokens.as_linear(h)
        if probe is not None:
            probe("logits", logits)
        return logits
