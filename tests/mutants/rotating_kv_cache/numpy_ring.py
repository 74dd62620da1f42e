"""A ring: single tokens go into the oldest place, chunks put it in order and keep what their first query needs."""

import numpy as np


class RotatingKVCache:
    def __init__(self, max_size, keep=0):
        self.max_size, self.keep = max_size, keep
        self.keys = self.values = None
        self.offset = self.index = 0

    def update_and_fetch(self, keys, values):
        if keys.shape[2] == 1:
            self.keys, self.values = self.placed(self.keys, keys), self.placed(self.values, values)
            self.index = self.next() + 1
        else:
            self.keys, self.values = self.appended(self.keys, keys), self.appended(self.values, values)
            self.index = self.keys.shape[2]
        self.offset += keys.shape[2]
        return self.keys.copy(), self.values.copy()

    def next(self):
        """Where a single token goes: behind the others, or over the oldest that isn't kept."""
        return self.keep if self.index >= self.max_size else self.index

    def placed(self, old, new):
        if old is None:
            return new.copy()
        if old.shape[2] > self.max_size:
            old = self.newest(old, self.max_size)
        if old.shape[2] < self.max_size:
            return np.concatenate([old, new], axis=2)
        old[:, :, self.next()] = new[:, :, 0]
        return old

    def appended(self, old, new):
        if old is None:
            return new.copy()
        return np.concatenate([self.newest(self.ordered(old), self.max_size - 1), new], axis=2)

    def ordered(self, x):
        if self.index >= x.shape[2]:
            return x
        return np.concatenate([x[:, :, : self.keep], x[:, :, self.index :], x[:, :, self.keep : self.index]], axis=2)

    def newest(self, x, count):
        """The kept tokens and the newest others, `count` together."""
        excess = x.shape[2] - count
        if excess <= 0:
            return x
        keep = min(self.keep, count)
        return np.concatenate([x[:, :, :keep], x[:, :, keep + excess :]], axis=2)

    def make_mask(self, n, window_size=None, return_array=False):
        if n == 1 and (window_size is None or window_size >= self.max_size):
            return None
        window = min(window_size or self.max_size, self.max_size)
        held = min(self.offset, self.max_size - 1)
        query, key = np.arange(held, held + n)[:, None], np.arange(held + n)
        mask = (key <= query) & (key > query - window)
        if n > 1:
            return mask
        if self.offset < self.max_size:
            return mask
        return np.roll(mask, (0 if self.index >= self.max_size else self.index) + 1, axis=1)

    def is_trimmable(self):
        return self.offset < self.max_size

    def trim(self, n):
        n = min(n, self.offset)
        left = self.offset - n
        self.keys, self.values = self.keys[:, :, :left].copy(), self.values[:, :, :left].copy()
        self.offset = self.index = left
        return n

    def size(self):
        return min(self.offset, self.max_size)

    def empty(self):
        return self.keys is None

    @property
    def state(self):
        return self.keys, self.values

    @state.setter
    def state(self, state):
        self.keys, self.values = state

    @property
    def meta_state(self):
        return tuple(map(str, (self.keep, self.max_size, self.offset, self.index)))

    @meta_state.setter
    def meta_state(self, meta):
        self.keep, self.max_size, self.offset, self.index = map(int, meta)


candidate = RotatingKVCache
