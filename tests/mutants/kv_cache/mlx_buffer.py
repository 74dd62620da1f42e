"""A buffer that grows by 256 tokens, with a counter beside it that attention may add positions by, in MLX."""

import mlx.core as mx

STEP = 256


class KVCache:
    def __init__(self):
        self.buffers = None
        self.offset = 0

    def update_and_fetch(self, keys, values):
        prev, end = self.offset, self.offset + keys.shape[2]
        new = [keys, values]
        if self.buffers is None or end > self.buffers[0].shape[2]:
            self.buffers = [self.grown(i, x) for i, x in enumerate(new)]
        for buffer, x in zip(self.buffers, new, strict=True):
            buffer[:, :, prev:end] = x
        self.offset = end
        return tuple(buffer[:, :, :end] for buffer in self.buffers)

    def grown(self, i, new):
        rows, heads, n, dim = new.shape
        room = mx.zeros((rows, heads, -(-n // STEP) * STEP, dim), new.dtype)
        if self.buffers is None:
            return room
        return mx.concatenate([self.buffers[i][:, :, : self.offset], room], axis=2)

    def make_mask(self, n, window_size=None, return_array=False):
        if n == 1 and window_size is None:
            return None
        query, key = mx.arange(self.offset, self.offset + n)[:, None], mx.arange(self.offset + n)
        mask = key <= query
        return mask if window_size is None else mask & (key > query - window_size)

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, self.offset)
        self.offset -= n
        return n

    @property
    def state(self):
        return tuple(buffer[:, :, : self.offset] for buffer in self.buffers)

    @state.setter
    def state(self, state):
        self.buffers = list(state)

    @property
    def meta_state(self):
        return (str(self.offset),)

    @meta_state.setter
    def meta_state(self, meta):
        self.offset = int(meta[0])


candidate = KVCache
