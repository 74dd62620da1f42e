"""Right-justified rows in one buffer that grows by 256 columns, in NumPy; `row` is the cache of one sequence."""

import numpy as np

STEP = 256


class KVCache:
    """One sequence."""

    def __init__(self):
        self.keys = self.values = None

    @property
    def offset(self):
        return 0 if self.keys is None else self.keys.shape[2]

    def update_and_fetch(self, keys, values):
        if self.keys is None:
            self.keys, self.values = keys.copy(), values.copy()
        else:
            self.keys = np.concatenate([self.keys, keys], axis=2)
            self.values = np.concatenate([self.values, values], axis=2)
        return self.keys, self.values

    def make_mask(self, n, window_size=None, return_array=False):
        query, key = np.arange(self.offset, self.offset + n)[:, None], np.arange(self.offset + n)
        mask = key <= query
        return mask if window_size is None else mask & (key > query - window_size)

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, self.offset)
        left = self.offset - n
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]
        return n


class BatchKVCache:
    def __init__(self, left_padding):
        self.left_padding = np.array(left_padding)
        self.offset = -self.left_padding
        self.keys = self.values = None
        self.idx = 0
        self.right_padding = None

    def update_and_fetch(self, keys, values):
        end = self.idx + keys.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self.keys, self.values = self.grown(self.keys, keys), self.grown(self.values, values)
        self.keys[:, :, self.idx : end] = keys
        self.values[:, :, self.idx : end] = values
        self.offset = self.offset + keys.shape[2]
        self.idx = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def grown(self, old, new):
        rows, heads, n, dim = new.shape
        room = np.zeros((rows, heads, -(-n // STEP) * STEP, dim), new.dtype)
        return room if old is None else np.concatenate([old[:, :, : self.idx], room], axis=2)

    def make_mask(self, n, window_size=None, return_array=False):
        query, key = np.arange(self.idx, self.idx + n)[:, None], np.arange(self.idx + n)
        mask = key <= query
        if window_size is not None:
            mask = mask & (key > query - window_size)
        return mask & (key >= self.left_padding[:, None, None, None])

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        if left_padding is not None:
            self.left_padding = self.left_padding + np.array(left_padding)
            self.offset = self.offset - np.array(left_padding)
        if right_padding is not None:
            self.right_padding = np.array(right_padding)

    def finalize(self):
        if self.right_padding is None:
            return
        for b, shift in enumerate(self.right_padding):
            for x in (self.keys, self.values):
                x[b, :, : self.idx] = np.roll(x[b, :, : self.idx], shift, axis=1)
        self.offset = self.offset - self.right_padding
        self.left_padding = self.left_padding + self.right_padding
        self.right_padding = None

    def is_trimmable(self):
        return True

    def trim(self, n):
        n = min(n, self.idx)
        self.idx -= n
        self.offset = self.offset - n
        return n

    def size(self):
        return self.idx

    def empty(self):
        return self.keys is None

    def filter(self, rows):
        self.left_padding, self.offset = self.left_padding[rows], self.offset[rows]
        if self.keys is None:
            return
        spare = min(self.left_padding)
        self.keys, self.values = (x[rows][:, :, spare : self.idx] for x in (self.keys, self.values))
        self.left_padding = self.left_padding - spare
        self.idx -= spare

    def extend(self, other):
        columns = max(self.idx, other.idx)
        some = self if self.keys is not None else other
        if some.keys is not None:
            parts = [cache.justified(columns, some) for cache in (self, other)]
            self.keys, self.values = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        padding = [cache.left_padding + columns - cache.idx for cache in (self, other)]
        self.left_padding = np.concatenate(padding)
        self.offset = np.concatenate([self.offset, other.offset])
        self.idx = columns

    def justified(self, columns, like):
        """Keys and values right-justified in that many columns."""
        found = []
        for x, model in ((self.keys, like.keys), (self.values, like.values)):
            full = np.zeros((len(self.offset), model.shape[1], columns, model.shape[3]), model.dtype)
            if x is not None:
                full[:, :, columns - self.idx :] = x[:, :, : self.idx]
            found.append(full)
        return found

    def extract(self, b):
        row = KVCache()
        first = self.left_padding[b]
        row.keys = self.keys[b : b + 1, :, first : self.idx].copy()
        row.values = self.values[b : b + 1, :, first : self.idx].copy()
        return row

    @classmethod
    def merge(cls, rows):
        columns = max(row.offset for row in rows)
        batch = cls([columns - row.offset for row in rows])
        batch.offset = np.array([row.offset for row in rows])
        batch.idx = columns
        filled = [row for row in rows if row.keys is not None]
        if not filled:
            return batch
        batch.keys, batch.values = (
            np.zeros((len(rows), x.shape[1], columns, x.shape[3]), x.dtype) for x in (filled[0].keys, filled[0].values)
        )
        for b, row in enumerate(rows):
            if row.offset:
                batch.keys[b : b + 1, :, columns - row.offset :] = row.keys
                batch.values[b : b + 1, :, columns - row.offset :] = row.values
        return batch

    @property
    def state(self):
        return self.keys[:, :, : self.idx], self.values[:, :, : self.idx], self.offset, self.left_padding

    @state.setter
    def state(self, state):
        self.keys, self.values, self.offset, self.left_padding = state
        self.idx = self.keys.shape[2]


candidate = BatchKVCache
