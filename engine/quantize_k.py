"""The search for Q4_K and Q2_K blocks: 256 values as d·scale·q − dmin·min, in runs of 32 or 16.

Three stages, each judged by Σ weight·(decoded − value)²: a real step and offset for each run alone (candidate steps,
each refined by least squares); float16 d and dmin, of those that put the largest step and offset at one of the top
codes; the runs' integer neighbours and a least-squares d and dmin, by turns. n blocks, S runs a block, L values a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
# Smallest positive float16 (2⁻²⁴): what a step that rounds to zero is tried as.
_LEAST_HALF = np.float16(6e-8)
_ONE = np.ones((1, 1, 1), np.float32)
_LARGEST_HALF = np.float32(65504)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """run: values that share a scale; top: largest code of a value; scale_top: largest code of a scale or min."""

    run: int
    top: int
    scale_top: int

    @property
    def steps(self) -> tuple[float, ...]:
        """How many steps a run's range is cut into: every whole number, and finer around the top."""
        around = np.arange(-0.9, 1.0, 0.1) if self.top == 15 else np.arange(-0.8, 0.9, 0.1)
        return tuple(dict.fromkeys([*map(float, range(1, self.top + 1)), *(round(self.top + a, 1) for a in around)]))


_Q4_K = _Form(run=32, top=15, scale_top=63)
_Q2_K = _Form(run=16, top=3, scale_top=15)


@dataclass
class _State:
    """d, dmin (n, 1, 1) float32 that are float16 values; scale, least (n, S, 1) codes; error (n, S, 1)."""

    d: Array
    dmin: Array
    scale: Array
    least: Array
    error: Array


def fit_q4_k(x: Array, weight: Array | None) -> tuple[Array, Array]:
    """(n, 256) → (n, 144) blocks: d, dmin, scales[12], qs[128]; and their values."""
    state, q, values = _search(x, weight, _Q4_K)
    scale, least = (codes[..., 0].astype(np.uint8) for codes in (state.scale, state.least))
    packed = [
        scale[:, :4] | scale[:, 4:] >> 4 << 6,
        least[:, :4] | least[:, 4:] >> 4 << 6,
        scale[:, 4:] & 15 | (least[:, 4:] & 15) << 4,
    ]
    nibbles = q.astype(np.uint8).reshape(-1, 4, 2, 32)
    low_high = nibbles[:, :, 0] | nibbles[:, :, 1] << 4
    return np.concatenate([_half(state.d), _half(state.dmin), *packed, low_high.reshape(-1, 128)], axis=-1), values


def fit_q2_k(x: Array, weight: Array | None) -> tuple[Array, Array]:
    """(n, 256) → (n, 84) blocks: scales[16], qs[64], d, dmin; and their values."""
    state, q, values = _search(x, weight, _Q2_K)
    scale, least = (codes[..., 0].astype(np.uint8) for codes in (state.scale, state.least))
    pairs = q.astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = pairs[:, :, 0] | pairs[:, :, 1] << 2 | pairs[:, :, 2] << 4 | pairs[:, :, 3] << 6
    return np.concatenate([scale | least << 4, packed.reshape(-1, 64), _half(state.d), _half(state.dmin)], -1), values


def _half(value: Array) -> Array:
    """(n, 1, 1) float32 → (n, 2) bytes of its float16."""
    return np.ascontiguousarray(value.reshape(-1, 1).astype(np.float16)).view(np.uint8)


def _search(x: Array, weight: Array | None, form: _Form) -> tuple[_State, Array, Array]:
    """(n, 256) → the chosen scales, codes (n, S, L) and decoded values (n, 256)."""
    runs = x.reshape(len(x), -1, form.run)
    weight = None if weight is None else weight.reshape(runs.shape)
    step, offset = _fit_runs(runs, weight, form)
    state = _fit_scales(runs, weight, form, step, offset)
    for _ in range(2):
        state = _better(state, _neighbours(runs, weight, form, state))
        state = _better(state, _refit(runs, weight, form, state))
    q, values = _encode(runs, form, state.d * state.scale, state.dmin * state.least)
    return state, q, values.reshape(x.shape)


def ordered_sum(values: Array, axis: int = -1) -> Array:
    """Sum over `axis`, kept with length 1, by halves: the same bits on every machine.

    NumPy's own sum adds in an order that depends on the processor's vector width, and a search that compares such sums
    chooses other scales on other machines: a golden of quantised weights would be another model's there.
    """
    values = np.moveaxis(values, axis, -1)
    while (n := values.shape[-1]) > 1:
        added = values[..., : n // 2] + values[..., n // 2 : 2 * (n // 2)]
        values = np.concatenate([added, values[..., -1:]], axis=-1) if n % 2 else added
    return np.moveaxis(values, -1, axis)


def _sum(weight: Array | None, values: Array) -> Array:
    """(n, S, L) → (n, S, 1), weighted."""
    return ordered_sum(values if weight is None else weight * values)


def _ratio(a: Array, b: Array) -> Array:
    """a/b in float32, 0 where b is 0 or too small for the quotient."""
    with np.errstate(over="ignore"):
        result = np.divide(a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b > 0)
    return np.where(np.isfinite(result), result, np.float32(0))


def _encode(x: Array, form: _Form, step: Array, offset: Array) -> tuple[Array, Array]:
    """Nearest codes of x ≈ step·q − offset, and what they decode to, rounded as a reader of the block rounds."""
    q = np.clip(np.rint((x + offset) * _ratio(_ONE, step)), 0, form.top)
    return q, step * q - offset


def _error(x: Array, weight: Array | None, form: _Form, step: Array, offset: Array) -> Array:
    return _sum(weight, np.square(_encode(x, form, step, offset)[1] - x))


def _fit_runs(x: Array, weight: Array | None, form: _Form) -> tuple[Array, Array]:
    """(n, S, L) → the best real step and offset, both ≥ 0, of each run by itself: (n, S, 1) each."""
    low = np.minimum(x.min(axis=-1, keepdims=True), 0)
    span = np.maximum(x.max(axis=-1, keepdims=True) - low, 0)
    count, total = _sum(weight, np.ones_like(x)), _sum(weight, x)
    best_step, best_offset = _ratio(span, np.full_like(span, form.top)), -low
    best = _error(x, weight, form, best_step, best_offset)
    for steps in form.steps:
        q = np.clip(np.rint((x - low) * _ratio(np.full_like(span, steps), span)), 0, form.top)
        step, offset = _least_squares(_sum(weight, q * q), _sum(weight, q), count, _sum(weight, q * x), total)
        error = _sum(weight, np.square(step * q - offset - x))
        wins = error < best
        best_step, best_offset = np.where(wins, step, best_step), np.where(wins, offset, best_offset)
        best = np.where(wins, error, best)
    return best_step, best_offset


def _least_squares(aa: Array, ab: Array, bb: Array, ax: Array, bx: Array) -> tuple[Array, Array]:
    """s, t ≥ 0 that minimise Σ(s·a − t·b − x)², from the weighted sums of products of a, b and x."""
    determinant = aa * bb - ab * ab
    s, t = _ratio(bb * ax - ab * bx, determinant), _ratio(ab * ax - aa * bx, determinant)
    a_alone, b_alone = np.maximum(_ratio(ax, aa), 0), np.maximum(_ratio(-bx, bb), 0)
    singular = determinant <= 1e-6 * aa * bb
    no_b = (t < 0) | (singular & (aa > 0))
    no_a = (s < 0) | (singular & (aa <= 0))
    zero = np.float32(0)
    return np.where(no_a, zero, np.where(no_b, a_alone, s)), np.where(no_a, b_alone, np.where(no_b, zero, t))


def _to_half(value: Array) -> Array:
    """float32 → the nearest float16 as float32; what is positive stays so, what is too large stays finite."""
    rounded = np.minimum(value, _LARGEST_HALF).astype(np.float16)
    return np.where((value > 0) & (rounded == 0), _LEAST_HALF, rounded).astype(np.float32)


def _fit_scales(x: Array, weight: Array | None, form: _Form, step: Array, offset: Array) -> _State:
    """The float16 d and dmin among those that put the largest step and offset at one of the four top codes."""
    best: _State | None = None
    tops = [np.float32(form.scale_top - k) for k in range(4)]
    largest_step, largest_offset = step.max(axis=1, keepdims=True), offset.max(axis=1, keepdims=True)
    for d in (_to_half(largest_step / top) for top in tops):
        scale = np.clip(np.rint(step * _ratio(_ONE, d)), 0, form.scale_top)
        for dmin in (_to_half(largest_offset / top) for top in tops):
            least = np.clip(np.rint(offset * _ratio(_ONE, dmin)), 0, form.scale_top)
            error = _error(x, weight, form, d * scale, dmin * least)
            found = _State(d=d, dmin=dmin, scale=scale, least=least, error=error)
            best = found if best is None else _better(best, found)
    assert best is not None
    return best


def _better(old: _State, new: _State) -> _State:
    """Block by block the state of the smaller error; the old one on a tie."""
    wins = ordered_sum(new.error, 1) < ordered_sum(old.error, 1)
    names = ("d", "dmin", "scale", "least", "error")
    return _State(**{name: np.where(wins, getattr(new, name), getattr(old, name)) for name in names})


def _neighbours(x: Array, weight: Array | None, form: _Form, state: _State) -> _State:
    """Each run's best codes of scale and min within one of what they are, d and dmin kept."""
    scale, least, best = state.scale, state.least, state.error
    for up in (-1, 0, 1):
        for right in (-1, 0, 1):
            a, b = (np.clip(code + k, 0, form.scale_top) for code, k in ((state.scale, up), (state.least, right)))
            error = _error(x, weight, form, state.d * a, state.dmin * b)
            wins = error < best
            scale, least, best = np.where(wins, a, scale), np.where(wins, b, least), np.where(wins, error, best)
    return _State(d=state.d, dmin=state.dmin, scale=scale, least=least, error=best)


def _refit(x: Array, weight: Array | None, form: _Form, state: _State) -> _State:
    """The same codes with d and dmin by least squares over the whole block, rounded to float16."""
    q, _ = _encode(x, form, state.d * state.scale, state.dmin * state.least)
    a, b = state.scale * q, np.broadcast_to(state.least, x.shape)
    aa, ab, bb, ax, bx = (
        ordered_sum(_sum(weight, left * right), 1) for left, right in ((a, a), (a, b), (b, b), (a, x), (b, x))
    )
    d, dmin = (_to_half(value) for value in _least_squares(aa, ab, bb, ax, bx))
    error = _error(x, weight, form, d * state.scale, dmin * state.least)
    return _State(d=d, dmin=dmin, scale=state.scale, least=state.least, error=error)
