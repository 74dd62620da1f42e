"""A ring of fixed size in MLX: token p ≥ keep lies in place keep + (p − keep) mod (max_size − keep).

Chunks are appended to the ring in order and written into it afterwards.
"""

import mlx.core as mx


class RotatingKVCache:
    def __init__(self, max_size, keep=0):
        self.max_size, self.keep, self.offset = max_size, keep, 0
        self.ring = None

    def place(self, position):
        return position if position < self.keep else self.keep + (position - self.keep) % (self.max_size - self.keep)

    def update_and_fetch(self, keys, values):
        n, new = keys.shape[2], (keys, values)
        if self.ring is None:
            self.ring = [mx.zeros((*x.shape[:2], self.max_size, x.shape[3]), x.dtype) for x in new]
        before = self.positions()[-(self.max_size - 1) :] if self.max_size > 1 else []
        if self.keep and self.offset >= self.max_size:
            before = [*range(self.keep), *before[self.keep :]]
        if n > 1:
            order = mx.array([self.place(p) for p in before], mx.int32)
            fetched = tuple(
                mx.concatenate([mx.take(old, order, axis=2), x], axis=2) for old, x in zip(self.ring, new, strict=True)
            )
        last = max(0, n - (self.max_size - self.keep))
        wanted = [i for i in range(n) if i >= last or self.offset + i < self.keep]
        places = mx.array([self.place(self.offset + i) for i in wanted], mx.int32)
        chosen = mx.array(wanted, mx.int32)
        for old, x in zip(self.ring, new, strict=True):
            old[:, :, places] = x[:, :, chosen]
        self.offset += n
        if n > 1:
            return fetched
        filled = min(self.offset, self.max_size)
        return tuple(x[:, :, :filled] for x in self.ring)

    def positions(self):
        """The positions that the ring holds, in order."""
        first = max(self.keep, self.offset - (self.max_size - self.keep))
        return [*range(min(self.keep, self.offset)), *range(first, self.offset)]

    def make_mask(self, n, window_size=None, return_array=False):
        if n == 1:
            if window_size is None or window_size >= self.max_size:
                return None
            return self.decode_mask(window_size)
        window = min(window_size or self.max_size, self.max_size)
        held = min(self.offset, self.max_size - 1)
        query, key = mx.arange(held, held + n)[:, None], mx.arange(held + n)
        return (key <= query) & (key > query - window)

    def decode_mask(self, window_size):
        filled = min(self.offset + 1, self.max_size)
        shown = {self.place(p) for p in range(max(0, self.offset + 1 - window_size), self.offset + 1)}
        return mx.array([place in shown for place in range(filled)])

    def is_trimmable(self):
        return self.offset < self.max_size

    def trim(self, n):
        n = min(n, self.offset)
        self.offset -= n
        return n

    @property
    def state(self):
        return self.ring

    @state.setter
    def state(self, ring):
        self.ring = list(ring)

    @property
    def meta_state(self):
        return tuple(map(str, (self.keep, self.max_size, self.offset)))

    @meta_state.setter
    def meta_state(self, meta):
        self.keep, self.max_size, self.offset = map(int, meta)


candidate = RotatingKVCache
