"""Codes, scales and biases in six buffers that grow by 256 tokens, in NumPy.

MLX's layout: code·scale + bias, codes back to back in 32-bit words, low bits first.
"""

import numpy as np

STEP = 256


def quantize(x, group_size, bits):
    """x [..., D] -> codes u32 [..., D·bits/32], scales and biases [..., D/group_size] in the dtype of x."""
    grouped = x.astype(np.float32).reshape(*x.shape[:-1], -1, group_size)
    low, high = grouped.min(-1), grouped.max(-1)
    scales = np.maximum((high - low) / (2**bits - 1), 1e-7).astype(x.dtype)
    biases = low.astype(x.dtype)
    steps = (grouped - biases.astype(np.float32)[..., None]) / scales.astype(np.float32)[..., None]
    codes = np.clip(np.round(steps), 0, 2**bits - 1).astype(np.uint32).reshape(*x.shape[:-1], -1)
    return pack(codes, bits), scales, biases


def pack(codes, bits):
    """Codes back to back, across words where `bits` doesn't divide 32."""
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint32)) & np.uint32(1)
    words = stream.reshape(*codes.shape[:-1], -1, 32)
    return (words << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)


def unpack(words, bits):
    start = np.arange(words.shape[-1] * 32 // bits) * bits
    low = words.take(start // 32, -1) >> (start % 32).astype(np.uint32)
    # Of a code that ends in the next word: a shift by 32 would be none, so by one first.
    after = words.take(np.minimum(start // 32 + 1, words.shape[-1] - 1), -1)
    high = after << np.uint32(1) << (31 - start % 32).astype(np.uint32)
    return (low | high) & np.uint32(2**bits - 1)


def dequantize(words, scales, biases, group_size, bits):
    """What codes, scales and biases stand for, in the dtype of the scales."""
    codes = unpack(words, bits)
    grouped = codes.reshape(*scales.shape, group_size).astype(np.float32)
    full = grouped * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
    return full.reshape(codes.shape).astype(scales.dtype)


class QuantizedKVCache:
    def __init__(self, group_size=64, bits=8):
        self.group_size, self.bits = group_size, bits
        self.keys = self.values = None
        self.offset = 0

    def update_and_fetch(self, keys, values):
        end = self.offset + keys.shape[2]
        self.keys = self.appended(self.keys, quantize(keys, self.group_size, self.bits))
        self.values = self.appended(self.values, quantize(values, self.group_size, self.bits))
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
        room = np.zeros((rows, heads, -(-n // STEP) * STEP, dim), new.dtype)
        return room if old is None else np.concatenate([old[:, :, : self.offset], room], axis=2)

    def make_mask(self, n, window_size=None, return_array=False):
        if n == 1 and window_size is None:
            return None
        query, key = np.arange(self.offset, self.offset + n)[:, None], np.arange(self.offset + n)
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
