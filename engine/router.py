"""The router's arithmetic: from logits to the experts a token visits and their weights, all in float32.

Four scoring functions. The two with independent scores (sqrtsoftplus, sigmoid) select by score plus a per-expert bias
and weigh by the score alone. The order of the slots is part of the result: descending selection score, lowest id on
ties. T stands for any leading axes, E experts, K experts a token.
"""

from __future__ import annotations

import mlx.core as mx

from engine.config import Config

# Lower limits of the sum that weights are divided by, in the published routers: DeepSeek V4's and V3's.
_SQRTSOFTPLUS_FLOOR = 6.1e-5
_SIGMOID_EPS = 1e-20
# Room below the score in one sort key for an id: any int32, as top_k ranks vocabularies too.
_ID_RANGE = 1 << 31


def route(logits: mx.array, bias: mx.array | None, config: Config) -> tuple[mx.array, mx.array]:
    """(T, E) float32 logits → (T, K) int32 expert ids and (T, K) float32 weights, best first, as the model's config
    says.
    """
    return choose(
        logits,
        bias,
        k=config.num_experts_per_tok,
        scoring=config.scoring_func,
        norm=config.norm_topk_prob,
        scale=config.routed_scaling_factor,
    )


def choose(
    logits: mx.array, bias: mx.array | None, *, k: int, scoring: str, norm: bool, scale: float
) -> tuple[mx.array, mx.array]:
    """(T, E) float32 logits → (T, K) int32 expert ids and (T, K) float32 weights, best first."""
    if scoring == "topk_softmax":
        ids = top_k(logits, k)
        weights = mx.softmax(mx.take_along_axis(logits, ids, axis=-1), axis=-1)
        return ids, weights * scale
    scores = _scores(logits, scoring)
    ids = top_k(scores if bias is None else scores + bias, k)
    weights = mx.take_along_axis(scores, ids, axis=-1)
    if norm:
        weights = weights / _denominator(weights.sum(axis=-1, keepdims=True), scoring)
    return ids, weights * scale


def sqrtsoftplus(x: mx.array) -> mx.array:
    """sqrt(log(1 + eˣ)) elementwise in float32, accurate for every x.

    Above 20 softplus is x to the last bit. Below −20 it is eˣ, whose root is taken as e^(x/2): eˣ is subnormal from −88
    on and a backend that flushes subnormals would turn distinct scores into a tie at 0.
    """
    middle = mx.sqrt(mx.log1p(mx.exp(mx.clip(x, -20.0, 20.0))))
    return mx.where(x > 20.0, mx.sqrt(mx.maximum(x, 0.0)), mx.where(x < -20.0, mx.exp(x * 0.5), middle))


def top_k(scores: mx.array, k: int) -> mx.array:
    """(T, E) float32 → (T, K) int32: ids of the k largest, descending, lowest id first among equals.

    Sort algorithms differ by backend in what they do with equals, so there are none here: score and id are packed into
    one integer. A float32's bits, as an integer with negative values mirrored, are ordered as the floats are, once −0
    is made +0.
    """
    bits = mx.where(scores == 0, 0.0, scores).view(mx.int32)
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    ids = mx.arange(scores.shape[-1], dtype=mx.int64)
    best = mx.sort(ids - ordered * _ID_RANGE, axis=-1)[..., :k]
    return (best & (_ID_RANGE - 1)).astype(mx.int32)


def _scores(logits: mx.array, scoring_func: str) -> mx.array:
    if scoring_func == "sqrtsoftplus":
        return sqrtsoftplus(logits)
    if scoring_func == "sigmoid":
        return mx.sigmoid(logits)
    return mx.softmax(logits, axis=-1)


def _denominator(total: mx.array, scoring_func: str) -> mx.array:
    if scoring_func == "sqrtsoftplus":
        return mx.maximum(total, _SQRTSOFTPLUS_FLOOR)
    if scoring_func == "sigmoid":
        return total + _SIGMOID_EPS
    return total
