"""What is held lies in a buffer from place 0 on; cutting copies it to the front."""

import numpy as np

STEP = 256


class ChunkedKVCache:
    def __init__(self, chunk_size):
        self.chunk_size = chunk_size
        self.keys = self.values = None
        self.offset = self.start = 0

    def maybe_trim_front(self):
        held = self.offset - self.start
        if held > self.chunk_size:
            cut = held - self.chunk_size
            self.keys = self.keys[:, :, cut:held].copy()
            self.values = self.values[:, :, cut:held].copy()
            self.start += cut

    def update_and_fetch(self, keys, values):
        prev, end = self.offset - self.start, self.offset - self.start + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self.keys, self.values = self.grown(self.keys, keys), self.grown(self.values, values)
        self.keys[:, :, prev:end] = keys
        self.values[:, :, prev:end] = values
        self.offset += keys.shape[2]
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grown(self, old, new):
        rows, heads, n, dim = new.shape
        room = np.zeros((rows, heads, -(-n // STEP) * STEP, dim), new.dtype)
        return room if old is None else np.concatenate([old[:, :, : self.offset - self.start], room], axis=2)

    def make_mask(self, n, window_size=None, return_array=False):
        held = self.offset - self.start
        query, key = np.arange(held, held + n)[:, None], np.arange(held + n)
        mask = key <= query
        return mask if window_size is None else mask & (key > query - window_size)

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, self.offset - self.start)
        self.offset -= n
        return n

    @property
    def state(self):
        held = self.offset - self.start
        return self.keys[:, :, :held], self.values[:, :, :held]

    @state.setter
    def state(self, state):
        self.keys, self.values = state

    @property
    def meta_state(self):
        return tuple(map(str, (self.chunk_size, self.offset, self.start)))

    @meta_state.setter
    def meta_state(self, meta):
        self.chunk_size, self.offset, self.start = map(int, meta)


candidate = ChunkedKVCache
