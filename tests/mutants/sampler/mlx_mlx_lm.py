"""As mlx-lm's: log-probabilities, top-p, min-p, top-k, then a categorical draw at the temperature."""

import mlx.core as mx


def candidate(logits, *, temperature, top_k, top_p, min_p, key):
    x = logits.astype(mx.float32)
    if temperature == 0:
        return mx.argmax(x, axis=-1)
    x = x - mx.logsumexp(x, axis=-1, keepdims=True)
    if 0 < top_p < 1:
        order = mx.argsort(x, axis=-1)
        total = mx.cumsum(mx.take_along_axis(mx.exp(x), order, axis=-1), axis=-1)
        back = mx.argsort(order, axis=-1)
        x = mx.where(mx.take_along_axis(total, back, axis=-1) > 1 - top_p, x, -mx.inf)
    if min_p > 0:
        x = mx.where(x >= mx.max(x, axis=-1, keepdims=True) + mx.log(mx.array(min_p)), x, -mx.inf)
    if 0 < top_k < x.shape[-1]:
        least = mx.sort(x, axis=-1)[..., -top_k][..., None]
        x = mx.where(x >= least, x, -mx.inf)
    return mx.random.categorical(x / temperature, key=key)
