"""Codes, scales and biases in six buffers that grow by 256 tokens, in MLX."""

import mlx.core as mx

STEP = 256


class QuantizedKVCache:
    def __init__(self, group_size=64, bits=8):
        self.group_size, self.bits = group_size, bits
        self.keys = self.values = None
        self.offset = 0

    def update_and_fetch(self, keys, values):
        end = self.offset + keys.shape[2]
        self.keys = self.appended(self.keys, mx.quantize(keys, group_size=self.group_size, bits=self.bits))
        self.values = self.appended(self.values, mx.quantize(values, group_size=self.group_size, bits=self.bits))
        self.offset = end
        return tuple(x[:, :, :end] for x in self.keys), tuple(x[:, :, :end] for x in self.values)

    def appended(self, buffers, parts):
        end = self.offset + parts[0].shape[2]
        if buffers is None or end > buffers[0].shape[2]:
            buffers = [self.grown(buffers and buffers[i], part) for i, part in enumerate(parts)]
        for buffer, part in zip(buffers, parts, strict=True):
            buffer[:, :, self.offset : end] = part
        return buffers

    def grown(self, old, new):
        rows, heads, n, dim = new.shape
        room = mx.zeros((rows, heads, -(-n // STEP) * STEP, dim), new.dtype)
        return room if old is None else mx.concatenate([old[:, :, : self.offset], room], axis=2)

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
        return tuple(tuple(x[:, :, : self.offset] for x in parts) for parts in (self.keys, self.values))

    @state.setter
    def state(self, state):
        self.keys, self.values = map(list, state)

    @property
    def meta_state(self):
        return tuple(map(str, (self.offset, self.group_size, self.bits)))

    @meta_state.setter
    def meta_state(self, meta):
        self.offset, self.group_size, self.bits = map(int, meta)


candidate = QuantizedKVCache
