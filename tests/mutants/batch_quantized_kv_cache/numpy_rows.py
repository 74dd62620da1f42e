"""Each row keeps its own codes; a fetch right-justifies them, in NumPy. extract dequantises, merge quantises again."""

import numpy as np


def quantize(x, group_size, bits):
    """x [..., D] -> codes u32 [..., D·bits/32], scales and biases [..., D/group_size] in the dtype of x."""
    grouped = x.astype(np.float32).reshape(*x.shape[:-1], -1, group_size)
    low, high = grouped.min(-1), grouped.max(-1)
    scales = np.maximum((high - low) / (2**bits - 1), 1e-7).astype(x.dtype)
    biases = low.astype(x.dtype)
    steps = (grouped - biases.astype(np.float32)[..., None]) / scales.astype(np.float32)[..., None]
    codes = np.clip(np.round(steps), 0, 2**bits - 1).astype(np.uint32).reshape(*x.shape[:-1], -1, 32 // bits)
    words = (codes << np.arange(0, 32, bits, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return words, scales, biases


def dequantize(words, scales, biases, group_size, bits):
    """What codes, scales and biases stand for, in the dtype of the scales."""
    codes = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & np.uint32(2**bits - 1)
    grouped = codes.reshape(*scales.shape, group_size).astype(np.float32)
    full = grouped * scales.astype(np.float32)[..., None] + biases.astype(np.float32)[..., None]
    return full.reshape(*words.shape[:-1], -1).astype(scales.dtype)


class KVCache:
    """One sequence, not quantised, that remembers how the batch was."""

    def __init__(self, group_size, bits):
        self.quantised = group_size, bits
        self.held = None

    @property
    def offset(self):
        return 0 if self.held is None else self.held[0].shape[2]

    def update_and_fetch(self, keys, values):
        new = [keys, values]
        old = self.held or [x[:, :, :0] for x in new]
        self.held = [np.concatenate([a, b], axis=2) for a, b in zip(old, new, strict=True)]
        return self.held[0], self.held[1]


class Row:
    """The six arrays [H, tokens, ·] of one row."""

    def __init__(self, parts=None):
        self.parts = parts

    @property
    def count(self):
        return 0 if self.parts is None else self.parts[0].shape[1]

    def append(self, new):
        if self.parts is None:
            self.parts = [x.copy() for x in new]
        else:
            self.parts = [np.concatenate([a, b], axis=1) for a, b in zip(self.parts, new, strict=True)]

    def cut(self, count):
        self.parts = [x[:, :count] for x in self.parts]

    def twin(self):
        return Row(None if self.parts is None else [x.copy() for x in self.parts])


class BatchQuantizedKVCache:
    def __init__(self, left_padding, group_size=64, bits=8):
        self.group_size, self.bits = group_size, bits
        self.rows = [Row() for _ in left_padding]
        self.padding = list(left_padding)  # still to come
        self.limits = None

    @property
    def offset(self):
        return np.array([row.count - p for row, p in zip(self.rows, self.padding, strict=True)])

    def update_and_fetch(self, keys, values):
        n = keys.shape[2]
        parts = [part for x in (keys, values) for part in quantize(x, self.group_size, self.bits)]
        before = max(row.count for row in self.rows)
        full = [np.zeros((len(self.rows), x.shape[1], before + n, x.shape[3]), x.dtype) for x in parts]
        for b, row in enumerate(self.rows):
            first = min(self.padding[b], n)
            last = n if self.limits is None else min(n, self.limits[b])
            for x, new, i in zip(full, parts, range(6), strict=True):
                if row.count:
                    x[b, :, before - row.count : before] = row.parts[i]
                x[b, :, before:] = new[b]
            if first < last:
                row.append([x[b, :, first:last] for x in parts])
            self.padding[b] -= first
            if self.limits is not None:
                self.limits[b] = max(0, self.limits[b] - n)
        return tuple(full[:3]), tuple(full[3:])

    def make_mask(self, n, window_size=None, return_array=False):
        counts = np.array([row.count for row in self.rows])[:, None, None, None]
        before = counts.max()
        query, key = np.arange(before, before + n)[:, None], np.arange(before + n)
        first = before - counts + np.array(self.padding)[:, None, None, None]
        mask = (key <= query) & (key >= first)
        return mask if window_size is None else mask & (key > query - window_size)

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        if left_padding is not None:
            self.padding = [a + b for a, b in zip(self.padding, left_padding, strict=True)]
        self.limits = None if lengths is None else list(lengths)

    def finalize(self):
        self.limits = None

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, *(row.count for row in self.rows))
        for row in self.rows:
            row.cut(row.count - n)
        return n

    def filter(self, rows):
        self.rows = [self.rows[i].twin() for i in rows]
        self.padding = [self.padding[i] for i in rows]

    def extend(self, other):
        self.rows = self.rows + [row.twin() for row in other.rows]
        self.padding = self.padding + other.padding

    def extract(self, b):
        cache, parts = KVCache(self.group_size, self.bits), self.rows[b].parts
        cache.held = [dequantize(*half, self.group_size, self.bits)[None] for half in (parts[:3], parts[3:])]
        return cache

    @classmethod
    def merge(cls, caches):
        batch = cls([0] * len(caches), *caches[0].quantised)
        for row, cache in zip(batch.rows, caches, strict=True):
            if cache.held is not None:
                row.append([p[0] for x in cache.held for p in quantize(x, *caches[0].quantised)])
        return batch

    @property
    def state(self):
        return [row.parts for row in self.rows], self.padding

    @state.setter
    def state(self, state):
        parts, self.padding = state
        self.rows = [Row(part) for part in parts]


candidate = BatchQuantizedKVCache
