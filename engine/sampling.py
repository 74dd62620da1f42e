"""Drawing the next token on the device: temperature, top-k, top-p and min-p, each row of a batch by itself.

The filters look at the untempered distribution, as mlx-lm's and llama.cpp's do, and the temperature comes last. Each of
the three cuts the whole distribution, so they commute: a token is kept if all three keep it. (llama.cpp's top-p sees
what its top-k has left; mlx-lm's, which goes first, is this one.) One order decides ties for all of them, descending
logit and then ascending id: top-k keeps exactly k tokens, and top-p the shortest prefix of that order whose mass
reaches p.

A drawn token is the argmax of tempered logits plus Gumbel noise, which has the softmax's distribution. The noise
belongs to the row's key and to the token's id, so what a row draws depends on neither its neighbours nor its place.

The input is raw logits. Only top-p needs probabilities, so only then is a softmax taken; everything else is unchanged
when a constant is added to a row. B rows, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

# For records of how a token was chosen.
ORDER = "top_p, min_p and top_k each of the untempered distribution, then temperature"
# What a row without any token to draw gets: logits that are all −inf, or that have a NaN.
NOTHING = -1
# Room for a token id below the score in one sort key.
_ID_RANGE = 1 << 31
_LEAST = float(np.finfo(np.float32).min)
# Below this a float32 is subnormal, and a backend that flushes those would divide by 0.
_COLDEST = float(np.finfo(np.float32).tiny)


def sampler(
    logits: mx.array,
    *,
    temperature: ArrayLike = 1.0,
    top_k: ArrayLike = 0,
    top_p: ArrayLike = 1.0,
    min_p: ArrayLike = 0.0,
    key: mx.array | None = None,
) -> mx.array:
    """Raw logits [B, V] or [V] → int32 ids [B] or a scalar; NOTHING (−1) for a row with nothing to draw.

    Each option is a number or one number a row. temperature 0 takes the largest logit, the lowest id among equals.
    top_k 0 and top_p 1 and min_p 0 keep everything; top_k keeps the k first, top_p those with less than p of the mass
    before them, min_p those with at least min_p times the largest probability. −inf is never drawn.

    key: a key [2] for each row, uint32 [B, 2]; or a single one, [2], from which `mx.random.split` makes those; None:
    MLX's global generator. Raises ValueError for an option out of range or of another number of rows.
    """
    if logits.ndim not in (1, 2) or not mx.issubdtype(logits.dtype, mx.floating):
        raise ValueError(f"logits are {logits.dtype} of shape {logits.shape}; floating [B, V] or [V] are expected")
    rows = logits if logits.ndim == 2 else logits[None]
    x = rows.astype(mx.float32)
    options = _Options(rows, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids = mx.argmax(x, axis=-1).astype(mx.int32)
    if options.temperature.any():
        hot = mx.array(options.temperature > 0)
        ids = mx.where(hot, _draw(x, options, _keys(key, x.shape[0])), ids)
    drawable = (x > -mx.inf).any(axis=-1) & ~mx.isnan(x).any(axis=-1)
    ids = mx.where(drawable, ids, NOTHING)
    return ids if logits.ndim == 2 else ids[0]


def shift_invariant(
    *, top_p: ArrayLike = 1.0, repetition: ArrayLike = 1.0, presence: ArrayLike = 0.0, frequency: ArrayLike = 0.0
) -> bool:
    """Whether the token can't depend on a constant added to a row's logits: no row has a penalty or an active top-p.

    Then, and only then, may log-softmax before the sampler be left out, or done.
    """
    penalised = bool((np.asarray(repetition) != 1).any() or np.any(presence) or np.any(frequency))
    return not penalised and not (np.asarray(top_p) < 1).any()


class _Options:
    """Per-row options as float64 (top_k: int64) [B], checked."""

    def __init__(
        self, rows: mx.array, *, temperature: ArrayLike, top_k: ArrayLike, top_p: ArrayLike, min_p: ArrayLike
    ) -> None:
        B, V = rows.shape
        self.temperature = _per_row(temperature, B, "temperature")
        self.top_p = _per_row(top_p, B, "top_p")
        self.min_p = _per_row(min_p, B, "min_p")
        k = _per_row(top_k, B, "top_k")
        _demand((self.temperature >= 0) & np.isfinite(self.temperature), "temperature", temperature, "0 or more")
        _demand((self.top_p > 0) & (self.top_p <= 1), "top_p", top_p, "above 0 and up to 1 (1: off)")
        _demand((self.min_p >= 0) & (self.min_p <= 1), "min_p", min_p, "from 0 (off) to 1")
        _demand((k >= 0) & (k == np.floor(k)), "top_k", top_k, "a whole number, 0 (off) or more")
        self.top_k = np.where((k == 0) | (k > V), V, k).astype(np.int64)
        self.cuts_prefix = bool((self.top_k < V).any() or not shift_invariant(top_p=self.top_p))


def _draw(x: mx.array, options: _Options, keys: mx.array) -> mx.array:
    """Float32 [B, V] and keys [B, 2] → [B] int32: a draw from each row's kept tokens at its temperature."""
    V = x.shape[-1]
    largest = x.max(axis=-1, keepdims=True)
    # From the largest down, so that sums with the noise are exact to 2⁻²⁴ of what matters; +inf − inf would be NaN.
    below = mx.where(x == largest, 0.0, x - largest)
    kept = x > -mx.inf
    if options.min_p.any():
        with np.errstate(divide="ignore"):
            kept = kept & (below >= _column(np.log(options.min_p)))
    if options.cuts_prefix:
        kept = kept & _prefix(x, options)
    noise = mx.vmap(lambda key: mx.random.gumbel((V,), key=key))(keys)
    score = below / _column(np.maximum(options.temperature, _COLDEST)) + noise
    # MLX's noise is −inf once in 2³² numbers; the only kept token must stay above those that aren't kept even then.
    score = mx.where(kept, mx.maximum(score, _LEAST), -mx.inf)
    return mx.argmax(score, axis=-1).astype(mx.int32)


def _prefix(x: mx.array, options: _Options) -> mx.array:
    """[B, V] → [B, V] bool: what top-k and top-p keep, a prefix of the order by descending logit, ascending id."""
    V = x.shape[-1]
    order = _order(x)
    ranked = mx.sort(order, axis=-1)
    kept = mx.array(options.top_k.astype(np.int32))[:, None]
    if not shift_invariant(top_p=options.top_p):
        ids = (ranked & (_ID_RANGE - 1)).astype(mx.int32)
        p = mx.take_along_axis(mx.softmax(x, axis=-1), ids, axis=-1)
        before = mx.cumsum(p, axis=-1, inclusive=False)
        within = (before < _column(options.top_p)).sum(axis=-1, keepdims=True)
        # A sum of rounded probabilities may reach 1 before the last token, so 1 is no threshold: it's "off".
        kept = mx.minimum(kept, mx.where(_column(options.top_p) < 1, mx.maximum(within, 1), V))
    return order <= mx.take_along_axis(ranked, kept - 1, axis=-1)


def _order(x: mx.array) -> mx.array:
    """Float32 [B, V] → int64 [B, V], all different, ascending in the order by descending value and ascending id.

    A float32's bits, as an integer with negative values mirrored, are ordered as the floats are, once −0 is made +0.
    """
    bits = mx.where(x == 0, 0.0, x).view(mx.int32)
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    return mx.arange(x.shape[-1], dtype=mx.int64) - ordered * _ID_RANGE


def _keys(key: mx.array | None, B: int) -> mx.array:
    if key is None:
        return mx.random.randint(-(1 << 31), (1 << 31) - 1, (B, 2), dtype=mx.int32).view(mx.uint32)
    if key.dtype != mx.uint32 or key.shape not in ((2,), (B, 2)):
        raise ValueError(
            f"key is {key.dtype} of shape {key.shape}; a uint32 [2] of mx.random.key, or one for each of {B} rows, "
            "is expected"
        )
    return key if key.ndim == 2 else mx.random.split(key, B)


def _per_row(value: ArrayLike, B: int, name: str) -> NDArray[np.float64]:
    array = np.asarray(value, dtype=np.float64)
    if array.shape not in ((), (B,)):
        raise ValueError(f"{name} has shape {array.shape}; a number, or one for each of {B} rows, is expected")
    return np.broadcast_to(array, (B,))


def _demand(fits: NDArray[np.bool_], name: str, value: ArrayLike, wanted: str) -> None:
    if not fits.all():
        raise ValueError(f"{name} is {value!r}; {wanted} is expected")


def _column(values: NDArray[np.float64]) -> mx.array:
    return mx.array(values.astype(np.float32))[:, None]
