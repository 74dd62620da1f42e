"""A buffer that grows by 256 tokens and returns views of it, in NumPy."""

import numpy as np

STEP = 256


def causal(n, offset, window_size, return_array):
    if window_size is None and n == 1:
        return None
    if window_size is None and not return_array:
        return "causal"
    query, key = np.arange(offset, offset + n)[:, None], np.arange(offset + n)
    mask = key <= query
    return mask if window_size is None else mask & (key > query - window_size)


class KVCache:
    def __init__(self):
        self.keys = self.values = None
        self.offset = 0

    def update_and_fetch(self, keys, values):
        prev, end = self.offset, self.offset + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self.keys, self.values = self.grown(self.keys, keys), self.grown(self.values, values)
        self.keys[:, :, prev:end] = keys
        self.values[:, :, prev:end] = values
        self.offset = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grown(self, old, new):
        rows, heads, n, dim = new.shape
        room = np.zeros((rows, heads, -(-n // STEP) * STEP, dim), new.dtype)
        return room if old is None else np.concatenate([old[:, :, : self.offset], room], axis=2)

    def make_mask(self, n, window_size=None, return_array=False):
        return causal(n, self.offset, window_size, return_array)

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, self.offset)
        self.offset -= n
        return n

    def size(self):
        return self.offset

    def empty(self):
        return self.offset == 0

    @property
    def state(self):
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    @state.setter
    def state(self, state):
        self.keys, self.values = state
        self.offset = self.keys.shape[2]


candidate = KVCache
