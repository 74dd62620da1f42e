"""The ops of a decoder-only MoE model as plain PyTorch formulas, in the floating dtype of their arguments.

Written to be read against the papers, not to be fast: no op is fused, none calls torch's fused form, and each
computes in float32 or float64 as given. The bounds call them in float64 for the exact result; the reference model
in float32.

Dimensions: T tokens, D hidden size, H heads (Hq query, Hkv key-value), L queries, S keys, Dh head size, Dv value size,
E experts, K experts a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

# DeepSeek V4's router divides by at least this, the least normal float16 rounded down.
SQRTSOFTPLUS_FLOOR = 6.1e-5
# DeepSeek V3's router adds this to the sum of its sigmoids.
SIGMOID_EPS = 1e-20
# PyTorch's softplus: beyond the threshold softplus(x) is x, and below its negative eˣ, to within 2e-9 relative.
SOFTPLUS_THRESHOLD = 20.0
SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D] -> [..., D]: x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019, eq. 4)."""
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def rope_angles(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """positions [T] -> angles [T, Dh/2] in float64: position · base^(−2j/Dh) (Su et al. 2021, eq. 15)."""
    j = torch.arange(head_dim // 2, dtype=torch.float64, device=positions.device)
    return positions.to(torch.float64)[:, None] * base ** (-2.0 * j / head_dim)


def rope(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """x [T, H, Dh], positions [T] -> [T, H, Dh]: rotates the pairs (j, j + Dh/2) (half-split, "NeoX").

    Angles are float64 whatever x is: an angle grows with the position, and so would its rounding.
    """
    angles = rope_angles(positions, x.shape[-1], base)[:, None, :]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def softmax(x: Tensor) -> Tensor:
    """x [..., S] -> [..., S]: exp(x − max) / Σ; a row that is all −inf gives zeros, never NaN."""
    exponents, _ = _exponentials(x, None)
    total = exponents.sum(dim=-1, keepdim=True)
    return exponents / torch.where(total > 0, total, torch.ones_like(total))


def _exponentials(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """exp(scores − m) and exp(sinks − m) (zero without sinks) for the row maximum m over scores and sinks."""
    top = (
        scores.amax(dim=-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    )
    sink = torch.full_like(top, -torch.inf) if sinks is None else sinks.to(top.dtype)[:, None, None].expand_as(top)
    top = torch.maximum(top, sink)
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    return torch.exp(scores - top), torch.exp(sink - top)


def causal_mask(L: int, S: int, window: int | None = None) -> Tensor:
    """-> bool [L, S], True = visible: j to i iff i' − window < j ≤ i', i' = i + S − L (bottom-right aligned)."""
    query = torch.arange(L)[:, None] + (S - L)
    key = torch.arange(S)[None, :]
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def attention_scores(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """q [Hq, L, Dh], k [Hkv, S, Dh] -> (q·scale)·kᵀ [Hq, L, S], −inf where the mask ([L, S] or [Hq, L, S]) is False."""
    scores = (q * scale) @ repeat_heads(k, q.shape[0]).transpose(-1, -2)
    return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """x [Hkv, S, D] -> [heads, S, D]: query head h reads key-value head h // (heads / Hkv)."""
    return x.repeat_interleave(heads // x.shape[0], dim=0)


def attention_probabilities(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """scores [Hq, L, S] -> softmax over the keys and, if given, one more of logit sinks [Hq], which is dropped."""
    exponents, sink = _exponentials(scores, sinks)
    total = exponents.sum(dim=-1, keepdim=True) + sink
    return exponents / torch.where(total > 0, total, torch.ones_like(total))


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """q [Hq, L, Dh], k [Hkv, S, Dh], v [Hkv, S, Dv] -> [Hq, L, Dv]: grouped-query attention with optional sinks [Hq].

    mask is bool [L, S] or [Hq, L, S], True = visible. A row that sees no key gives zeros, with or without a sink.
    Sinks: Xiao et al. 2023 as in gpt-oss, a key of that logit without a value.
    """
    probabilities = attention_probabilities(attention_scores(q, k, scale, mask), sinks)
    return probabilities @ repeat_heads(v, q.shape[0])


def silu(x: Tensor) -> Tensor:
    """x -> x·sigmoid(x)."""
    return x * torch.sigmoid(x)


def swiglu(gate: Tensor, up: Tensor, limit: float | None = None) -> Tensor:
    """gate, up [...] -> silu(gate)·up (Shazeer 2020); with a limit, gate is cut above it and up to ±limit first."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return silu(gate) * up


def router_scores(logits: Tensor, scoring: str) -> Tensor:
    """logits [T, E] -> the scores [T, E] that weights are made of; of topk_softmax, the logits themselves.

    Raises ValueError for a scoring that is not in SCORINGS.
    """
    if scoring == "softmax":
        return softmax(logits)
    if scoring == "topk_softmax":
        return logits
    if scoring == "sigmoid":
        return torch.sigmoid(logits)
    if scoring == "sqrtsoftplus":
        middle = torch.log1p(torch.exp(logits.clamp(-SOFTPLUS_THRESHOLD, SOFTPLUS_THRESHOLD)))
        softplus = torch.where(logits < -SOFTPLUS_THRESHOLD, torch.exp(logits.clamp(max=0.0)), middle)
        return torch.sqrt(torch.where(logits > SOFTPLUS_THRESHOLD, logits, softplus))
    raise ValueError(f"router: unknown scoring {scoring!r}; use one of {', '.join(SCORINGS)}")


def top_k(scores: Tensor, k: int) -> Tensor:
    """scores [T, E] -> ids int64 [T, k] by descending score; of equal scores the lowest id comes first."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def router_weights(logits: Tensor, ids: Tensor, scoring: str, norm: bool, scale: float) -> Tensor:
    """logits [T, E], ids [T, K] -> the weights [T, K] of these experts, whoever chose them.

    norm divides by the sum (sqrtsoftplus: by at least 6.1e-5; sigmoid: plus 1e-20); topk_softmax always sums to scale.
    """
    chosen = router_scores(logits, scoring).gather(-1, ids)
    if scoring == "topk_softmax":
        return softmax(chosen) * scale
    return (chosen / router_denominator(chosen, scoring) if norm else chosen) * scale


def router_denominator(chosen: Tensor, scoring: str) -> Tensor:
    """Scores of the chosen experts [T, K] -> what normalisation divides them by [T, 1]."""
    total = chosen.sum(dim=-1, keepdim=True)
    if scoring == "sqrtsoftplus":
        return total.clamp(min=SQRTSOFTPLUS_FLOOR)
    return total + SIGMOID_EPS if scoring == "sigmoid" else total


def router(
    logits: Tensor, top_k: int, scoring: str, bias: Tensor | None = None, norm: bool = True, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> ids int64 [T, K] and weights [T, K], slots by descending score + bias, ties to the lowest id.

    bias [E] steers the selection only (Wang et al. 2024, auxiliary-loss-free balancing); weights come from the scores.
    """
    scores = router_scores(logits, scoring)
    ids = _top_k(scores if bias is None else scores + bias.to(scores.dtype), top_k)
    return ids, router_weights(logits, ids, scoring, norm, scale)


def penalties(logits: Tensor, counts: Tensor, repetition: float, presence: float, frequency: float) -> Tensor:
    """logits [..., V], counts [..., V] of each id in the history -> penalised logits [..., V].

    Keskar et al. 2019 (a logit above zero is divided by the repetition penalty, one below multiplied) and OpenAI's
    presence and frequency penalties, for ids that occur; the others are left alone.
    """
    scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
    return torch.where(counts > 0, scaled - presence - frequency * counts, logits)


_top_k = top_k  # router's own argument shadows the name
