"""Each row is a window of its own in time order; a fetch right-justifies them, in NumPy.

Between prepare and finalize a row takes only its valid tokens; its padding is shown, behind them, and forgotten.
"""

import numpy as np


class RotatingKVCache:
    """One sequence: its newest max_size tokens."""

    def __init__(self, max_size):
        self.max_size, self.offset = max_size, 0
        self.held = None

    def update_and_fetch(self, keys, values):
        new = [keys, values]
        old = [x[:, :, :0] for x in new] if self.held is None else self.held
        kept = min(old[0].shape[2], self.max_size - 1)
        first = old[0].shape[2] - kept
        full = [np.concatenate([a[:, :, first:], b], axis=2) for a, b in zip(old, new, strict=True)]
        self.held = [x[:, :, max(0, x.shape[2] - self.max_size) :].copy() for x in full]
        self.offset += keys.shape[2]
        return full[0], full[1]

    def make_mask(self, n, window_size=None, return_array=False):
        held = min(self.offset, self.max_size - 1)
        query, key = np.arange(held, held + n)[:, None], np.arange(held + n)
        return (key <= query) & (key > query - min(window_size or self.max_size, self.max_size))

    def is_trimmable(self):
        return self.offset < self.max_size

    def trim(self, n):
        n = min(n, self.offset)
        self.offset -= n
        self.held = [x[:, :, : self.offset] for x in self.held]
        return n


class BatchRotatingKVCache:
    def __init__(self, max_size, left_padding):
        self.max_size = max_size
        self.rows = [RotatingKVCache(max_size) for _ in left_padding]
        self.padding = list(left_padding)  # still to come
        self.limits = None

    @property
    def offset(self):
        return np.array([row.offset - p for row, p in zip(self.rows, self.padding, strict=True)])

    def kept(self, row):
        return min(row.offset, self.max_size - 1)

    def update_and_fetch(self, keys, values):
        n = keys.shape[2]
        kept = [self.kept(row) for row in self.rows]
        columns = max(kept) + n
        full = [np.zeros((len(self.rows), x.shape[1], columns, x.shape[3]), x.dtype) for x in (keys, values)]
        for b, row in enumerate(self.rows):
            first = min(self.padding[b], n)
            last = n if self.limits is None else min(n, self.limits[b])
            for x, new, i in zip(full, (keys, values), (0, 1), strict=True):
                if kept[b]:
                    old = row.held[i]
                    x[b, :, max(kept) - kept[b] : max(kept)] = old[0][:, old.shape[2] - kept[b] :]
                x[b, :, max(kept) :] = new[b]
            if first < last:
                row.update_and_fetch(keys[b : b + 1, :, first:last], values[b : b + 1, :, first:last])
            self.padding[b] -= first
            if self.limits is not None:
                self.limits[b] = max(0, self.limits[b] - n)
        return full[0], full[1]

    def make_mask(self, n, window_size=None, return_array=False):
        kept = np.array([self.kept(row) for row in self.rows])[:, None, None, None]
        before = kept.max()
        query, key = np.arange(before, before + n)[:, None], np.arange(before + n)
        first = before - kept + np.array(self.padding)[:, None, None, None]
        mask = (key <= query) & (key >= first)
        return mask & (key > query - min(window_size or self.max_size, self.max_size))

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        if left_padding is not None:
            self.padding = [a + b for a, b in zip(self.padding, left_padding, strict=True)]
        self.limits = None if lengths is None else list(lengths)

    def finalize(self):
        self.limits = None

    def is_trimmable(self):
        return all(row.is_trimmable() for row in self.rows)

    def trim(self, n):
        for row in self.rows:
            row.trim(n)
        return n

    def size(self):
        return max(min(row.offset, self.max_size) for row in self.rows)

    def filter(self, rows):
        self.rows = [self.twin(self.rows[i]) for i in rows]
        self.padding = [self.padding[i] for i in rows]

    def extend(self, other):
        self.rows = self.rows + [self.twin(row) for row in other.rows]
        self.padding = self.padding + other.padding

    def extract(self, b):
        return self.twin(self.rows[b])

    @classmethod
    def merge(cls, rows):
        batch = cls(rows[0].max_size, [0] * len(rows))
        batch.rows = [cls.twin(row) for row in rows]
        return batch

    @staticmethod
    def twin(row):
        copy = RotatingKVCache(row.max_size)
        copy.offset = row.offset
        copy.held = None if row.held is None else [x.copy() for x in row.held]
        return copy

    @property
    def state(self):
        return [(row.held, row.offset) for row in self.rows], self.padding

    @state.setter
    def state(self, state):
        rows, self.padding = state
        for row, (held, offset) in zip(self.rows, rows, strict=True):
            row.held, row.offset = held, offset


candidate = BatchRotatingKVCache
