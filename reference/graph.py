"""The decoder as a list of nodes: one node a probe, in the order of computation.

Every node says which probes it reads, how to compute it (`forward`), and how far honest arithmetic may be from the
exact result for given inputs (`judge`). Running the nodes one after the other is the reference model
(reference/model.py); judging each node on the inputs that another engine recorded is the same-input replay
(reference/replay.py). One list serves both, so what is run and what is judged can't differ.

Formulas: RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021, half-split), attention with sinks (gpt-oss), SwiGLU
(Shazeer 2020), routers as in DeepSeek-V2/V3/V4 and Mixtral.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from reference import bounds, ops
from reference.arithmetic import UNIT_ROUNDOFF, Arithmetic
from reference.bounds import Bounded
from reference.checkpoint import Weight
from reference.config import Config


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A choice of the `k` highest of N scores [T,N] (float64), each known to within `bound` [T,N]."""

    scores: Tensor
    bound: Tensor
    k: int


@dataclass(frozen=True, kw_only=True)
class Node:
    """One probe: what it reads, how it is computed, how it is judged. `claims` is the op's name in an engine's
    arithmetic.
    """

    probe: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]  # without the token axis
    claims: str
    forward: Callable[..., Tensor]
    judge: Callable[..., Bounded | Choice]


Weights = Mapping[str, Weight]


def decoder_graph(config: Config, weights: Weights) -> list[Node]:
    """All nodes of the model. The input "tokens" is int64 [T]; positions are 0…T−1."""
    embedding = weights["model.embed_tokens.weight"]
    nodes = [_embedding(embedding, config)]
    hidden = "embedding"
    for i, window in enumerate(config.windows):
        prefix, tensors = f"layers.{i}.", f"model.layers.{i}."
        nodes += _attention_block(prefix, hidden, tensors, config, weights, window)
        nodes += _moe_block(prefix, tensors, config, weights)
        hidden = prefix + "residual"
    head = embedding if config.tie_word_embeddings else weights["lm_head.weight"]
    nodes += [
        _norm("final_norm", hidden, weights["model.norm.weight"], config),
        _linear("logits", "final_norm", head, (config.vocab_size,), "logits"),
        _token(config),
    ]
    return nodes


def _viewed(found: Bounded, view: Callable[[Tensor], Tensor]) -> Bounded:
    return Bounded(expected=view(found.expected), bound=view(found.bound), likely=view(found.likely))


def _attention_block(
    prefix: str, hidden: str, tensors: str, config: Config, weights: Weights, window: int | None
) -> list[Node]:
    q_shape = (config.num_attention_heads, config.head_dim)
    kv_shape = (config.num_key_value_heads, config.head_dim)
    attn, norm = prefix + "attn.", prefix + "attn_norm"

    def projection(name: str, probe: str, shape: tuple[int, ...], source: str = norm) -> Node:
        return _linear(attn + probe, source, weights[f"{tensors}self_attn.{name}.weight"], shape)

    return [
        _norm(norm, hidden, weights[tensors + "input_layernorm.weight"], config),
        projection("q_proj", "q_proj", q_shape),
        projection("k_proj", "k_proj", kv_shape),
        projection("v_proj", "v", kv_shape),
        _rope(attn + "q", attn + "q_proj", q_shape, config),
        _rope(attn + "k", attn + "k_proj", kv_shape, config),
        _attention(attn, config, weights.get(tensors + "self_attn.sinks"), window),
        projection("o_proj", "output", (config.hidden_size,), source=attn + "context"),
        _add(prefix + "attn_residual", hidden, attn + "output", config),
    ]


def _moe_block(prefix: str, tensors: str, config: Config, weights: Weights) -> list[Node]:
    moe, norm = prefix + "moe.", prefix + "mlp_norm"
    mlp = tensors + "mlp."
    k, f, d = config.num_experts_per_tok, config.moe_intermediate_size, config.hidden_size
    nodes = [
        _norm(norm, prefix + "attn_residual", weights[tensors + "post_attention_layernorm.weight"], config),
        _linear(moe + "router_logits", norm, weights[mlp + "gate.weight"], (config.n_routed_experts,), "router"),
        *_routing(moe, weights.get(mlp + "gate.e_score_correction_bias"), config),
        _experts(moe + "gate", norm, moe, weights[mlp + "experts.gate_proj.weight"], (k, f)),
        _experts(moe + "up", norm, moe, weights[mlp + "experts.up_proj.weight"], (k, f)),
        _swiglu(moe + "act", moe + "gate", moe + "up", (k, f), config),
        _experts(moe + "down", moe + "act", moe, weights[mlp + "experts.down_proj.weight"], (k, d)),
    ]
    if shared := config.n_shared_experts * f:
        expert = mlp + "shared_experts."
        nodes += [
            _linear(moe + "shared_gate", norm, weights[expert + "gate_proj.weight"], (shared,)),
            _linear(moe + "shared_up", norm, weights[expert + "up_proj.weight"], (shared,)),
            _swiglu(moe + "shared_act", moe + "shared_gate", moe + "shared_up", (shared,), config),
            _linear(moe + "shared_down", moe + "shared_act", weights[expert + "down_proj.weight"], (d,)),
        ]
    nodes.append(_combine(moe, with_shared=bool(shared), config=config))
    nodes.append(_add(prefix + "residual", prefix + "attn_residual", moe + "output", config))
    return nodes


def _embedding(table: Weight, config: Config) -> Node:
    def judge(arith: Arithmetic, tokens: Tensor) -> Bounded:
        exact = table.exact[tokens]
        return Bounded(expected=exact, bound=torch.zeros_like(exact), likely=torch.zeros_like(exact))

    return Node(
        probe="embedding",
        inputs=("tokens",),
        shape=(config.hidden_size,),
        claims="embedding",
        forward=lambda tokens, dtype: table.to(dtype)[tokens],
        judge=judge,
    )


def _norm(probe: str, source: str, weight: Weight, config: Config) -> Node:
    eps = config.rms_norm_eps
    return Node(
        probe=probe,
        inputs=(source,),
        shape=(config.hidden_size,),
        claims="rms_norm",
        forward=lambda x, dtype: ops.rms_norm(x, weight.to(dtype), eps),
        judge=lambda arith, x: bounds.rms_norm(x, weight.exact, eps, arith),
    )


def _linear(probe: str, source: str, weight: Weight, shape: tuple[int, ...], claims: str = "") -> Node:
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return (x.flatten(1) @ weight.to(dtype).T).reshape(len(x), *shape)

    def judge(arith: Arithmetic, x: Tensor) -> Bounded:
        flat = bounds.linear(x.flatten(1), weight.exact, arith, abs_w=weight.magnitude)
        return _viewed(flat, lambda tensor: tensor.reshape(len(x), *shape))

    kind = "quantized_linear" if weight.magnitude is not None else "linear"
    return Node(probe=probe, inputs=(source,), shape=shape, claims=claims or kind, forward=forward, judge=judge)


def _rope(probe: str, source: str, shape: tuple[int, ...], config: Config) -> Node:
    base = config.rope_theta
    return Node(
        probe=probe,
        inputs=(source,),
        shape=shape,
        claims="rope",
        forward=lambda x, dtype: ops.rope(x, torch.arange(len(x)), base),
        judge=lambda arith, x: bounds.rope(x, torch.arange(len(x)), base, arith),
    )


def _attention(attn: str, config: Config, sinks: Weight | None, window: int | None) -> Node:
    scale = config.head_dim**-0.5

    # Probes are token-major [T,H,Dh], the formulas head-major [H,T,Dh].
    def forward(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        mask = ops.causal_mask(q.shape[1], k.shape[1], window)
        return ops.attention(q, k, v, scale, mask, None if sinks is None else sinks.to(dtype)).transpose(0, 1)

    def judge(arith: Arithmetic, q: Tensor, k: Tensor, v: Tensor) -> Bounded:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        mask = ops.causal_mask(q.shape[1], k.shape[1], window)
        found = bounds.attention(q, k, v, scale, mask, None if sinks is None else sinks.exact, arith)
        return _viewed(found, lambda tensor: tensor.transpose(0, 1))

    return Node(
        probe=attn + "context",
        inputs=(attn + "q", attn + "k", attn + "v"),
        shape=(config.num_attention_heads, config.head_dim),
        claims="attention",
        forward=forward,
        judge=judge,
    )


def _add(probe: str, left: str, right: str, config: Config) -> Node:
    return Node(
        probe=probe,
        inputs=(left, right),
        shape=(config.hidden_size,),
        claims="add",
        forward=lambda a, b, dtype: a + b,
        judge=lambda arith, a, b: bounds.add(a, b, arith),
    )


def _routing(moe: str, bias: Weight | None, config: Config) -> list[Node]:
    k, scoring, norm, factor = (
        config.num_experts_per_tok,
        config.scoring_func,
        config.norm_topk_prob,
        config.routed_scaling_factor,
    )

    def selection_scores(arith: Arithmetic, logits: Tensor) -> Choice:
        scores = bounds.router_scores(logits, scoring, arith)
        if bias is None:
            return Choice(scores=scores.expected, bound=scores.bound, k=k)
        biased = scores.expected + bias.exact
        rounding = UNIT_ROUNDOFF[arith.accumulate] * (biased.abs() + scores.bound)
        return Choice(scores=biased, bound=scores.bound + rounding, k=k)

    def forward_ids(logits: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.router(logits, k, scoring, None if bias is None else bias.to(dtype), norm, factor)[0]

    def forward_weights(logits: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return ops.router_weights(logits, ids, scoring, norm, factor)

    return [
        Node(
            probe=moe + "experts",
            inputs=(moe + "router_logits",),
            shape=(k,),
            claims="routing",
            forward=forward_ids,
            judge=selection_scores,
        ),
        Node(
            probe=moe + "weights",
            inputs=(moe + "router_logits", moe + "experts"),
            shape=(k,),
            claims="routing",
            forward=forward_weights,
            judge=lambda arith, logits, ids: bounds.router_weights(logits, ids, scoring, None, norm, factor, arith),
        ),
    ]


def _experts(probe: str, source: str, moe: str, stack: Weight, shape: tuple[int, int]) -> Node:
    """A routed projection [T,K,M]: row (t, s) goes through expert ids[t, s]."""

    def rows(x: Tensor, slot: Tensor) -> Tensor:
        return x[slot[:, 0]] if x.dim() == 2 else x[slot[:, 0], slot[:, 1]]

    def forward(x: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(*ids.shape, shape[1], dtype=dtype)
        for expert in sorted(set(ids.flatten().tolist())):
            slot = (ids == expert).nonzero()
            out[slot[:, 0], slot[:, 1]] = rows(x, slot) @ stack.to(dtype)[expert].T
        return out

    def judge(arith: Arithmetic, x: Tensor, ids: Tensor) -> Bounded:
        out = {name: torch.empty(*ids.shape, shape[1], dtype=torch.float64) for name in ("expected", "bound", "likely")}
        for expert in sorted(set(ids.flatten().tolist())):
            slot = (ids == expert).nonzero()
            magnitude = None if stack.magnitude is None else stack.magnitude[expert]
            found = bounds.linear(rows(x, slot), stack.exact[expert], arith, abs_w=magnitude)
            for name, values in out.items():
                values[slot[:, 0], slot[:, 1]] = getattr(found, name)
        return Bounded(**out)

    return Node(
        probe=probe, inputs=(source, moe + "experts"), shape=shape, claims="experts", forward=forward, judge=judge
    )


def _swiglu(probe: str, gate: str, up: str, shape: tuple[int, ...], config: Config) -> Node:
    limit = config.swiglu_limit
    return Node(
        probe=probe,
        inputs=(gate, up),
        shape=shape,
        claims="swiglu",
        forward=lambda g, u, dtype: ops.swiglu(g, u, limit),
        judge=lambda arith, g, u: bounds.swiglu(g, u, limit, arith),
    )


def _combine(moe: str, *, with_shared: bool, config: Config) -> Node:
    def forward(down: Tensor, weights: Tensor, *rest: Tensor, dtype: torch.dtype) -> Tensor:
        out = (down * weights.unsqueeze(-1)).sum(1)
        return out + rest[0] if rest else out

    def judge(arith: Arithmetic, down: Tensor, weights: Tensor, *rest: Tensor) -> Bounded:
        return bounds.weighted_sum(down, weights, rest[0] if rest else None, arith)

    shared = (moe + "shared_down",) if with_shared else ()
    return Node(
        probe=moe + "output",
        inputs=(moe + "down", moe + "weights", *shared),
        shape=(config.hidden_size,),
        claims="combine",
        forward=forward,
        judge=judge,
    )


def _token(config: Config) -> Node:
    return Node(
        probe="token",
        inputs=("logits",),
        shape=(),
        claims="token",
        forward=lambda logits, dtype: logits.argmax(-1),
        judge=lambda arith, logits: Choice(scores=logits, bound=torch.zeros_like(logits), k=1),
    )
