"""What a drift means for the text: agreement of two runs' logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, kw_only=True)
class LogitsAgreement:
    """Two runs' logits over T tokens: share of equal top-1, mean overlap of the top 5 and 20, KL divergence in nats."""

    tokens: int
    top1: float
    top5: float
    top20: float
    kl_mean: float
    kl_max: float
    kl_max_token: int
    max_abs: float
    smallest_margin: float  # gap between the expected run's best and second logit, the smallest over the tokens
    smallest_margin_token: int
    top1_changes: tuple[tuple[int, int, int, float], ...]  # (token, actual id, expected id, expected margin)


def log_softmax(logits: Array) -> Array:
    """Natural logarithm of the softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.astype(np.float64).max(-1, keepdims=True)
    normalised: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised


def top_ids(logits: Array, k: int) -> Array:
    """Ids of the k highest logits of each row, lowest id first among equals."""
    return np.argsort(-logits.astype(np.float64), axis=-1, kind="stable")[:, :k]


def agreement(actual: Array, expected: Array) -> LogitsAgreement:
    """LogitsAgreement of `actual` with `expected`, both [T,V]; KL is KL(expected ‖ actual)."""
    with np.errstate(all="ignore"):
        log_a, log_e = log_softmax(actual), log_softmax(expected)
        kl = np.sum(np.exp(log_e) * (log_e - log_a), axis=-1)
        gap = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    ordered = np.sort(expected.astype(np.float64), axis=-1)
    margins = ordered[:, -1] - ordered[:, -2] if ordered.shape[1] > 1 else np.full(len(ordered), np.inf)
    best_a, best_e = top_ids(actual, 1)[:, 0], top_ids(expected, 1)[:, 0]
    changed = np.flatnonzero(best_a != best_e)
    worst, narrow = int(np.argmax(np.where(np.isnan(kl), np.inf, kl))), int(np.argmin(margins))
    return LogitsAgreement(
        tokens=len(actual),
        top1=float(np.mean(best_a == best_e)),
        top5=_overlap(actual, expected, 5),
        top20=_overlap(actual, expected, 20),
        kl_mean=float(np.mean(kl)),
        kl_max=float(kl[worst]),
        kl_max_token=worst,
        max_abs=float(np.max(gap)),
        smallest_margin=float(margins[narrow]),
        smallest_margin_token=narrow,
        top1_changes=tuple((int(t), int(best_a[t]), int(best_e[t]), float(margins[t])) for t in changed),
    )


def _overlap(actual: Array, expected: Array, k: int) -> float:
    k = min(k, actual.shape[-1])
    pairs = zip(top_ids(actual, k), top_ids(expected, k), strict=True)
    return float(np.mean([len(set(a.tolist()) & set(e.tolist())) / k for a, e in pairs]))
