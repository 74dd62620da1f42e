"""Two layers of causal attention with rotated positions, the second with a window; random weights, no tricks."""

import numpy as np

V, WIDTH, LAYERS, WINDOW = 32, 16, 2, 6
RNG = np.random.default_rng(0)
EMBEDDING = RNG.standard_normal((V, WIDTH)).astype(np.float32)
WEIGHTS = [(RNG.standard_normal((4, WIDTH, WIDTH)) / WIDTH**0.5).astype(np.float32) for _ in range(LAYERS)]
FREQUENCY = 100.0 ** -(np.arange(WIDTH // 2) / (WIDTH // 2))


class Cache:
    """Keys and values of one layer, and the position that each row is at."""

    def __init__(self, left_padding=None):
        self.keys = self.values = None
        self.seen = 0
        self.padding = None if left_padding is None else np.array(left_padding)

    def update(self, keys, values):
        if self.keys is not None:
            keys = np.concatenate([self.keys, keys], axis=1)
            values = np.concatenate([self.values, values], axis=1)
        self.keys, self.values = keys, values
        self.seen = keys.shape[1]
        return keys, values

    def is_trimmable(self):
        return True

    def trim(self, n):
        self.keys, self.values = self.keys[:, : self.seen - n], self.values[:, : self.seen - n]
        self.seen -= n
        return n


def rotate(x, position):
    angle = position[..., None] * FREQUENCY
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(np.float32)


def attend(x, weights, cache, window):
    B, n, _ = x.shape
    padding = np.zeros(B, int) if cache.padding is None else cache.padding
    start = cache.seen
    position = start + np.arange(n)[None] - padding[:, None]
    q, k, v = (x @ w for w in weights[:3])
    keys, values = cache.update(rotate(k, position), v)
    query, key = start + np.arange(n)[:, None], np.arange(start + n)[None]
    seen = (key <= query) & (key > query - window)
    seen = seen[None] & (key[None] >= padding[:, None, None])
    scores = np.where(seen, rotate(q, position) @ keys.transpose(0, 2, 1) / WIDTH**0.5, -1e30)
    p = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    p = p / np.maximum(p.sum(-1, keepdims=True), 1e-30)
    return (p @ values) @ weights[3]


class Decoder:
    """decoder(tokens, cache=None) -> logits."""

    vocab_size = V

    def make_cache(self, left_padding=None):
        return [Cache(left_padding) for _ in range(LAYERS)]

    def __call__(self, tokens, cache=None):
        cache = self.make_cache() if cache is None else cache
        x = EMBEDDING[tokens]
        for layer, weights in enumerate(WEIGHTS):
            h = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
            x = x + attend(h, weights, cache[layer], WINDOW if layer else 10**6)
        return x @ EMBEDDING.T


candidate = Decoder()
