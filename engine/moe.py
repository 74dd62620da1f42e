"""The mixture-of-experts block: router, K routed experts a token, shared experts, and their weighted sum.

B batch, L tokens, D hidden_size, E experts, K experts a token, F moe_intermediate_size.
"""

from __future__ import annotations

import mlx.core as mx

from engine.config import Config, Quantization
from engine.layers import linear, swiglu, switch_linear
from engine.module import Module
from engine.probes import Probe
from engine.router import route

# From this many (token, slot) pairs on, rows are sorted by expert, so that each expert's weights are read once: the
# value is mlx-lm's. Below it the sort costs more than it saves.
SORT_FROM = 64


class Router(Module):
    """(B, L, D) → (B, L, E) logits in float32, from inputs and weights upcast to float32."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.weight = mx.zeros((config.n_routed_experts, config.hidden_size))
        if config.has_correction_bias:
            self.e_score_correction_bias = mx.zeros((config.n_routed_experts,))

    def __call__(self, x: mx.array) -> mx.array:
        return x.astype(mx.float32) @ self.weight.astype(mx.float32).T


class Experts(Module):
    """(B, L, D) and (B, L, K) ids → (B, L, K, D): each chosen expert's output, before its weight."""

    def __init__(self, config: Config, quantization: tuple[Quantization | None, ...]) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        gate, up, down = quantization
        D, E, F = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        self.gate_proj = switch_linear(E, D, F, gate)
        self.up_proj = switch_linear(E, D, F, up)
        self.down_proj = switch_linear(E, F, D, down)

    def __call__(self, x: mx.array, ids: mx.array, probe: Probe | None = None) -> mx.array:
        if ids.size >= SORT_FROM:
            return self._sorted(x, ids, probe)
        x = x[..., None, None, :]
        gate = self.gate_proj(x, ids)
        up = self.up_proj(x, ids)
        act = swiglu(gate, up, self.limit)
        down = self.down_proj(act, ids).squeeze(-2)
        if probe is not None:
            probe("gate", gate.squeeze(-2))
            probe("up", up.squeeze(-2))
            probe("act", act.squeeze(-2))
            probe("down", down)
        return down

    def _sorted(self, x: mx.array, ids: mx.array, probe: Probe | None) -> mx.array:
        """The same, over rows in the order of their experts; what leaves is back in (token, slot) order."""
        shape, K = ids.shape, ids.shape[-1]
        order = mx.argsort(ids.flatten())
        back = mx.argsort(order)
        rows = x.reshape(-1, 1, x.shape[-1])[order // K]
        ids = ids.flatten()[order]
        gate = self.gate_proj(rows, ids, in_order=True)
        up = self.up_proj(rows, ids, in_order=True)
        act = swiglu(gate, up, self.limit)
        down = self.down_proj(act, ids, in_order=True)[back].reshape(*shape, -1)
        if probe is not None:
            probe("gate", gate[back].reshape(*shape, -1))
            probe("up", up[back].reshape(*shape, -1))
            probe("act", act[back].reshape(*shape, -1))
            probe("down", down)
        return down


class SharedExperts(Module):
    """(B, L, D) → (B, L, D): the experts that every token visits, as one of n_shared times the width."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.limit = config.swiglu_limit
        D, wide = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.gate_proj = linear(D, wide, config.quantization)
        self.up_proj = linear(D, wide, config.quantization)
        self.down_proj = linear(wide, D, config.quantization)

    def __call__(self, x: mx.array, probe: Probe | None = None) -> mx.array:
        gate = self.gate_proj(x)
        up = self.up_proj(x)
        act = swiglu(gate, up, self.limit)
        down = self.down_proj(act)
        if probe is not None:
            probe("shared_gate", gate)
            probe("shared_up", up)
            probe("shared_act", act)
            probe("shared_down", down)
        return down


class MoE(Module):
    """(B, L, D) → (B, L, D): Σ over slots of weight · expert output, plus the shared experts' output."""

    def __init__(self, config: Config, quantization: tuple[Quantization | None, ...]) -> None:
        super().__init__()
        self._config = config
        self.gate = Router(config)
        self.experts = Experts(config, quantization)
        if config.n_shared_experts:
            self.shared_experts = SharedExperts(config)

    def __call__(self, x: mx.array, probe: Probe | None = None) -> mx.array:
        logits = self.gate(x)
        ids, weights = self.choose(logits)
        if probe is not None:
            probe("router_logits", logits)
            probe("experts", ids)
            probe("weights", weights)
        down = self.experts(x, ids, probe)
        shared = self.shared_experts(x, probe) if "shared_experts" in self else None
        output = combine(down, weights, shared)
        if probe is not None:
            probe("output", output)
        return output

    def choose(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """(B, L, E) float32 logits → (B, L, K) int32 expert ids and float32 weights, best first."""
        return route(logits, self.gate.get("e_score_correction_bias"), self._config)


def combine(down: mx.array, weights: mx.array, shared: mx.array | None) -> mx.array:
    """(…, K, D), (…, K) and (…, D) → (…, D): Σ weight · down + shared, in float32, rounded once to the dtype of `down`.

    A product and a sum, not a matmul: matmul units may round their float32 operands.
    """
    total = (down.astype(mx.float32) * weights[..., None]).sum(axis=-2)
    if shared is not None:
        total = total + shared.astype(mx.float32)
    return total.astype(down.dtype)
